"""What every test stands on: strict JAX, 64-bit floats, checked shapes, fixtures.

Environment variables choose the run: `JEDIT_TEST_X64=0` runs in float32, as users have it;
`JEDIT_TEST_KEY_REUSE=1` lets JAX report a random key that is used twice, in the tests that draw
random numbers through jedit; `JEDIT_TEST_TYPECHECK=0` leaves the run-time check of shape
annotations out, `all` takes those of `jedit.tracing` in, which walks over programs, thousands of
calls for each, and costs a third of the suite's time.

`JEDIT_TEST_FAST_COMPILE=1` compiles quickly what runs once: two thirds of the compiler's time go
without LLVM's optimisation and XLA's slower emitter of fused kernels. `JEDIT_TEST_ALL=1` runs what
is marked `exhaustive` too. `JEDIT_TEST_ELSEWHERE` names files that run in float32 elsewhere: of
those only what needs float64 runs here.

Compiled programs are kept in `.jax_cache`, a folder that all runs share: a second run finds them
there, and so does a worker that needs what another has compiled. `JAX_COMPILATION_CACHE_DIR` names
another folder.
"""

import gc
import importlib.metadata
import importlib.util
import os
import zlib
from pathlib import Path

IS_X64 = os.environ.get("JEDIT_TEST_X64", "1") != "0"
IS_KEY_REUSE_CHECKED = os.environ.get("JEDIT_TEST_KEY_REUSE", "0") == "1"
TYPECHECK = os.environ.get("JEDIT_TEST_TYPECHECK", "1")
IS_COMPILED_FAST = os.environ.get("JEDIT_TEST_FAST_COMPILE", "0") == "1"
ELSEWHERE = frozenset(os.environ.get("JEDIT_TEST_ELSEWHERE", "").split())
IS_EXHAUSTIVE = os.environ.get("JEDIT_TEST_ALL", "0") == "1"
ROOT = Path(__file__).resolve().parent.parent
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
MAX_MEMORY_MAPS = 25_000
# Where keys are given to jedit; elsewhere tests draw their data, as they like.
KEYS_CHECKED = ("attacks", "curvature", "data", "methods", "objectives", "transforms")
KEYS_CHECKED += (
    "test_forget.py",
    "test_continual.py",
    "test_contract.py",
    "test_package.py",
    "test_unlearn.py",
)

# All of this is read when JAX and the BLAS start, so it comes before their import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# What compiles fast, for this process and for those that a test starts.
COMPILE_FLAGS = ""
if IS_COMPILED_FAST:
    COMPILE_FLAGS = "--xla_backend_optimization_level=0"
    # XLA dies of a flag that it does not know, and newer ones have no other emitter.
    if JAXLIB < (0, 11):
        COMPILE_FLAGS += " --xla_cpu_use_fusion_emitters=false"
flags = [os.environ.get("XLA_FLAGS", ""), COMPILE_FLAGS]
# The interpreter of the kernels, which JAX has from 0.12 on, runs a cluster's six threads in XLA's
# pool, where they wait for one another. That has as many as there are cores, or as this says when
# JAX first computes, be it while tests are collected; with fewer they would wait for ever.
if JAXLIB >= (0, 12):
    os.environ.setdefault("NPROC", "8")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker's matrix products: several workers share the cores.
    flags.append("--xla_cpu_multi_thread_eigen=false")
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

import tests.typecheck  # noqa: F401 - the import hook below finds it by name

jax.config.update("jax_enable_x64", IS_X64)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if TYPECHECK != "0":
    rooms = {f"jedit.{path.stem}" for path in (ROOT / "jedit").iterdir() if path.stem[0] != "_"}
    if TYPECHECK != "all":
        rooms.remove("jedit.tracing")
    jaxtyping.install_import_hook(["jedit_kernels", *sorted(rooms)], "tests.typecheck.check")

# Fixtures here are constants, so hypothesis may share them between examples; compiling is slow, so
# it sets no deadline. In CI the examples are the same each time.
hypothesis.settings.register_profile(
    "jedit",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("jedit")

# A collection goes through all the programs that JAX keeps; by default one comes every 700 objects.
gc.set_threshold(50_000, 20, 50)

HAS_LLM = importlib.util.find_spec("tunix") is not None
HAS_PARITY = HAS_LLM and importlib.util.find_spec("torch") is not None
collect_ignore = ([] if HAS_LLM else ["llm"]) + ([] if HAS_PARITY else ["parity"])


def pytest_report_header(config):
    """Says which of the runs this is."""
    del config
    lines = [
        f"jax {jax.__version__}, {'float64' if IS_X64 else 'float32'}"
        + (", reused keys are errors where jedit draws" if IS_KEY_REUSE_CHECKED else "")
        + (", compiled without optimisation" if IS_COMPILED_FAST else "")
        + (", what is exhaustive too" if IS_EXHAUSTIVE else "")
        + ("" if TYPECHECK != "0" else ", shape annotations unchecked")
    ]
    if not HAS_LLM:
        lines.append("tests/llm is left out: the extra llm is not installed (make test-llm)")
    if not HAS_PARITY:
        lines.append("tests/parity is left out: torch is not installed (make test-parity)")
    return lines


def pytest_collection_modifyitems(config, items):
    """Leaves out, visibly, what this run is not meant for."""
    left_out = ([] if IS_X64 else ["float64"]) + ([] if IS_EXHAUSTIVE else ["exhaustive"])
    dropped = {item for item in items if any(item.get_closest_marker(m) for m in left_out)}
    dropped |= {
        item
        for item in items
        if item.path.relative_to(ROOT).as_posix() in ELSEWHERE
        and not item.get_closest_marker("float64")
    }
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


class Tolerance:
    """Named tolerances: 1e-10 each in float64, and in float32 what the kind of arithmetic allows.

    Attributes:
        rounding: a few operations in another order.
        contraction: sums over a batch or a long axis in another order.
        factorization: eigendecompositions and solves.
    """

    def __init__(self, is_x64):
        self.rounding = 1e-10 if is_x64 else 1e-5
        self.contraction = 1e-10 if is_x64 else 1e-4
        self.factorization = 1e-10 if is_x64 else 2e-3

    def check(self, actual, expected, kind="contraction"):
        """Asserts that two pytrees agree leaf by leaf, relative to the largest expected entry.

        Args:
            actual: a pytree of arrays.
            expected: a pytree of the same structure and shapes.
            kind: the attribute of this class that bounds the error.
        """
        tolerance = getattr(self, kind)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
        ):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            scale = np.max(np.abs(b), initial=0.0) or 1.0
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert a.shape == b.shape, f"{name}: {a.shape} instead of {b.shape}"
            np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Drops compiled programs before they are too many.

    Each holds some four memory maps, of which Linux gives a process 65,530; XLA aborts at the next.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAX_MEMORY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=IS_KEY_REUSE_CHECKED)
def checked_keys(request):
    """JAX's own check that no random key is used twice."""
    place = request.node.path.relative_to(ROOT / "tests").parts[0]
    is_exempt = request.node.get_closest_marker("reuses_keys") is not None
    with jax.debug_key_reuse(place in KEYS_CHECKED and not is_exempt):
        yield


@pytest.fixture(scope="session")
def tolerance():
    """The named tolerances of this run's precision."""
    return Tolerance(IS_X64)


@pytest.fixture
def key(request):
    """A random key of the test's own: made from its name, so no test changes another's draws."""
    return jax.random.key(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def unchecked_annotations():
    """Turns run-time annotation checks off, for tests of what a function says about bad input."""
    was_disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", was_disabled)


@pytest.fixture
def standard_promotion():
    """JAX's own dtype promotion, for other people's code: optax's Adam mixes dtypes, for one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def rank_promotion():
    """JAX's own rank promotion, for other people's code: tunix's models broadcast by it."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository; a test that needs it skips without it."""
    path = Path(os.environ.get("JEDIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs real data, which is not part of the repository: {path} is absent")
    return path

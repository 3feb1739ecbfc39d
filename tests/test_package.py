"""The package as a user meets it, and the settings under which every other test runs."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zlib
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jedit
import jedit.data

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ["demo", "test", "test-llm", "test-oldest", "test-newest", "lint", "bench", "notebooks"]


def test_the_version_is_the_installed_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", jedit.__version__)
    assert metadata.version("jedit") == jedit.__version__


def test_every_public_name_exists_and_every_package_says_what_it_is():
    assert all(hasattr(jedit, name) for name in getattr(jedit, "__all__", []))
    inits = [*(ROOT / "jedit").rglob("__init__.py"), *(ROOT / "kernels").rglob("__init__.py")]
    for init in inits:
        root = ROOT / "kernels" if "kernels" in init.relative_to(ROOT).parts else ROOT
        name = ".".join(init.parent.relative_to(root).parts)
        assert importlib.import_module(name).__doc__, name


def test_the_core_imports_alone_and_leaves_jax_as_it_was():
    script = """
import json, sys, warnings
import jax
before = dict(jax.config.values)
import jedit, jedit_kernels
changed = [name for name, value in jax.config.values.items() if before.get(name, value) != value]
print(json.dumps({"changed": changed, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert result["changed"] == []
    # What only an extra installs must not be needed. (flax brings rich; jax brings scipy.)
    optional = {"matplotlib", "sklearn", "tokenizers", "tqdm", "tyro", "tunix", "transformers"}
    optional |= {"haiku", "equinox", "hypothesis", "pytest", "beartype", "kfac_jax"}
    assert optional.isdisjoint(result["modules"])


def test_requirements_are_floors_and_linters_are_pinned():
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", line) for line in PROJECT["dependencies"])
    names = {re.match(r"[\w-]+", line).group() for line in PROJECT["dependencies"]}
    assert names == {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "jaxtyping"}
    for line in PROJECT["optional-dependencies"]["dev"]:
        if line.startswith(("ruff", "pyright")):
            assert "==" in line
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_the_target(target):
    out = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stderr


def test_the_licence_is_the_one_named():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_ranks_are_never_promoted_in_tests():
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_dtypes_are_never_promoted_in_tests():
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        jnp.ones(3, jnp.bfloat16) + jnp.ones(3, jnp.float32)


@pytest.mark.float64
def test_float64_is_on():
    assert jnp.ones(3).dtype == np.float64


@pytest.mark.skipif(os.environ.get("JEDIT_TEST_TYPECHECK") == "0", reason="checks are off")
def test_a_wrong_shape_is_caught(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(
        "import dataclasses\n"
        "import jax\n"
        "from jaxtyping import Array, Float\n"
        "@jax.tree_util.register_dataclass\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class State:\n"
        "    x: Array\n"
        "def product(x: Float[Array, 'n d'], w: Float[Array, 'd k']) -> Float[Array, 'n k']:\n"
        "    return x @ w\n"
    )
    monkeypatch.setattr(jedit.data, "__path__", [*jedit.data.__path__, str(tmp_path)])
    probe = importlib.import_module("jedit.data.probe")
    monkeypatch.delitem(sys.modules, "jedit.data.probe")
    monkeypatch.delattr(jedit.data, "probe")
    assert probe.product(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        probe.product(jnp.ones((2, 3)), jnp.ones((4, 4)))
    # A pytree may hold anything, for a tree map may return anything.
    assert jax.eval_shape(probe.State, jnp.ones(3)).x.shape == (3,)
    assert jax.tree.map(lambda _: "word", probe.State(jnp.ones(3))).x == "word"


@pytest.mark.usefixtures("unchecked_annotations")
def test_checks_of_annotations_can_be_turned_off():
    assert jaxtyping.config.jaxtyping_disable


def test_a_reused_key_is_caught(key):
    with jax.debug_key_reuse(True):
        jax.random.normal(key)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.random.normal(key)


def test_the_key_is_the_tests_own(key):
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    expected = jax.random.key(zlib.crc32(b"test_the_key_is_the_tests_own"))
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_a_tolerance_sees_an_error_of_its_size(tolerance):
    exact = {"a": np.array([1.0, 1000.0]), "b": np.zeros(2)}
    tolerance.check(exact, exact)
    wrong = {"a": exact["a"] * (1 + 3 * tolerance.contraction), "b": exact["b"]}
    with pytest.raises(AssertionError, match="a"):
        tolerance.check(wrong, exact)
    tolerance.check({"a": exact["a"] * (1 + tolerance.contraction / 3), "b": exact["b"]}, exact)

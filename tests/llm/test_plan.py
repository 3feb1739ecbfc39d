"""`jedit plan`: its bytes beside those that an edit really takes, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import transformers

from jedit.core.paths import parameter_paths, selected_paths
from jedit.curvature import Factorize
from jedit.curvature.limits import CUSOLVER
from jedit.models import load_model
from jedit.models.shapes import load_shapes
from jedit.recipes.folders.places import SELECT
from jedit.recipes.plan.advice import _pattern
from jedit.recipes.plan.plan import Work, in_every_layer, plan
from jedit.recipes.plan.programs import flops_of
from tests.conftest import COMPILE_FLAGS, ROOT
from tests.llm.random_folder import COMMON, CONFIGS, write_config, write_random

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")
LENGTH, ROWS = 64, 40
# (vocabulary, width, hidden width, layers, heads): 5, 20 and 60 million parameters; and little else
# than factors.
SIZES = {
    "factors": (500, 256, 1792, 2, 4),
    "5M": (8000, 192, 528, 4, 4),
    "20M": (20000, 320, 880, 6, 5),
    "60M": (32000, 512, 1408, 8, 8),
}
# Small pieces, of which the tracer and the compiler have many, come from the heap, and what is as
# large as an array is mapped by itself: so the two can be told apart.
MALLOC = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}


def config(size):
    vocab, width, hidden, layers, heads = SIZES[size]
    return transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )


def mapped(pid):
    """Bytes of a process's anonymous memory that lie outside of its heap."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = int(re.search(r"RssAnon:\s*(\d+)", status)[1]) * 1024
    is_heap = False
    with Path(f"/proc/{pid}/maps").open() as lines:
        for line in lines:
            if line.endswith("[heap]\n"):
                begin, end = (int(x, 16) for x in line.split()[0].split("-"))
                found, is_heap = found - (end - begin), True
            elif is_heap:  # its pieces lie side by side, and the rest is long
                break
    return found


def measured(folder, method):
    """The most that an edit maps at a time, beyond what the process had with all imported.

    The sum of live arrays and of the compiler's temporaries would be the compiler's word on both
    sides.
    """
    command = [sys.executable, "-m", "tests.llm.plan_program", folder, method, ROWS, LENGTH]
    environment = os.environ | MALLOC | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=environment, stdin=-1, stdout=-1, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = mapped(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            try:
                peak = max(peak, mapped(child.pid))
            except (OSError, TypeError):  # it has just ended
                break
            time.sleep(0.02)
        assert child.stdout.read() == "done\n"
    return peak - before


def planned(folder, method):
    method, _, by = method.partition(" ")
    work = Work(
        method=method,
        factorize=Factorize(by or "auto"),
        forget=ROWS // 2,
        retain=ROWS,
        max_len=LENGTH + 1,
        steps=8,
        recovery=4,
        attack=False,
    )
    return plan(folder, work)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("size", "method"),
    [
        ("20M", "kfade"),
        ("factors", "kfade cholesky"),
        *(
            pytest.param(size, method, marks=pytest.mark.exhaustive)
            for size in ("5M", "20M", "60M")
            for method in ("kfade", "natural")
            if (size, method) != ("20M", "kfade")
        ),
    ],
)
def test_an_edit_takes_what_was_planned(size, method, tmp_path):
    """Within 20 percent, of the resident memory as the system counts it."""
    folder = write_config(config(size), tmp_path / size, scale=0.02)
    found, told = measured(folder, method), planned(folder, method)
    parts = {phase.name: round(phase.peak / 2**20) for phase in told.phases}
    assert told.peak == pytest.approx(found, rel=0.2), (found / 2**20, parts)


def test_on_a_mesh_a_device_holds_what_was_planned(tmp_path):
    """Parameters, sums and factors that are really made, split over four by two devices."""
    folder = write_random("llama", tmp_path / "llama")
    flags = f"--xla_force_host_platform_device_count=8 {COMPILE_FLAGS}"
    printed = subprocess.run(
        [sys.executable, "-m", "tests.llm.plan_program", str(folder), "mesh", "8", "6"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found = json.loads(printed)
    assert found["all"] == 8
    assert found["told"][0] == found["made"][0]
    # The sums of the inputs themselves and the counts are in the one number and not in the other.
    assert found["told"][1] == pytest.approx(found["made"][1], rel=0.1)
    assert found["told"][2] == pytest.approx(found["made"][2], rel=0.02)
    assert found["told"][3] == found["made"][3]  # inverses, of which each device has some rows
    one = plan(folder, Work("kfade", forget=8, retain=8, max_len=7))
    assert one.sums > 3 * found["told"][1]


def llama_of(layers, folder, **more):
    """A folder with the configuration of a tiny Llama alone."""
    folder.mkdir()
    config = transformers.LlamaConfig(**COMMON | {"num_hidden_layers": layers}).to_dict()
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def test_some_layers_have_the_programs_of_all(tmp_path):
    """Layers that the small models, which are compiled, do not have; and all that those have."""
    folder = llama_of(8, tmp_path / "llama")
    work = Work("kfade", forget=8, retain=40, max_len=9, attack=False)
    whole = plan(folder, work)
    fifth = plan(folder, work._replace(select="^layers/5/(attn|mlp)/"))
    assert fifth.edit * 8 == whole.edit
    assert fifth.factors * 8 == pytest.approx(whole.factors, rel=0.01)
    for one, other in zip(fifth.phases, whole.phases, strict=True):
        assert one.temporaries == other.temporaries
        assert one.held < other.held
    paths = [path for path, _ in parameter_paths(load_shapes(folder)[1])]
    down = [path for path in paths if "/mlp/down_proj/" in path]
    small = in_every_layer(down[5:6])
    assert [path for path in paths if re.search(small, path)] == down
    assert in_every_layer(["embed.w", "layers/0/a"]) == r"^embed\.w$|^layers/\d+/a$"
    # Fewer layers of what was selected, and nothing else of them.
    assert selected_paths(paths, _pattern(paths, down, [3, 4])) == down[3:5]
    chosen = selected_paths(paths, SELECT)
    assert _pattern(paths, chosen, [3, 4]) == "^layers/(3|4)/(attn|mlp)/"


HIDDEN, LONG = COMMON["hidden_size"], 28672  # an axis as long as Llama-70B's
WIDE = Work("kfade", forget=8, retain=40, max_len=9, attack=False)


def kept(folder, how):
    """The plan, and by side and form the number of matrices, bytes and flops."""
    found = plan(folder, WIDE._replace(factorize=how))
    return found, {(k.side, k.form): (k.number, k.bytes, k.flops) for k in found.kept}


def test_axes_that_no_library_decomposes_are_planned_for(tmp_path):
    """Two layers of an axis of 28,672: gate and up end in it, down begins with it."""
    folder = llama_of(2, tmp_path / "llama", intermediate_size=LONG)
    found, by_size = kept(folder, Factorize("auto", max_dim=32768))
    assert by_size[LONG, "cholesky"] == (6, 6 * 4 * LONG**2, pytest.approx(6 * LONG**3 / 3))
    # What meets them in a block; the attention's factors keep their eigenvectors.
    number = 4
    assert by_size[HIDDEN, "cholesky"][:2] == (number, number * 4 * HIDDEN**2)
    attention = sum(n for (_, form), (n, _, _) in by_size.items() if form == "eigh")
    assert attention == 2 * 6  # inputs of q, k and v, of o, and four outputs
    assert [k.why for k in found.kept if k.is_solved] == [
        "auto: longer than 8192",
        "auto: damped with a longer one",
    ]
    assert not any(k.limit for k in found.kept)
    shorter, some = kept(folder, Factorize(rank=64, max_dim=32768))
    size = 6 * 4 * (LONG * 64 + 65)
    m = 2 * 64 + 8
    assert some[LONG, "64 eigenvectors"] == (6, size, 6 * 8 * (2 * LONG**2 * m + 4 * LONG * m**2))
    assert shorter.factors < found.factors / 100
    whole, all_of_them = kept(folder, Factorize(max_dim=32768))
    assert all_of_them[LONG, "eigh"] == (6, 6 * 4 * (2 * LONG**2 + LONG), 6 * 20 * LONG**3)
    by_name = {phase.name: phase for phase in whole.phases}
    assert whole.seconds(1e12)["decompose"] > 100 * found.seconds(1e12)["decompose"]
    assert by_name["decompose"].held > found.phases[1].held + 4 * 4 * LONG**2
    assert [k.limit for k in whole.kept if k.side == LONG] == [CUSOLVER]
    _, short = kept(folder, Factorize())
    assert short[LONG, "diagonal"][0] == 6


def test_inverses_are_held_beside_their_factors_and_made_once(tmp_path):
    """By K-FADE, and by natural steps in the place of a copy; offloaded they are on the host."""
    folder = llama_of(2, tmp_path / "llama", intermediate_size=64)
    for method, name in (("kfade", "edit"), ("natural", "natural")):
        work = WIDE._replace(method=method, steps=4, recovery=0)
        plans = {
            by: plan(folder, work._replace(factorize=Factorize(by)))
            for by in ("eigh", "cholesky", "inverse")
        }
        phases = {by: {p.name: p for p in one.phases}[name] for by, one in plans.items()}
        made = {by: sum(k.flops for k in one.kept if k.is_solved) for by, one in plans.items()}
        assert made["inverse"] > made["cholesky"] > made["eigh"] == 0
        # By a Cholesky factor, or by the inverse itself, a step has as many flops.
        more = phases["inverse"].flops - phases["cholesky"].flops
        assert more == pytest.approx(made["inverse"] - made["cholesky"], rel=1e-9)
        none, every = plans["cholesky"], plans["eigh"]
        copies = {"kfade": (1, 2), "natural": (5, 5)}[method]
        less = copies[0] * every.factors - copies[1] * none.factors
        found = phases["eigh"].held - phases["cholesky"].held
        assert found == pytest.approx(less, abs=4)  # the number of outputs, which is there once
    offloaded = plan(folder, WIDE._replace(factorize=Factorize("cholesky"), offload=True))
    here = plan(folder, WIDE._replace(factorize=Factorize("cholesky")))
    there, beside = (one.phases[-1] for one in (offloaded, here))
    assert beside.held - there.held == pytest.approx(2 * here.factors, abs=4)
    # A block's two factors, those of "down" or "up", are fetched.
    pair = 4 * (64**2 + HIDDEN**2)
    assert beside.temporaries <= there.temporaries <= beside.temporaries + pair


def test_the_command_says_what_was_chosen_and_what_takes_hours(tmp_path, capsys):
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    folder = llama_of(2, tmp_path / "llama", intermediate_size=LONG)
    given = ["plan", str(folder), "--max-len", "9", "--forget", "8", "--retain", "40"]
    given += ["--method", "kfade", "--no-attack", "--rate", "1e11"]
    assert main([*given, "--max-dim", "32768", "--factorize", "eigh"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    hours = 6 * 20 * LONG**3 / 1e11 / 3600
    assert f"Decompositions take {hours:.3g} hours at this rate" in shown
    # Also where the hours are those of some eigenvectors: of 6 matrices, and of 18 short ones.
    solved = (6 * LONG**3 + (2 * 8 + 2) * HIDDEN**3) / 3 / 1e6
    assert main([*given, "--max-dim", "32768", "--rank", "12000", "--rate", "1e6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"takes none, and some {solved:.3g} s at each damping" in shown
    assert "Factors of 28,672 columns are more than cuSOLVER before CUDA 13 takes (25,000)" in shown
    assert main(given) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "longer than max_dim=16384" in shown
    assert "--max-dim 28672 makes them dense" in shown
    # What an embedding looks up has a diagonal factor, and would at any max_dim.
    for more in ([], ["--max-dim", "16"]):
        assert main([*given, *more, "--select", "embed|^layers/0/attn/q"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "an embedding's" in shown
        assert "longer than max_dim" not in shown
        assert "--max-dim 37" not in shown


def test_solves_are_counted_as_products_are():
    d, columns = 24, 5
    matrix, rows = (jax.ShapeDtypeStruct((2, d, n), jnp.float32) for n in (d, columns))

    def solved(matrix, rows):
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), rows)

    with jax.numpy_rank_promotion("allow"):
        found = flops_of(jax.make_jaxpr(solved)(matrix, rows).jaxpr)
    assert found == pytest.approx(2 * (d**3 / 3 + 2 * d**2 * columns))


def test_a_dtype_that_is_none_is_refused(tmp_path):
    folder = llama_of(2, tmp_path / "llama", dtype="auto", torch_dtype="auto")
    with pytest.raises(ValueError, match=r"config\.json: its dtype is auto, which no weights have"):
        load_shapes(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_loaded_model(name, tmp_path):
    folder = write_random(name, tmp_path / name)
    _, params, _ = load_model(folder)
    _, shapes, _ = load_shapes(folder)
    found, loaded = (
        {p: (x.shape, x.dtype) for p, x in parameter_paths(t)} for t in (shapes, params)
    )
    assert found == loaded
    # Without weights the configuration is enough, and another depth is as good.
    (folder / "model.safetensors").unlink()
    _, three, _ = load_shapes(folder, num_layers=3, dtype="float32")
    some = {path: shape for path, shape in found.items() if not re.match(r"layers/[1-9]", path)}
    assert some.items() <= {p: (x.shape, x.dtype) for p, x in parameter_paths(three)}.items()
    assert any(path.startswith("layers/2/") for path, _ in parameter_paths(three))


def test_from_the_command_line(tmp_path, capsys):
    """A folder of a configuration alone: a plan, what does not fit, and what is refused."""
    pytest.importorskip("tyro")
    from jedit.cli.main import main

    folder = write_random("llama", tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    given = ["plan", str(folder), "--max-len", "17", "--forget", "8", "--retain", "40"]
    given += ["--method", "kfade", "--rate", "1e9"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "decompose" in shown
    assert "attack" in shown
    assert "at 0.001 Tflop/s" in shown
    assert "Give --memory GIB" in shown
    given.append("--no-attack")
    assert main([*given, "--memory", "1"]) == 0
    assert "It fits in 1 GiB" in capsys.readouterr().out
    assert main([*given, "--memory", "1e-6"]) == 0
    shown = capsys.readouterr().out
    assert "It does not fit" in shown
    for change in ("group_bytes=", "offload=True", "--max-dim", "layer 0 alone", "--batch-size 4"):
        assert change in shown, change
    assert "auto: at most 8192" in shown
    for more, sentence in (
        (["--select", "nothing"], "'nothing' matches no"),
        (["--mesh", "data=two"], "is not of the form data=4,model=2"),
        (["--mesh", "data=4097"], "takes 4097 devices; at most 4096"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--factorize", "inverse", "--rank", "2"], "rank=2 keeps eigenvectors"),
        (["--memory", "0"], "--memory must be positive"),
        (["--max-len", "1"], "max_len must be at least 2"),
        (["--method", "natural", "--offload"], "offload is of K-FADE alone"),
    ):
        assert main([*given, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err

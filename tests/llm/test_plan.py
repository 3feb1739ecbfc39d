"""`jedit plan`: its bytes beside those that an edit really takes, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from jedit.core.paths import parameter_paths
from jedit.models import load_model
from jedit.models.shapes import load_shapes
from jedit.recipes.plan.plan import Work, plan
from tests.conftest import COMPILE_FLAGS, ROOT
from tests.llm.random_folder import CONFIGS, write_config, write_random

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")
LENGTH, ROWS = 64, 40
# (vocabulary, width, hidden width, layers, heads): 5, 20 and 60 million parameters.
SIZES = {
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

    The sum of live arrays and of the compiler's temporaries was compared once: it is what the plan
    says to a few percent, but it would be the compiler's word on both sides.
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
    work = Work(
        method=method,
        forget=ROWS // 2,
        retain=ROWS,
        max_len=LENGTH + 1,
        steps=8,
        recovery=4,
        attack=False,
    )
    return plan(folder, work)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["kfade", "natural"])
@pytest.mark.parametrize(
    "size",
    ["20M", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ("5M", "60M"))],
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
    one = plan(folder, Work("kfade", forget=8, retain=8, max_len=7))
    assert one.sums > 3 * found["told"][1]


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
    assert "at 0.001 Tflop/s" in shown
    assert "Give --memory GIB" in shown
    assert main([*given, "--memory", "1"]) == 0
    assert "It fits in 1 GiB" in capsys.readouterr().out
    assert main([*given, "--memory", "1e-6"]) == 0
    shown = capsys.readouterr().out
    assert "It does not fit" in shown
    for change in ("group_bytes=", "offload=True", "max_dim=", "layer 0 alone", "--batch-size 4"):
        assert change in shown, change
    for more, sentence in (
        (["--select", "nothing"], "'nothing' matches no"),
        (["--mesh", "data=two"], "is not of the form data=4,model=2"),
        (["--memory", "0"], "--memory must be positive"),
        (["--max-len", "1"], "max_len must be at least 2"),
        (["--method", "natural", "--offload"], "offload is of K-FADE alone"),
    ):
        assert main([*given, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["plan", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err

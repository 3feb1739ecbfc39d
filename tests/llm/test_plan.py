"""`jedit plan`: its bytes beside those that an edit really takes, in a process of its own."""

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
from tests.conftest import ROOT
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
    found = int(re.search(r"RssAnon:\s*(\d+)", status)[1])
    where = ""
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                before, where = where, line.split()[-1]
                if before == "[heap]" != where:  # its pieces lie side by side; the rest is long
                    break
            elif where == "[heap]" and line.startswith("Anonymous:"):
                found -= int(line.split()[1])
    return found * 1024


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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("method", ["kfade", "natural"])
@pytest.mark.parametrize(
    "size",
    ["20M", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ("5M", "60M"))],
)
def test_an_edit_takes_what_was_planned(size, method, tmp_path):
    """Within 20 percent, of the resident memory as the system counts it."""
    folder = write_config(config(size), tmp_path / size, scale=0.02)
    found, told = measured(folder, method), planned(folder, method)
    assert told.peak == pytest.approx(found, rel=0.2), (found / 2**20, told)


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

"""The folder of `make gpu`: its tensors are transformers' Llama's, and it is edited to the end."""

import json

import jax
import pytest
import transformers

from jedit.models import load_model
from tests.bench.gpu_run import folder as bench
from tests.llm.random_folder import shapes

pytestmark = pytest.mark.usefixtures("standard_promotion", "rank_promotion")


def small():
    """One layer, so that little is compiled."""
    size = bench.size_of(True)
    return size._replace(config=size.config | {"num_hidden_layers": 1}, group_bytes=2**40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gpu") / "llama"
    found = bench.write(small(), made)
    return made, found


def test_the_tensors_are_those_of_the_1b(folder):
    one = bench.size_of(False).config
    found = bench.shapes(one)
    assert found == shapes(transformers.LlamaConfig(**one))
    # Llama-3.2-1B has 1.24 billion parameters.
    count = sum(x[0] * (x[1] if len(x) > 1 else 1) for x in found.values())
    assert count == 1_235_814_400
    made, written = folder
    _, params, _ = load_model(made)
    assert sum(x.size for x in jax.tree.leaves(params)) == written["parameters"]
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}


def test_it_is_edited_saved_and_planned(folder, tmp_path):
    made, _ = folder
    path = tmp_path / "edit.json"
    found = bench.edit(small(), made, path)
    assert list(found["phases"]) == ["load", "fit", "edit", "evaluate", "save"]
    assert json.loads(path.read_text())["phases"] == found["phases"]
    assert 0 < found["true KL"] <= bench.BUDGET * 1.001
    before, after = found["forget nll"]
    assert after > before
    # By hand, of one position: 4 P and the moments of q, k, v, o, gate, up and down.
    entries = 32 * (32 + 16 + 16 + 32 + 48 + 48 + 48)
    squares = (6 * 32**2 + 48**2) + (3 * 32**2 + 2 * 16**2 + 2 * 48**2)
    assert found["fit flops"] == 8 * 12 * (4 * entries + 2 * squares)
    edited, _, _ = load_model(made.with_name("llama-edited"))
    assert callable(edited)
    told = bench.plan(small(), made)
    assert set(told["phases"]) == {"fit", "decompose", "edit"}
    assert told["weights GiB"] == pytest.approx(found["weights GiB"])

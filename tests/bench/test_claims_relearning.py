"""The script of the tuned attackers, on a toy: each attacks both models."""

import jax
import pytest

from jedit.data import generate_authors
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import Sets, prepare
from tests.bench.claims import grids, relearning

MODELS = ("edited", "retrained")
SIZE = Model(width=8, layers=1, heads=2, vocab=300, max_len=64)


@pytest.fixture
def setup(monkeypatch, tmp_path):
    rows = generate_authors(0, 12, 2)
    sets = Sets(*(rows[4 * i : 4 * (i + 1)] for i in range(6)))
    preset = PRESETS["cpu"]._replace(authors=4, forgotten=2, questions=4, model=SIZE)
    begin = small_gpt(rows, SIZE, "float32", key=jax.random.key(0))
    other = small_gpt(rows, SIZE, "float32", key=jax.random.key(1)).params
    begin = begin._replace(retrained=other)
    scene = prepare(sets, preset, seed=0, say=lambda *_, **__: None, begin=begin)
    monkeypatch.setattr(grids, "scene_of", lambda *_: (scene, {}))
    monkeypatch.setattr(relearning, "LOOKS", (1, 4))
    monkeypatch.setattr(relearning, "SHARES", (0.0, 0.5))
    with jax.numpy_dtype_promotion("standard"):
        yield grids.Setup(sets, 0, tmp_path, is_strict=False)


def test_every_attacker_attacks_both_models(setup):
    found = relearning.curves(setup, setup.task.original, setup.material("NPO (natural)").curvature)
    assert [len(points) for points in found.values()] == [4, 4, 2, 2]
    assert list(found) == ["Adam", "adapters", "knowing", "benign"]
    for points in found.values():
        assert all(abs(by["edited"] / by["retrained"] - 1) > 0.01 for by in points.values())
    # The more often rows are taught, the more is known of the others, which are of their kind.
    for by in ([found["Adam"][f"2 rows, {n} updates"][m] for n in (1, 4)] for m in MODELS):
        assert by[1] > by[0]

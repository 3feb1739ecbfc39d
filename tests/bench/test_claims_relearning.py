"""The script of the tuned attackers, on a toy: each attacks both models."""

import jax
import pytest

from jedit.data import generate_authors, pack
from jedit.recipes.scenes.question_answer import Model
from jedit.recipes.tofu.models import small_gpt
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import Sets, prepare
from tests.bench.claims import grids, relearning
from tests.bench.claims.natural import rewinding

MODELS = ("edited", "retrained")
ROWS = generate_authors(0, 12, 3)
KEPT = ROWS[6:30]
SIZE = Model(width=8, layers=1, heads=2, vocab=300, max_len=96)


@pytest.fixture
def setup(monkeypatch, tmp_path):
    sets = Sets(*(ROWS[6 * i : 6 * (i + 1)] for i in range(6)))
    preset = PRESETS["cpu"]._replace(authors=4, forgotten=2, questions=4, model=SIZE)
    begin = small_gpt(ROWS, SIZE, "float32", key=jax.random.key(0))
    other = small_gpt(ROWS, SIZE, "float32", key=jax.random.key(1)).params
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
    for by in ([found["Adam"][f"3 rows, {n} updates"][m] for n in (1, 4)] for m in MODELS):
        assert by[1] > by[0]


def test_a_rewind_takes_its_part_of_retrainings_steps(setup):
    rewind = rewinding(setup.scene, setup.sets, 0, 0.3, 0.5)
    rows = pack(setup.model.encode([(r.question, r.answer) for r in KEPT]), SIZE.max_len).batch
    epochs, size = PRESETS["cpu"].recipe.epochs[0], PRESETS["cpu"].recipe.batch_size
    assert rewind.steps == epochs * (len(rows.targets) // size) // 2 > 0
    assert rewind.share == 0.3

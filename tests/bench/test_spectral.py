"""The scripts of pruning and of RepSelect, each once at toy size."""

import types
from typing import Any

import jax
import numpy as np
import pytest

from jedit.core.paths import parameter_paths
from jedit.recipes.scenes.question_answer import Model
from tests.bench.claims import pruning, repselect, scenes


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_pruning_loses_what_was_learnt_by_heart_first(monkeypatch):
    """On labels of which some are random: the stated claim, at one mass."""
    monkeypatch.setattr(pruning, "MASSES", (0.9999, 0.997, 0.3))
    monkeypatch.setattr(pruning, "SHARES", (0.2, 0.95))
    monkeypatch.setattr(pruning, "BUDGETS", (0.1,))
    scene = pruning.digits(0, epochs=110)
    points = pruning.measured(scene, 0)
    (begin,) = points["untouched"]
    assert begin["by heart"] > 0.6
    assert begin["general"] > 0.8
    assert begin["by heart"] + begin["true labels"] <= 1
    gentle, middle, harsh = points["pruning, products"]
    assert gentle["by heart"] > middle["by heart"]
    lost = {name: 1 - middle[name] / begin[name] for name in ("by heart", "general")}
    assert lost["by heart"] > max(0.3, 3 * lost["general"])
    assert middle["true labels"] > begin["true labels"] + 0.1, "what is right comes back"
    assert harsh["general"] < 0.3
    assert pruning.kept_at(points, "smallest weights", -1.0) is None
    assert set(pruning.summary([points, points])) == set(points) - {"untouched"}
    cut = pruning.smallest_zero(scene.params, 0.5, "kernel")
    for (path, leaf), whole in zip(
        parameter_paths(cut), jax.tree.leaves(scene.params), strict=True
    ):
        share = float(np.mean(np.asarray(leaf) == 0))
        if path.endswith("kernel"):
            assert share == pytest.approx(0.5, abs=0.02)
        else:
            np.testing.assert_array_equal(leaf, whole)


def test_the_strings_are_what_the_gpt_is_asked_by_heart(monkeypatch):
    monkeypatch.setattr(pruning, "MODEL", Model(width=8, layers=1, heads=2, vocab=300, max_len=96))
    pruning._gpt.cache_clear()
    scene = pruning.gpt(0, epochs=1, authors=2, strings=3)
    pruning._gpt.cache_clear()
    inputs, targets = (np.asarray(x) for x in scene.by_heart[:2])
    counted = np.asarray(scene.by_heart.mask) > 0
    assert inputs.shape[0] == 3
    assert counted.sum(axis=1).tolist() == [24] * 3
    np.testing.assert_array_equal(inputs[:, 1:32], targets[:, :31])
    assert 0 <= pruning.accuracy(scene, scene.params, scene.by_heart) <= 1
    assert len(scene.tests["general"].targets) > 40


def test_each_method_is_attacked_at_the_matched_price(monkeypatch):
    monkeypatch.setattr(scenes, "MODEL", Model(width=24, layers=2, heads=2, vocab=300, max_len=96))
    scenes._gpt_of.cache_clear()
    for name, value in {"BUDGET": 10.0, "REFIT": 2, "TOP": 4}.items():
        monkeypatch.setattr(repselect, name, value)
    setup = repselect.setup(0, epochs=1, num_authors=5)
    scenes._gpt_of.cache_clear()
    rates = {"RepSelect": (0.3,), repselect.TRAINED: (0.3,), "MCU": (1e-3,), "RMU": (1e-3,)}
    found = repselect.measured(setup, rates=rates, steps=4, updates=2)
    assert list(found) == ["untouched", *rates]
    for name in rates:
        record = found[name]
        assert 0 < record["kl"] <= 10
        assert record["lasting"] == pytest.approx(record["after"] - found["untouched"]["after"])
        assert 0 < record["change in top"] < 1
        assert record["before"] != found["untouched"]["before"]
    assert found["RepSelect"]["before"] != found[repselect.TRAINED]["before"]
    compared = repselect.report([found, found])["compared"]
    pairs = {f"{a} - {n} x RMU" for a in ("RepSelect", repselect.TRAINED) for n in (1, 4)}
    assert set(compared) == pairs | {"MCU - 1 x RMU"}
    less = found["RepSelect"]["lasting"] - 4 * found["RMU"]["lasting"]
    assert compared["RepSelect - 4 x RMU"]["mean"] == pytest.approx(less)


def test_the_price_is_matched_where_a_run_passes_it(monkeypatch):
    """On a line whose KL is known, between two looks; and a run that never gets there stays."""
    monkeypatch.setattr(repselect, "kl", lambda _, params: float(params["w"] ** 2))
    scene: Any = types.SimpleNamespace(original={"w": np.float64(0)})
    looks = lambda *values: iter([{"w": np.float64(v)} for v in values])  # noqa: E731
    params, cost = repselect.at_budget(scene, looks(0.1, 0.9, 0.0))
    assert 0.098 < cost <= 0.1
    assert params["w"] == pytest.approx(np.sqrt(0.1), rel=0.02)
    assert repselect.at_budget(scene, looks(0.1, 0.2))[1] == pytest.approx(0.04)
    params, cost = repselect.at_budget(scene, looks(np.nan))
    assert (float(params["w"]), cost) == (0.0, 0.0)


def test_seeds_that_were_measured_are_read_and_not_run_again(monkeypatch, tmp_path, capsys):
    points = {
        "untouched": [{"strength": 0.0, "by heart": 1.0, "general": 0.8}],
        "pruning, products": [
            {"strength": 0.9, "by heart": 0.6, "general": 0.79},
            {"strength": 0.5, "by heart": 0.4, "general": 0.72},
        ],
    }
    given = ["--seeds", "2", "--scene", "digits", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["pruning", *given])
    monkeypatch.setitem(pruning.SCENES, "digits", lambda seed: seed)
    monkeypatch.setattr(pruning, "measured", lambda *_, **__: points)
    pruning.main(given)
    capsys.readouterr()
    monkeypatch.setattr(pruning, "measured", lambda *_, **__: pytest.fail("it was run again"))
    pruning.main(given)
    # Half is midway between 0.6 and 0.4: (0.79 + 0.72) / 2 of 0.8. No strength leaves a quarter.
    assert "| pruning, products | 0.944 ± 0 | never |" in capsys.readouterr().out

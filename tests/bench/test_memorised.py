"""The claims' scripts on memorisation and priming, each run once on a toy."""

import json

import numpy as np
import pytest

from tests.bench.claims import memorised_subspace, priming
from tests.bench.claims.evidence import kept


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_pruning_is_measured_against_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claim", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert memorised_subspace.main() == 0
    assert (tmp_path / "memorised_subspace.png").exists()
    first = capsys.readouterr().out
    record = json.loads((tmp_path / "memorised_subspace-0-quick.json").read_text())
    names = {row["method"] for row in record["points"]}
    assert {"untouched", "retrained", "pruned", "K-FADE", "SalUn 0.0001"} <= names
    # Read from its file the second time: nothing is trained.
    monkeypatch.setattr(memorised_subspace, "room", None)
    assert memorised_subspace.main() == 0
    assert capsys.readouterr().out == first


def test_priming_is_measured_under_every_cure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["claim", "--quick", "--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(priming, "STEPS", 4)
    monkeypatch.setattr(priming, "EVERY", 2)
    assert priming.main() == 0
    record = json.loads((tmp_path / "priming-0-quick.json").read_text())
    taught = record["cures"][priming.PLAIN]
    assert len(taught["fact"]) == 8
    assert len(taught["fact"][0]) == 2
    assert {"stepping stone", "natural steps of 0.001", "the top 8% alone"} <= set(record["cures"])
    assert "without the top 8%" in capsys.readouterr().out


def test_cures_are_compared_where_the_fact_is_known_alike():
    """Both pass through one priming by P of the fact; the plain one in longer strides.

    At the first look beyond the target their primings differ, though they are the same curve.
    """
    odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    prior, target = 1e-3, priming.TARGET

    def passing(facts, slope=1.0):
        logs = slope * (odds(np.asarray(facts)) - odds(prior))
        return {"fact": [facts, [1e-4] * 3], "priming": np.exp([logs, [0.0] * 3]).tolist()}

    plain, cure = passing([0.01, 0.05, 0.9]), passing([0.1, 0.2, 0.4])
    half = passing([0.02, 0.35, 0.5], slope=0.5)
    expected = odds(target) - odds(prior)
    for found, log in ((plain, expected), (cure, expected), (half, expected / 2)):
        at = priming.at_target(found, np.asarray([prior, 1e-5]))
        assert at[0] == pytest.approx(log)
        assert np.isnan(at[1])
    # Known already before the first look: between the prior and that look.
    early = passing([0.6, 0.7, 0.8])
    assert priming.at_target(early, np.asarray([prior, 1e-5]))[0] == pytest.approx(expected)
    cures = {priming.PLAIN: plain, "cure": cure, "half": half}
    record = {
        "prior": [prior, 1e-5],
        "cures": {n: {**numbers, "memorised": numbers["fact"]} for n, numbers in cures.items()},
    }
    assert priming.of_cure(record, "cure")["reached"] == 0.5
    assert priming.of_cure(record, "cure")["log_ratio"] == pytest.approx(0, abs=1e-12)
    assert priming.of_cure(record, "half")["log_ratio"] == pytest.approx(-expected / 2)


def test_a_seed_without_a_number_leaves_the_others_theirs():
    found = priming.over_seeds(
        [{"a": 1.0, "b": np.nan}, {"a": np.nan, "b": np.nan}, {"a": 2.0, "b": 1.0}]
    )
    assert (found["a"]["mean"], found["a"]["seeds"]) == (1.5, 2)
    assert np.isfinite(found["a"]["half_width"])
    assert (found["b"]["mean"], found["b"]["seeds"]) == (1, 1)


def test_what_was_made_at_other_settings_is_made_anew(tmp_path, capsys):
    path, made = tmp_path / "seeds" / "one.json", []

    def make():
        made.append(1)
        return {"number": len(made)}

    assert kept(path, {"rate": (1, 2)}, make)["number"] == 1
    assert kept(path, {"rate": (1, 2)}, make)["number"] == 1
    assert kept(path, {"rate": (1, 3)}, make)["number"] == 2
    assert "made at other settings" in capsys.readouterr().err


def test_a_best_point_keeps_the_accuracy():
    def row(method, strength, distance, accuracy):
        return {"method": method, "strength": strength, "distance": distance, "accuracy": accuracy}

    rows = [
        row("untouched", 0, 0.1, 0.9), row("retrained", 0, 0.6, 0.9),
        row("pruned", 1, 0.2, 0.88), row("pruned", 2, 0.3, 0.86), row("pruned", 3, 0.5, 0.5),
        row("SalUn 0.1", 1, 0.7, 0.9), row("SalUn 0.3", 1, 0.9, 0.9), row("other", 1, 0.6, 0.1),
    ]  # fmt: skip
    expected = {"untouched": 0, "retrained": 0, "pruned": 2, "SalUn 0.1": 1}
    assert memorised_subspace.chosen(rows) == expected

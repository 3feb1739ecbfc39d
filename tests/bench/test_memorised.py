"""The claims' scripts on memorisation and priming, each run once on a toy."""

import json

import numpy as np
import pytest

from tests.bench.claims import memorised_subspace, priming


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
    plain = {"fact": [[0.1, 0.4, 0.9], [0.0, 0.1, 0.5]], "priming": [[1, 2, 8], [1, 3, 4]]}
    cure = {"fact": [[0.1, 0.2, 0.3], [0.0, 0.0, 0.2]], "priming": [[1, 1, 1], [1, 1, 1]]}
    plain, cure = ({**numbers, "memorised": numbers["fact"]} for numbers in (plain, cure))
    record = {"prior": [1e-4, 1e-3], "cures": {priming.PLAIN: plain, "cure": cure}}
    assert priming.at_target(plain).tolist() == [2, 4]
    found = priming.of_cure(record, "cure")
    assert found["reached"] == 0.5
    assert found["log_ratio"] == pytest.approx(-np.log(2))  # the first fact alone, 1 over 2


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

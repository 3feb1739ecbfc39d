"""The claims' scripts on memorisation and priming, each run once on a toy."""

import json

import pytest

from tests.bench.claims import memorised_subspace


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


def test_a_best_point_keeps_the_accuracy():
    def row(method, strength, copies, accuracy):
        numbers = {"memorised": copies, "accuracy": accuracy, "frechet": 1}
        return {"method": method, "strength": strength, **numbers}

    rows = [
        row("untouched", 0, 1.0, 0.9), row("pruned", 1, 0.5, 0.88), row("pruned", 2, 0.1, 0.86),
        row("pruned", 3, 0.0, 0.5), row("SalUn 0.1", 1, 0.4, 0.9), row("SalUn 0.3", 1, 0.2, 0.9),
        row("other", 1, 0.0, 0.1),
    ]  # fmt: skip
    assert memorised_subspace.chosen(rows) == {"untouched": 0, "pruned": 2, "SalUn 0.3": 1}

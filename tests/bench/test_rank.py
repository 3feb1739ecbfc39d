"""The script of the leading eigenvectors, once at toy size."""

import json
import sys

import jax
import pytest

from tests.bench.claims import metric, rank


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_script_measures_effects_and_seconds(monkeypatch, tmp_path):
    given = ["rank", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(rank, "DAMPINGS", (0.1,))
    monkeypatch.setattr(metric, "BUDGETS", (1.0, 10.0, 100.0))
    rank.main()
    record = json.loads((tmp_path / "rank.json").read_text())
    names = {"all", "k = 8", "k = 8, one pass", "k = 8, two passes"}
    assert set(record["effects"]) == names
    assert record["effects"]["all"]["log ratio"]["mean"] == 0
    for name in ("one pass", "two passes"):
        row, base = record["effects"][f"k = 8, {name}"], record["effects"]["k = 8"]
        (found,) = row["log ratio to the iterated"]
        (of_all,), (of_base,) = (x["log ratio at each damping"] for x in (row, base))
        assert found["mean"] == pytest.approx(of_all["mean"] - of_base["mean"], abs=1e-9)
    shares = record["speed"]["share of the trace in the leading ones"]
    # No eight directions hold more than the leading ones, and a second pass comes closer to them.
    assert shares["one pass"] < shares["two passes"] <= shares["eigh"] + 1e-6
    assert shares["orthogonal iteration"] == pytest.approx(shares["eigh"], rel=5e-3)
    # Kept by seed: a second call measures nothing anew.
    monkeypatch.setattr(rank, "seed_effects", lambda *_: pytest.fail("made anew"))
    monkeypatch.setattr(rank, "speed", lambda *_: pytest.fail("made anew"))
    rank.main()

"""The vision claims' scripts run once, at toy size, and their sums are right."""

import json
import sys

import jax
import numpy as np
import pytest

from tests.bench.claims import coupling, vision

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax mixes, its counter and its rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(monkeypatch, module, *given):
    monkeypatch.setattr(sys, "argv", ["claim", *map(str, given)])
    module.main()


def test_vision_writes_differences_seed_by_seed(tmp_path, monkeypatch, capsys):
    run(monkeypatch, vision, "--quick", "--seeds", 2, "--data", tmp_path / "no", "--out", tmp_path)
    found = json.loads((tmp_path / "vision.json").read_text())
    assert set(found["differences"]) == {"random", "class"}
    for over in found["differences"].values():
        assert set(over) == {"fine-tune less untouched", "engram less untouched"}
        assert all(len(x["values"]) == 2 for x in over.values())
    assert "| class: difference of the average gaps | points |" in capsys.readouterr().out


def test_differences_are_paired_by_seed():
    gaps = {"untouched": {0: 5.0, 1: 9.0}, "UAM": {0: 4.0, 1: 7.0}, "ROSU": {0: 1.0, 1: 6.0}}
    found = vision.differences(gaps)
    assert found["ROSU less UAM"]["values"] == [-3.0, -1.0]
    assert found["UAM less untouched"]["values"] == [-1.0, -2.0]
    assert "SalUn less random label" not in found


def test_coupling_runs_and_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coupling, "RADII", (0.3,))
    run(monkeypatch, coupling, "--quick", "--seeds", 1, "--epochs", 1, "--out", tmp_path)
    lines = json.loads((tmp_path / "coupling" / "seed0.json").read_text())["lines"]
    assert [line["share"] for line in lines] == [0, 1]
    assert lines[0]["cos"] < lines[1]["cos"]  # images like those that are kept
    assert all(np.shape(line["paths"]["ROSU"]) == (3 * 4, 2) for line in lines)
    capsys.readouterr()
    monkeypatch.setattr(coupling, "paths_of", None)  # a second run makes nothing
    run(monkeypatch, coupling, "--quick", "--seeds", 1, "--epochs", 1, "--out", tmp_path)
    assert "held-out retain loss saved by ROSU" in capsys.readouterr().out


def test_the_advantage_is_at_like_forgetting():
    """UAM reaches 2 nats above the start, ROSU 1; compared is where both are 0.5 above it."""
    paths = {"UAM": [[1.2, 0.1], [1.6, 0.4], [3.0, 0.9]], "ROSU": [[1.4, 0.1], [2.0, 0.3]]}
    found = coupling.advantage(1.0, paths)
    assert found["level"] == pytest.approx(0.5)
    assert found["saved"] == pytest.approx(0.4 - 0.3)
    assert coupling.advantage(5.0, paths) is None
    assert coupling.advantage(1.0, paths, 0.9)["saved"] == pytest.approx(0.9 - 0.3)
    assert coupling.advantage(1.0, paths, 1.1) is None
    assert coupling.advantage(1.0, paths | {"ROSU": [[np.nan, np.nan]]}) is None


def test_the_slope_is_over_the_seeds():
    def line(share, cos, saved):
        paths = {"UAM": [[2.0, 1.0 + saved]], "ROSU": [[2.0, 1.0]]}
        found = {"saved": saved, "level": 0.5}
        return {"share": share, "cos": cos, "start": 1.0, "paths": paths, "found": found}

    seeds = [
        [line(0, 0.0, 1.0), line(0.5, 0.5, 1.0 + 0.5 * k), line(1, 1.0, 1.0 + k)] for k in (2, 4)
    ]
    found = coupling.summary(seeds)
    assert found["slopes"]["None"]["values"] == pytest.approx([2, 4])
    assert found["slopes"]["0.5"]["values"] == pytest.approx([2, 4])
    assert found["table"][2]["saved"]["mean"] == pytest.approx(4)

"""The script of refusals, streams and neighbours on a toy: what it measures, not what it finds."""

import json

import jax
import numpy as np
import pytest

from jedit.data import generate_authors
from tests.bench.claims import refusal


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_an_author_is_of_one_region():
    rows = generate_authors(3, 24, 1)
    found = [refusal.region_of(str(row.fields["author"])) for row in rows]
    # Every region has its share of the authors.
    assert np.bincount(found, minlength=8).tolist() == [3] * 8


def test_every_claim_is_measured_once(tmp_path, monkeypatch, capsys):
    refusal.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "refusal.json").read_text())["runs"]
    (rule,), (fit,), (melu,) = found["rule"], found["fit"], found["melu"]
    assert {"untouched", "rejection tuning", "RULE"} < set(rule)
    assert sum(name.startswith("IdkDPO") for name in rule) == 2
    for row in rule.values():
        for name in ("untaught", "paraphrased", "kept"):
            assert 0 <= row[f"{name} refused"] <= 1
    assert rule["untouched"]["kept refused"] == 0
    assert set(fit) >= {"filter", "untouched", "FIT, 0.0003", "NPO, 0.0003"}
    assert all(
        0 <= fit[name]["F.D."] <= 1 for name in fit if "filter" not in name or name[0] == "F"
    )
    assert melu["scene"]["neighbour authors"] >= 0
    assert "| RULE |" in capsys.readouterr().out

    def refuse(*_):
        raise AssertionError("what is on the disk is not measured again")

    monkeypatch.setattr(refusal, "Scene", refuse)
    refusal.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])

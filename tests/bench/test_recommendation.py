"""The recommendation claim's script on a toy: what it measures, not what it finds."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.bench.claims import recommendation


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """What optax's Adam mixes, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_price_is_read_off_between_two_looks():
    points = {0: (1.0, 0.0), 1: (2.0, 0.1), 2: (4.0, 0.5), 3: (9.0, 1.0)}

    def judge(params):
        loss, kl = points[params or 0]
        return SimpleNamespace(forget_nll=loss, heldout_kl=kl)

    def rank(params):
        return {"looked": params}

    path = [(10.0 * i, i) for i in (1, 2, 3)]
    found = recommendation.price(iter(path), judge, rank, 2.5)
    assert found == {"reached": True, "kl": pytest.approx(0.2), "strength": 20.0, "looked": 2}
    short = recommendation.price(iter(path), judge, rank, 10.0)
    assert short == {
        "reached": False, "strength": 30.0, "forget_nll": 9.0, "kl": 1.0, "looked": 3,
    }  # fmt: skip
    points[2] = (np.nan, 0.5)
    lost = recommendation.price(iter(path), judge, rank, 10.0)
    assert (lost["forget_nll"], lost["looked"]) == (2.0, 1)


def test_the_script_runs_once_and_then_reads(tmp_path, monkeypatch, capsys):
    few = ("LoRA, NPO", "REGLU, IHL", "CURE", "GradDiff")
    quick = recommendation.QUICK._replace(looks=(4, 8), rates=(3e-3,), methods=few)
    monkeypatch.setattr(recommendation, "QUICK", quick)
    monkeypatch.setattr(recommendation, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(recommendation, "BUDGETS", (0.1,))
    monkeypatch.setattr(recommendation, "STRENGTHS", (8.0,))
    command = ["recommendation", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    recommendation.main()
    written = json.loads((tmp_path / "recommendation.json").read_text())
    (seed,) = written["seeds"]
    assert seed["target"] > seed["models"]["untouched"]["forget_nll"]
    assert set(seed["methods"]) == set(written["methods"])
    assert set(seed["methods"]) == {*few, "U-CAN", "K-FADE"}
    for one in seed["methods"].values():
        assert one["kl"] > 0
        assert 0 <= one["retain_next_ndcg"] <= 1
    capsys.readouterr()
    monkeypatch.setattr(recommendation, "one_seed", None)  # what is done is not run again
    recommendation.main()
    assert "| REGLU, IHL |" in capsys.readouterr().out

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
    # A quarter of the way between the roots, as a KL grows from zero.
    kl = (0.75 * 0.1**0.5 + 0.25 * 0.5**0.5) ** 2
    assert found == {"reached": True, "kl": pytest.approx(kl), "strength": 20.0, "looked": 2}
    short = recommendation.price(iter(path), judge, rank, 10.0)
    assert short == {
        "reached": False, "strength": 30.0, "forget_nll": 9.0, "kl": 1.0, "looked": 3,
    }  # fmt: skip
    points[2] = (np.nan, 0.5)
    lost = recommendation.price(iter(path), judge, rank, 10.0)
    assert (lost["forget_nll"], lost["looked"]) == (2.0, 1)


def test_what_never_arrives_stands_apart_and_attenuation_is_judged_whole():
    def one(reached, kl, ndcg, recall):
        return {"reached": reached, "kl": kl, "retain_next_ndcg": ndcg, "forget_recall": recall}

    models = {
        "untouched": {"retain_next_ndcg": 0.4, "forget_recall": 0.9},
        "retrained": {"retain_next_ndcg": 0.4, "forget_recall": 0.5},
    }
    seeds = [
        {
            "models": models,
            "methods": {"GradDiff": one(reached, kl, ndcg, 0.5)},
            "ucan": {"8": one(None, 0.1, 0.38, 0.6), "32": one(None, 0.3, kept, 0.5)},
        }
        for reached, kl, ndcg, kept in ((True, 0.2, 0.3, 0.37), (False, 0.9, 0.1, 0.35))
    ]
    found = recommendation.verdicts(seeds)
    row = found["methods"]["GradDiff"]
    assert row["arrived"] == 1
    assert row["at_target"]["kl"]["mean"] == 0.2
    assert row["at_target"]["ndcg_kept"]["mean"] == pytest.approx(0.75)
    assert row["last_look_of_others"]["ndcg_kept"]["mean"] == pytest.approx(0.25)
    assert [seed["holds"] for seed in found["ucan"]] == [True, False]
    assert [seed["best"]["strength"] for seed in found["ucan"]] == ["32", "32"]


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
    assert set(seed["ucan"]) == {"8"}
    (judged,) = written["ucan"]
    assert judged["retrained_recall"] == seed["models"]["retrained"]["forget_recall"]
    capsys.readouterr()
    monkeypatch.setattr(recommendation, "one_seed", None)  # what is done is not run again
    recommendation.main()
    assert "| REGLU, IHL" in capsys.readouterr().out
    monkeypatch.setattr(recommendation, "RANK", 4)  # other settings are
    with pytest.raises(TypeError):
        recommendation.main()

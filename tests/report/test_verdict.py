"""The verdict: each thing that can have happened to a model is told from the others, in numbers."""

import math
import re

import pytest
from scipy import stats

from jedit.report import Comparison, Curve, Method, NumJudged, Outcome, Point, verdict
from jedit.report.verdict import is_costly, wilson

KEPT = {"retain_nll": 0.1, "retain_accuracy": 0.99, "heldout_nll": 0.2}


def point(forget_nll, forget_accuracy, *, kl=0.01, heldout=0.98, near=1.0, **more):
    return Point(
        strength=1.0,
        edit_seconds=0.5,
        forget_nll=forget_nll,
        forget_accuracy=forget_accuracy,
        heldout_accuracy=heldout,
        heldout_kl=kl,
        forget_kl=near,
        **KEPT,
        **more,
    )


def comparison(*points, original=None, retrained=None, **more):
    return Comparison(
        name="toy",
        title="Toy",
        notes=(),
        num_rows={},
        settings={},
        seconds={},
        kl_budget=0.05,
        original=original or point(0.01, 1.0, kl=0.0, near=5.0),
        retrained=retrained or point(2.0, 0.2, near=0.0),
        methods=(Method("NPO", "", "steps (of 8 rows)", {}), Method("GA", "", "steps", {})),
        curves=(Curve("NPO", {}, points), Curve("GA", {}, (point(9.0, 0.0, kl=3.0, near=9.0),))),
        **{"num_judged": NumJudged(50, 400), **more},
    )


def attacked(edited, *, untouched=0.9, retrained=0.1, known=0.15):
    rows = {"untouched": (0.95, untouched), "NPO": (known, edited), "retrained": (0.1, retrained)}
    names = ("forget_Q_A_Prob", "relearned_harmful")
    return {name: dict(zip(names, row, strict=True)) for name, row in rows.items()}


FORGOT = point(1.8, 0.22)
CASES = {
    "forgot and kept": (comparison(FORGOT), Outcome.FORGOT),
    "forgot, but cost accuracy": (
        comparison(FORGOT._replace(heldout_accuracy=0.9)),
        Outcome.COSTLY,
    ),
    "a loss within chance is none": (
        comparison(FORGOT._replace(heldout_accuracy=0.97)),
        Outcome.FORGOT,
    ),
    "did not forget": (comparison(point(0.3, 0.95)), Outcome.REMEMBERS),
    "in part by the loss": (comparison(point(0.9, 0.22)), Outcome.IN_PART),
    "in part by the accuracy": (comparison(point(1.8, 0.5)), Outcome.IN_PART),
    "in part by the test": (comparison(FORGOT._replace(forget_quality=1e-4)), Outcome.IN_PART),
    "passes the test": (comparison(FORGOT._replace(forget_quality=0.4)), Outcome.FORGOT),
    "nothing within the budget": (comparison(point(1.8, 0.22, kl=0.06)), Outcome.NO_EDIT),
    "attacks bring it back": (comparison(FORGOT, leaderboard=attacked(0.5)), Outcome.RETURNS),
    "attacks fail": (comparison(FORGOT, leaderboard=attacked(0.16)), Outcome.FORGOT),
    "an attack finds what is told unasked": (
        comparison(FORGOT, leaderboard=attacked(0.5, known=0.49)),
        Outcome.FORGOT,
    ),
    "nothing to forget": (comparison(FORGOT, retrained=point(0.01, 1.0)), Outcome.NO_TRACE),
    "hardly learnt": (
        comparison(point(4.9, 0.1), original=point(4.4, 0.2, kl=0.0), retrained=point(5.1, 0.1)),
        Outcome.NO_TRACE,
    ),
}


@pytest.mark.parametrize(("given", "outcome"), CASES.values(), ids=CASES)
def test_what_happened_is_told_apart(given, outcome):
    assert verdict(given).outcome is outcome


def test_lost_utility_is_a_cost():
    original = point(0.01, 1.0, kl=0.0, near=5.0, model_utility=0.6, forget_quality=1e-9)
    edited = FORGOT._replace(model_utility=0.5, forget_quality=0.4)
    given = comparison(edited, original=original, utility_share=0.8)
    assert verdict(given).outcome is Outcome.COSTLY
    kept = comparison(edited._replace(model_utility=0.59), original=original, utility_share=0.8)
    assert verdict(kept).outcome is Outcome.FORGOT
    assert "Model Utility goes from 0.600 to 0.500" in verdict(given).sentence
    assert "p = 0.400" in verdict(given).sentence


def test_the_sentence_holds_the_numbers():
    text = verdict(comparison(FORGOT, leaderboard=attacked(0.5))).sentence
    assert text.startswith("NPO (steps 1) edited the model: the loss on the 50 forget rows goes ")
    for part in (
        "from 0.010 to 1.80 nats",
        "accuracy goes from 100% to 22%, where a model that never saw them has 2.00 and 20%",
        "0.010 nats of KL on 400 held-out retain rows, whose accuracy stays at 98%",
        "from 0.150 to 0.500 (untouched 0.900, retrained 0.100",
        "best of 2 tried on one seed",
    ):
        assert part in text
    way = (math.exp(-0.01) - math.exp(-1.8)) / (math.exp(-0.01) - math.exp(-2.0))
    assert f"{way:.0%} of the way" in text
    low, high = stats.binomtest(11, 50).proportion_ci(method="wilson")
    assert f"{100 * low:.3g}–{100 * high:.3g}%" in text
    assert text.count(".") - len(re.findall(r"\d\.\d", text)) == 1  # one sentence


def test_what_was_not_measured_is_not_claimed():
    assert "no attack was run" in verdict(comparison(FORGOT)).sentence
    assert "p =" not in verdict(comparison(FORGOT)).sentence
    found = verdict(comparison(point(1.8, 0.22, kl=0.06)))
    assert found.point is None
    assert "there is no point within 0.05 nats" in found.sentence
    assert "would have cost 0.060 nats" in found.sentence
    assert "best of" not in found.sentence


def test_an_attack_that_tells_nothing_is_left_out():
    same = attacked(0.5, untouched=0.12)  # under it the retrained model knows as much
    found = verdict(comparison(FORGOT, leaderboard=same))
    assert found.attack is None
    assert found.outcome is Outcome.FORGOT
    assert "none of 1 attacks tells even" in found.sentence


@pytest.mark.parametrize(("hits", "num"), [(0, 7), (3, 7), (7, 7), (211, 400)])
def test_the_interval_is_scipys(hits, num):
    expected = stats.binomtest(hits, num).proportion_ci(method="wilson")
    assert wilson(hits / num, num) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_loss_of_accuracy_that_chance_explains_is_no_cost():
    """At the least loss that counts, two samples of that size differ in about 95 of 100 tables."""
    num = 400
    given = comparison(FORGOT, num_judged=NumJudged(50, num))
    counted = [n for n in range(392) if is_costly(given, point(1.8, 0.2, heldout=n / num))]
    table = [[392, num - 392], [max(counted), num - max(counted)]]
    chance = stats.chi2_contingency(table, correction=False).pvalue
    assert 0.03 < chance < 0.05

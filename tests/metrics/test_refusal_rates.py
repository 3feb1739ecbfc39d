"""Rates of refusal against loops over questions, and the area against SciPy's rank test."""

import numpy as np
import pytest
import scipy.stats

from jedit.metrics import refusal_curve, refusal_rates


def questions(seed=3, number=40):
    """Scores with ties, and what is to be refused."""
    rng = np.random.default_rng(seed)
    return np.round(rng.random(number), 1), rng.random(number) < 0.3


def test_the_curve_is_a_loop_over_thresholds_and_its_area_the_rank_test():
    scores, wanted = questions()
    curve = refusal_curve(scores, wanted)
    assert curve.thresholds[0] == np.inf
    assert set(curve.thresholds[1:]) == set(scores)
    for t, tpr, fpr in zip(*curve[:3], strict=True):
        refused = [s >= t for s in scores]
        for rate, kind in ((tpr, True), (fpr, False)):
            mine = [r for r, w in zip(refused, wanted, strict=True) if w == kind]
            assert rate == pytest.approx(sum(mine) / len(mine))
    u = scipy.stats.mannwhitneyu(scores[wanted], scores[~wanted]).statistic
    assert curve.area == pytest.approx(u / (wanted.sum() * (~wanted).sum()))
    # The same area below the line through the points.
    assert curve.area == pytest.approx(
        np.trapezoid(curve.true_positive_rates, curve.false_positive_rates)
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 1.0])
def test_a_threshold_keeps_its_share_and_the_next_lower_one_does_not(share):
    scores, wanted = questions()
    curve = refusal_curve(scores, wanted)
    found = curve.threshold_at(share)
    assert np.mean(scores[~wanted] >= found) <= share
    lower = curve.thresholds[curve.thresholds < found]
    if len(lower):
        assert np.mean(scores[~wanted] >= lower[0]) > share
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
        curve.threshold_at(1.5)


def test_rates_are_by_group_in_the_order_of_the_questions():
    got = refusal_rates([True, False, True, True], ["poem", "novel", "poem", "novel"])
    assert list(got.items()) == [("poem", 1.0), ("novel", 0.5)]
    with pytest.raises(ValueError, match="one group per question, got 1"):
        refusal_rates([True, False], ["poem"])


@pytest.mark.parametrize(
    ("scores", "wanted", "said"),
    [
        ([0.1, np.nan], [True, False], "1 NaN"),
        ([0.1, 0.2], [True], "one shape"),
        ([0.1, 0.2], [True, True], "of 2 questions 2 are to be refused"),
    ],
)
def test_what_has_no_curve_is_refused(scores, wanted, said):
    with pytest.raises(ValueError, match=said):
        refusal_curve(scores, wanted)

"""Estimates of an audit against formulas, known answers and simulation."""

import math

import numpy as np
import pytest

from jedit import metrics
from jedit.recipes.audit.estimates import (
    Compared,
    auc_difference,
    auc_of,
    bootstrapped,
    comeback_of,
    gap_of,
    left_of,
    mean_of,
    ratio_of,
)
from jedit.report.verdict import wilson


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_a_mean_has_the_interval_of_its_standard_error(rng):
    values = rng.normal(2.0, 0.7, 400)
    found = mean_of(values)
    error = values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.15)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.15)
    assert found.num_rows == 400
    wide = mean_of(values, level=0.999)
    assert wide.high - wide.low == pytest.approx(2 * 3.29 * error, rel=0.2)


def test_rows_that_are_all_alike_are_not_certain():
    for value in (0.0, 1.0):
        found = mean_of(np.full(20, value))
        assert (found.low, found.high) == tuple(wilson(value, 20))
        assert found.high - found.low > 0.15
    assert math.isnan(mean_of(np.array([0.3])).low)
    assert mean_of(np.zeros(20), is_share=False) == (0, 0, 0, 20)


def test_a_share_that_is_left_by_hand():
    base, edited = np.array([0.9, 0.7, 0.8, 0.6]), np.array([0.3, 0.1, 0.2, 0.2])
    retrained = np.array([0.1, 0.1, 0.05, 0.15])
    found = left_of(Compared(base, edited, retrained))
    assert found.value == pytest.approx((0.2 - 0.1) / (0.75 - 0.1))
    assert found.low < found.value < found.high
    unseen_base, unseen = np.array([0.2, 0.1, 0.3]), np.array([0.1, 0.15, 0.2])
    found = left_of(Compared(base, edited, None, unseen_base, unseen))
    assert found.value == pytest.approx((0.2 - 0.15) / (0.75 - 0.2))
    assert found.num_rows == 3
    # A retrained model answers for the same rows, so it goes first.
    both = left_of(Compared(base, edited, retrained, unseen_base, unseen))
    assert both.value == pytest.approx((0.2 - 0.1) / (0.75 - 0.1))
    assert left_of(Compared(base, edited)) is None
    assert gap_of(Compared(base, edited, None, unseen_base, unseen)).value == pytest.approx(0.55)
    with pytest.raises(ValueError, match="no retrained model"):
        gap_of(Compared(base, edited))


def test_nothing_said_in_ten_rows_is_not_nothing_for_certain():
    base = np.linspace(0.5, 0.9, 10)
    found = left_of(Compared(base, np.zeros(10), np.zeros(10)))
    assert found.value == 0
    assert found.high == pytest.approx(wilson(0.0, 10).high / 0.7)


def test_a_share_covers_the_truth_as_often_as_it_says(rng):
    hits = 0
    for _ in range(60):
        base, edited = rng.beta(8, 2, 40), rng.beta(2, 8, 40)
        unseen, other = rng.beta(1, 9, 40), rng.beta(1, 9, 40)
        found = left_of(Compared(base, edited, None, other, unseen))
        hits += found.low <= 1 / 7 <= found.high
    # 95 of 100; five and more misses of 60 beyond the mean are three standard errors.
    assert hits >= 52


def test_what_comes_back_is_less_what_comes_to_those_that_never_knew():
    base, edited, never = np.full(6, 0.8), np.full(6, 0.1), np.full(6, 0.1)
    known = Compared(base, edited, never)
    after = np.linspace(0.35, 0.45, 6)
    assert comeback_of(known, after).value == pytest.approx(0.3 / 0.7)
    also = np.full(6, 0.25)
    assert comeback_of(known, after, also).value == pytest.approx((0.3 - 0.15) / 0.7)
    chosen = np.array([5, 1])
    part = comeback_of(known, after[chosen], also[chosen], chosen=chosen)
    assert part.value == pytest.approx((after[chosen].mean() - 0.1 - 0.15) / 0.7)
    # An edit that went too far is no worse for coming back to what never knew.
    deep = Compared(base, np.full(6, 0.02), never)
    assert comeback_of(deep, also, also).value == pytest.approx(0.0)
    # Unseen rows stand for it in the same way.
    unseen = Compared(base, edited, None, np.full(3, 0.15), np.full(3, 0.1))
    found = comeback_of(unseen, after, np.full(3, 0.25))
    assert found.value == pytest.approx((0.3 - 0.15) / 0.65)
    # What the edit had left anyway is no comeback: the gains differ by .2 - .15.
    half = Compared(base, np.full(6, 0.2), never)
    assert comeback_of(half, after, also).value == pytest.approx(0.05 / 0.7)
    half = half._replace(retrained=None, unseen_base=np.full(3, 0.15), unseen=np.full(3, 0.1))
    assert comeback_of(half, after, np.full(3, 0.25)).value == pytest.approx(0.05 / 0.65)
    # Without either it is of what the edit took.
    assert comeback_of(Compared(base, edited), after).value == pytest.approx(0.3 / 0.7)


def test_what_unseen_rows_gain_is_of_the_same_rows(rng):
    # Each of them gains the same, however far apart they are: no doubt is in the gain.
    unseen = rng.uniform(0.1, 0.4, 30)
    known = Compared(np.full(30, 0.9), np.full(30, 0.4), None, np.full(30, 0.1), unseen)
    found = comeback_of(known, np.full(30, 0.6), unseen + 0.1)
    assert found.value == pytest.approx(0.1 / 0.8)
    assert found.high - found.low < 1e-6


def test_an_areas_ends_are_where_its_error_reaches(rng):
    known, unseen = rng.normal(0, 1, 50), rng.normal(1, 1, 30)
    found = auc_of(known, unseen)
    assert found.value == metrics.membership_auc(known, unseen)
    assert found.low < found.value < found.high
    for end in (found.low, found.high):
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        # Hanley and McNeil's variance with both sizes put to their mean, as Newcombe has it.
        size = (50 + 30) / 2 - 1
        variance = end * (1 - end) + size * (q1 - end**2) + size * (q2 - end**2)
        error = math.sqrt(variance / (50 * 30))
        assert abs(end - found.value) == pytest.approx(1.959964 * error, rel=1e-4)


def test_a_perfect_attack_on_few_rows_is_not_certain():
    found = auc_of(np.zeros(4), np.ones(4))
    assert found.value == 1
    assert found.high == 1
    assert 0.4 < found.low < 0.8
    other = auc_of(np.ones(4), np.zeros(4))
    assert other.low == 0
    assert other.high == pytest.approx(1 - found.low)
    assert auc_of(np.array([np.nan, 1.0]), np.array([0.0, 2.0])).value == pytest.approx(0.25)


def test_chance_is_within_the_interval_of_chance(rng):
    hits = 0
    for _ in range(200):
        found = auc_of(rng.normal(size=25), rng.normal(size=40))
        hits += found.low <= 0.5 <= found.high
    assert hits >= 180


def test_a_difference_of_areas_is_that_of_the_two(rng):
    ours, others = rng.normal(0, 1, 40), rng.normal(1, 1, 35)
    theirs = (rng.normal(0, 1, 40), rng.normal(0, 1, 35))
    found = auc_difference(ours, others, theirs)
    expected = metrics.membership_auc(ours, others) - metrics.membership_auc(*theirs)
    assert found.value == pytest.approx(expected)
    assert found.low > 0
    same = auc_difference(ours, others, (ours, others))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_columns_of_a_row_are_drawn_together(rng):
    one = rng.normal(size=200)
    found = bootstrapped(lambda x: (x[0] - x[1]).mean(-1), [np.stack([one, one + 3])])
    assert (found.low, found.high) == (pytest.approx(-3), pytest.approx(-3))
    assert ratio_of(2 * np.abs(one), np.abs(one)).low == pytest.approx(2)

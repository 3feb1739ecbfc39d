"""The forget ratio: known answers; its interval against a bootstrap, Fieller and its promise."""

import numpy as np
import pytest
from scipy import stats

from jedit.metrics import forget_ratio


def rows(both, lost, gained, neither):
    """Which rows are right before and after, by how many of each kind there are."""
    before = np.repeat([1, 1, 0, 0], [both, lost, gained, neither])
    after = np.repeat([1, 0, 1, 0], [both, lost, gained, neither])
    return before, after


def test_it_is_the_share_of_what_was_learnt():
    # 90 right before, 60 after, of 100; guessing has 25.
    found = forget_ratio(*rows(55, 35, 5, 5), chance=0.25)
    assert found.value == pytest.approx((0.90 - 0.60) / (0.90 - 0.25))
    assert forget_ratio(*rows(80, 0, 0, 20), chance=0.5).value == 0
    assert forget_ratio(*rows(0, 100, 0, 0), chance=0.25).value == pytest.approx(1 / 0.75)
    assert forget_ratio(*rows(60, 0, 20, 20), chance=0.5).value == pytest.approx(-2)


def test_the_interval_is_that_of_a_bootstrap_of_the_pairs():
    before, after = rows(300, 120, 30, 50)

    def ratio(a, b, axis=-1):
        return (a.mean(axis=axis) - b.mean(axis=axis)) / (a.mean(axis=axis) - 1 / 3)

    drawn = stats.bootstrap(
        (before, after),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=0.9,
        random_state=np.random.default_rng(0),
        method="percentile",
    ).confidence_interval
    found = forget_ratio(before, after, chance=1 / 3, confidence=0.9)
    np.testing.assert_allclose(found[1:], drawn, atol=0.01)


def test_the_ends_are_where_fieller_says():
    """At an end r, the mean of d - r e is z standard errors from 0: by hand on the added cells."""
    before, after = rows(40, 31, 9, 13)
    chance, confidence = 0.4, 0.8
    found = forget_ratio(before, after, chance=chance, confidence=confidence)
    # Two copies of every row and one of each kind are half a row of each added.
    kinds = ([1, 1, 0, 0], [1, 0, 1, 0])
    many = [np.append(np.repeat(x, 2), y) for x, y in zip((before, after), kinds, strict=True)]
    d, e = many[0] - many[1], many[0] - chance
    z = stats.norm.ppf(0.5 + confidence / 2)
    for end in found[1:]:
        rest = d - end * e
        assert abs(rest.mean()) == pytest.approx(z * rest.std() / np.sqrt(len(before) + 2))
    assert found.low < found.value < found.high


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.05, 0.15), (0.97, 0.01, 0.01, 0.01)])
def test_the_interval_holds_the_truth_as_often_as_it_says(shares):
    rng, chance, draws = np.random.default_rng(1), 0.5, 2000
    truth = (shares[1] - shares[2]) / (shares[0] + shares[1] - chance)
    held = 0
    for counts in rng.multinomial(120, shares, size=draws):
        _, low, high = forget_ratio(*rows(*counts), chance=chance)
        held += low <= truth <= high
    error = np.sqrt(0.95 * 0.05 / draws)
    assert held / draws > 0.95 - 4 * error
    # Where most rows agree it is on the safe side.
    assert held / draws < (0.975 if max(shares) < 0.9 else 1)


def test_rows_that_all_go_one_way_are_not_certain():
    for few, many in ((rows(10, 0, 0, 0), rows(1000, 0, 0, 0)),):
        ends = [forget_ratio(*x, chance=0.5) for x in (few, many)]
        assert ends[0].value == ends[1].value == 0
        assert ends[0].low < -0.05 < ends[1].low < 0 < ends[1].high < 0.05 < ends[0].high


def test_a_task_that_was_never_learnt_has_no_ratio():
    found = forget_ratio(*rows(25, 25, 25, 25), chance=0.5)
    assert np.isnan(found.value)
    assert found[1:] == (-np.inf, np.inf)
    # Better than guessing, but by less than the rows can tell.
    found = forget_ratio(*rows(6, 0, 0, 5), chance=0.5)
    assert found.value == 0
    assert found[1:] == (-np.inf, np.inf)


def test_mistakes_are_refused():
    right = np.ones(3)
    with pytest.raises(ValueError, match="before has 3 rows and after 2"):
        forget_ratio(right, right[:2], chance=0.5)
    with pytest.raises(ValueError, match=r"before must be \(n,\)"):
        forget_ratio(right[:0], right, chance=0.5)
    with pytest.raises(ValueError, match="after must say right"):
        forget_ratio(right, 0.5 * right, chance=0.5)
    with pytest.raises(ValueError, match="chance"):
        forget_ratio(right, right, chance=1.0)
    with pytest.raises(ValueError, match="confidence"):
        forget_ratio(right, right, chance=0.5, confidence=1.0)

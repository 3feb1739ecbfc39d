"""The aggregates against SciPy's harmonic mean of numbers made by their definitions."""

import numpy as np
import pytest
import scipy.stats

from jedit.metrics import (
    memorization_score,
    overall_score,
    privacy_score,
    truth_ratio,
    utility_score,
)

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")


def test_memorization_from_the_losses():
    right, wrong = np.array([0.5, 2.0, 1.1]), np.array([[1.0, 3.0], [0.2, 0.9], [1.5, 4.0]])
    p_right, p_wrong = np.exp(-right), scipy.stats.gmean(np.exp(-wrong), axis=1)
    known = np.mean(p_right / (p_right + p_wrong))
    expected = scipy.stats.hmean([1 - 0.3, 1 - 0.6, 1 - p_right.mean(), 1 - known])
    found = memorization_score(0.3, 0.6, p_right.mean(), truth_ratio(right, wrong))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # A destroyed model holds the wrong answers infinitely likelier, one that knows them all has 0.
    assert memorization_score(0.0, 0.0, 0.0, [np.inf, np.inf]) == 1
    assert memorization_score(0.3, 1.0, 0.2, [0.4]) == 0


def test_privacy_is_nearness_to_the_retrained():
    aucs = dict(zip(ATTACKS, (0.9, 0.4, 0.55, 0.7), strict=True))
    retrained = dict(zip(ATTACKS, (0.5, 0.45, 0.55, 0.6), strict=True))
    shares = [1 - 0.4 / 0.5, 1 - 0.05 / 0.45, 1, 1 - 0.1 / 0.6]
    np.testing.assert_allclose(privacy_score(aucs, retrained), scipy.stats.hmean(shares))
    assert privacy_score(retrained, retrained) == 1
    assert privacy_score({**aucs, "loss": 1.0}, retrained) == 0  # twice the retrained one's
    assert privacy_score({"loss": 1.0}, {"loss": 0.4}) == 0  # more than twice: clipped


def test_utility_and_overall():
    np.testing.assert_allclose(utility_score(0.45, 0.6), 0.75)
    assert utility_score(0.7, 0.6) == 1
    np.testing.assert_allclose(overall_score(0.2, 0.9, 0.6), scipy.stats.hmean([0.2, 0.9, 0.6]))
    assert overall_score(0.2, 0.0, 0.6) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memorization_score(1.2, 0.5, 0.5, [1.0]), "extraction_strength"),
        (lambda: memorization_score(0.2, 0.5, 0.5, [np.nan]), "truth_ratio must be numbers"),
        (lambda: memorization_score(0.2, 0.5, 0.5, []), "truth_ratio must be numbers"),
        (lambda: privacy_score({"loss": 0.5}, {"zlib": 0.5}), "same attacks"),
        (lambda: privacy_score({}, {}), "same attacks"),
        (lambda: privacy_score({"loss": 0.5}, {"loss": 0.0}), "loss"),
        (lambda: utility_score(0.5, 0.0), "original_utility"),
        (lambda: overall_score(0.5, 0.5, 1.5), "utility"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()

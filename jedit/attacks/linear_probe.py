"""Linear probes: is it still there, in the hidden states, when the outputs no longer say it?

A logistic regression is fitted to tell the classes of some examples from a layer's hidden states,
and asked about others.  Classes can be the answers themselves (whose profession is which), or "in
the forget set" against "never seen".  Compare with the retrained model's hidden states: what both
allow was never the forgotten rows' doing.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jedit.core.checks import POSITIVE, check_numbers


class ProbeScores(NamedTuple):
    """Accuracy of a linear probe of hidden states, beside that of chance.

    Attributes:
        accuracy: share of the test examples put into their class.
        chance: share of the commonest class among them.
    """

    accuracy: float
    chance: float


def linear_probe(
    states: ArrayLike,
    labels: ArrayLike,
    test_states: ArrayLike,
    test_labels: ArrayLike,
    *,
    strength: float = 1.0,
) -> ProbeScores:
    """Fit a linear probe on hidden states, and score it on others.

    States are standardised by the mean and deviation of the first set. The regression is
    scikit-learn's, with an L2 penalty.

    Args:
        states: (n, d), hidden states to fit on.
        labels: classes of the states to fit on, (n,).
        test_states: hidden states to score the probe on, (m, d).
        test_labels: classes of the states to score the probe on, (m,).
        strength: scikit-learn's C, the inverse of the penalty; 1.0 is its default.

    Returns:
        The probe's accuracy on the test states, and that of chance.

    Raises:
        ValueError: shapes that do not fit, states that are not finite, or one class alone.
        ImportError: scikit-learn is not installed.
    """
    check_numbers(POSITIVE, strength=strength)
    fitted, asked = (np.asarray(x, np.float64) for x in (states, test_states))
    classes, expected = np.asarray(labels), np.asarray(test_labels)
    for name, x, y in (("states", fitted, classes), ("test_states", asked, expected)):
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
            raise ValueError(f"{name} must be (n, d) with n labels, got {x.shape} and {y.shape}")
        if not np.all(np.isfinite(x)):
            raise ValueError(f"{name} hold {np.sum(~np.isfinite(x))} numbers that are not finite")
    if fitted.shape[1] != asked.shape[1]:
        raise ValueError(f"states of width {fitted.shape[1]}, test_states of {asked.shape[1]}")
    if len(np.unique(classes)) < 2:
        raise ValueError(f"a probe needs two classes, got {np.unique(classes).tolist()}")
    mean, deviation = fitted.mean(axis=0), fitted.std(axis=0)
    # A unit that never fires has no deviation; it stays zero instead of becoming NaN.
    deviation[deviation == 0] = 1
    probe = _regression()(C=strength, max_iter=1000)
    probe.fit((fitted - mean) / deviation, classes)
    accuracy = np.mean(probe.predict((asked - mean) / deviation) == expected)
    chance = np.unique(expected, return_counts=True)[1].max() / len(expected)
    return ProbeScores(float(accuracy), float(chance))


def _regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError(
            "jedit.attacks.linear_probe needs scikit-learn: pip install 'jedit[demo]'"
        ) from None
    return LogisticRegression

"""Four numbers by which unlearning of a classifier is judged, and how near retrained they are.

    UA    1 - accuracy on the forget rows             `unlearning_accuracy`
    RA    accuracy on the retain rows                 `retain_accuracy`
    TA    accuracy on the test rows                   `test_accuracy`
    MIA   share of forget rows called non-members     `membership_efficacy`, of `membership_attack`

    average gap  = 100/4 Σ_m |m - m*|                 percentage points; lower is better
    Tug-of-War   = Π_a (1 - |a - a*|)                 a: forget, retain, test accuracy; higher, to 1

m* and a* are those of a model retrained without the forget rows: none of the four is good or bad by
itself (more UA than its is too much).  For a forgotten class the test rows are those of the other
classes.  UA, RA, TA, MIA and the gap as in Jia et al. (arXiv 2304.04934) and SalUn (2310.12508),
Tug-of-War of Zhao et al. (2406.01257).
"""

from typing import NamedTuple

import numpy as np


class UnlearningScores(NamedTuple):
    """The four numbers by which unlearning of a classifier is judged, shares from 0 to 1.

    Attributes:
        unlearning_accuracy: UA, 1 - accuracy on the forget rows.
        retain_accuracy: RA, the accuracy on the retain rows.
        test_accuracy: TA, the accuracy on the test rows.
        membership_efficacy: MIA, the share of the forget rows that an attack calls non-members.
    """

    unlearning_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    membership_efficacy: float


def average_gap(scores: UnlearningScores, retrained: UnlearningScores) -> float:
    """Return the mean of the four absolute differences, in percentage points; 0 is best."""
    return float(100 * np.mean(_differences(scores, retrained)))


def tug_of_war(scores: UnlearningScores, retrained: UnlearningScores) -> float:
    """Return the product over the three accuracies of one less the difference; 1 is best."""
    return float(np.prod(1 - _differences(scores, retrained)[:3]))


def _differences(scores: UnlearningScores, retrained: UnlearningScores) -> np.ndarray:
    return np.abs(np.asarray(scores, np.float64) - np.asarray(retrained, np.float64))

"""How well an attack tells forget rows from rows never seen, and PrivLeak (MUSE, arXiv 2407.06460).

    AUC       P(s_f < s_h) + 1/2 P(s_f = s_h)      forget row f, holdout row h, at random

from scores that are lower for members.  1: the forget rows still look trained on; 1/2: they look
like the holdout rows; 0: they look less known than what was never seen.

    PrivLeak  100 (A - A*) / A*,   A = 1 - AUC,   A* the same for a model retrained without them

MUSE's sign: A counts the pairs in which the forget row has the *higher* score, so under-unlearning
is negative (the untouched model about -100), over-unlearning positive, and 0 is best.  That this is
MUSE's direction shows in the constants of its code: for a model retrained on the retain rows its
AUC of forget against retain is 0.97.

Differences.  None from open-unlearning, whose attacks report our AUC and whose `privleak` turns it
round; it adds 1e-10 to A*, where ours refuses an A* of 0.  (Its older versions did not turn it
round: their PrivLeak has another sign and another denominator.)
"""

import numpy as np
from numpy.typing import ArrayLike

from jedit.core.checks import SHARE, check_numbers


def membership_auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """Return the area under the attack's ROC curve; the two sets need not be equally large.

    Args:
        forget: scores of the forget rows, (n,), lower for members.
        holdout: scores of rows like them that no model was trained on, (m,).

    Returns:
        The area, from 0 to 1. Costs one sort.

    Raises:
        ValueError: if a set is empty, has more than one axis or holds NaN.
    """
    sets = [np.asarray(x, np.float64) for x in (forget, holdout)]
    for name, scores in zip(("forget", "holdout"), sets, strict=True):
        if scores.ndim != 1 or scores.size == 0 or np.any(np.isnan(scores)):
            raise ValueError(
                f"{name} must be numbers of shape (n,), n > 0; got shape {scores.shape} with "
                f"{np.sum(np.isnan(scores))} NaN"
            )
    inside, outside = sets[0], np.sort(sets[1])
    not_above = len(outside) - np.searchsorted(outside, inside, side="left")
    above = len(outside) - np.searchsorted(outside, inside, side="right")
    return float(np.mean((above + not_above) / 2) / len(outside))


def privleak(auc: float, retrained_auc: float) -> float:
    """Return PrivLeak in percent, from two values of `membership_auc`.

    Raises:
        ValueError: if one is not from 0 to 1, or the retrained model's is 1: against a model to
            which the forget rows still look trained on nothing can be compared.
    """
    check_numbers(SHARE, auc=auc, retrained_auc=retrained_auc)
    if retrained_auc == 1:
        raise ValueError("retrained_auc must be below 1: PrivLeak divides by 1 - retrained_auc")
    return float(100 * (retrained_auc - auc) / (1 - retrained_auc))

"""How often a model refuses, by group of questions, and how well a score tells what to refuse.

    TPR(t) = |{questions to be refused with a score of at least t}| / |{questions to be refused}|
    FPR(t) = the same of questions to be answered

The curve over all thresholds is the receiver operating characteristic; its area is the probability
that a question to be refused scores above one to be answered, a tie counting one half.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from jedit.core.checks import SHARE, check_numbers
from jedit.metrics.privleak import membership_auc


class RefusalCurve(NamedTuple):
    """Rates of refusal at every threshold that changes them, from the highest to the lowest.

    Attributes:
        thresholds: questions that score at least this are refused; the first is infinite.
        true_positive_rates: share refused of the questions to be refused.
        false_positive_rates: share refused of the questions to be answered.
        area: area under the curve; 1/2 is chance.
    """

    thresholds: Float[np.ndarray, " t"]
    true_positive_rates: Float[np.ndarray, " t"]
    false_positive_rates: Float[np.ndarray, " t"]
    area: float

    def threshold_at(self, share: float) -> float:
        """Return the lowest threshold at which no more than a share of answerable ones is refused.

        Raises:
            ValueError: the share is not from 0 to 1.
        """
        check_numbers(SHARE, share=share)
        allowed = np.flatnonzero(self.false_positive_rates <= share)
        return float(self.thresholds[allowed[-1]])


def refusal_curve(scores: ArrayLike, should_refuse: ArrayLike) -> RefusalCurve:
    """Return the rates of refusal over all thresholds of a score.

    Args:
        scores: of each question, (n,), higher for one that is refused earlier, such as the
            probability of a refusal token.
        should_refuse: whether each question is to be refused, (n,).

    Returns:
        The curve. Costs one sort.

    Raises:
        ValueError: the shapes differ, a score is NaN, or all questions are of one kind.
    """
    scores, wanted = np.asarray(scores, np.float64), np.asarray(should_refuse, bool)
    if scores.ndim != 1 or scores.shape != wanted.shape or np.isnan(scores).any():
        raise ValueError(
            f"scores and should_refuse must be numbers of one shape (n,); got {scores.shape} with "
            f"{np.isnan(scores).sum()} NaN and {wanted.shape}"
        )
    if wanted.all() or not wanted.any():
        raise ValueError(
            f"of {len(wanted)} questions {wanted.sum()} are to be refused; a curve needs both kinds"
        )
    area = membership_auc(scores[~wanted], scores[wanted])
    thresholds = np.concatenate([[np.inf], np.unique(scores)[::-1]])
    rates = [
        1 - np.searchsorted(np.sort(part), thresholds, side="left") / len(part)
        for part in (scores[wanted], scores[~wanted])
    ]
    return RefusalCurve(thresholds, rates[0], rates[1], area)


def refusal_rates(refused: ArrayLike, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """Return the share refused of each group's questions, in the order of their first ones.

    Args:
        refused: whether each question was refused, (n,); `refuses` says so of answers.
        groups: the category of each question.

    Raises:
        ValueError: there are not as many groups as questions.
    """
    refused = np.asarray(refused, bool)
    if refused.shape != (len(groups),):
        raise ValueError(f"expected one group per question, got {len(groups)} for {refused.shape}")
    found: dict[Hashable, list[bool]] = {}
    for group, is_refused in zip(groups, refused.tolist(), strict=True):
        found.setdefault(group, []).append(is_refused)
    return {group: float(np.mean(part)) for group, part in found.items()}

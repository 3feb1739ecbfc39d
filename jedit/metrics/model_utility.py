"""Model Utility (TOFU, arXiv 2401.06121): what the model still knows and should.

    MU = 9 / Σ_{S, m} 1 / m(S)          the harmonic mean of nine numbers

    S           retain                real authors, world facts
    m: P        mean_n P_n            mean_n P_n^norm               `probability`
       R        mean_n ROUGE-L recall of the greedy answer          `rouge`
       T        mean_n max(0, 1 - TR_n)                             `truth_ratio`

Higher is better; it is 0 when one of the nine is.  Forgetting is not in it: the same three of the
forget questions are reported apart, there with

       T_forget = mean_n min(TR_n, 1 / TR_n)                        `forget_truth_ratio`

which is 1 when a right and a wrong answer are equally likely, and 0 for a fact known or for one
that is known to be otherwise.  This is what the authors' `aggregate_eval_stat.py` computes, with
TR the exponential of a difference of mean losses; their `utils.py` has another one of the same
name, by the arithmetic mean of the wrong answers' probabilities as the paper's text has it, which
gives other numbers.  The paraphrase in TR is the answer itself for real authors and world facts,
which have none.

Differences.  None from `aggregate_eval_stat.py`.  open-unlearning adds 1e-10 to the denominators of
TR, 1/TR and P^norm, which matters only where an answer's probability per token is as small.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class SetUtility(NamedTuple):
    """A model's means on one set of questions.

    Attributes:
        probability: P: the mean probability of the right answers.
        rouge: R: the mean ROUGE-L recall of the generated answers.
        truth_ratio: T: the mean of max(0, 1 - TR); higher is better, unlike the TR it is made of.
    """

    probability: float
    rouge: float
    truth_ratio: float


def set_utility(
    probability: ArrayLike, rouge_recall: ArrayLike, truth_ratio: ArrayLike
) -> SetUtility:
    """Return the three means of a set whose questions should be known.

    Args:
        probability: (n,), `answer_probability` for the retain set, else `normalized_probability`.
        rouge_recall: ROUGE-L recall of each generated answer, (n,).
        truth_ratio: (m,), TR; m may be another number, where not all have wrong answers.

    Returns:
        The means, each from 0 to 1.

    Raises:
        ValueError: if one of them is empty, has more than one axis or holds a negative number or
            NaN.
    """
    ratios = _checked("truth_ratio", truth_ratio)
    return SetUtility(
        float(_checked("probability", probability).mean()),
        float(_checked("rouge_recall", rouge_recall).mean()),
        float(np.maximum(0, 1 - ratios).mean()),
    )


def forget_truth_ratio(truth_ratio: ArrayLike) -> float:
    """Return T_forget, from 0 to 1; TOFU reports it and leaves it out of the utility.

    Raises:
        ValueError: if there is none, or one is negative or NaN.
    """
    ratios = _checked("truth_ratio", truth_ratio)
    return float(np.where(ratios > 1, 1 / np.maximum(ratios, 1), ratios).mean())


def model_utility(retain: SetUtility, real_authors: SetUtility, world_facts: SetUtility) -> float:
    """Return the harmonic mean of the nine numbers, 0 if one of them is 0.

    Raises:
        ValueError: if one of them is negative or not finite.
    """
    values = np.array([*retain, *real_authors, *world_facts], np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"the nine numbers must be finite and at least 0, got {values.tolist()}")
    return float(len(values) / np.sum(1 / values)) if np.all(values > 0) else 0.0


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.all(array >= 0):
        raise ValueError(
            f"{name} must be numbers of shape (n,), n > 0, all at least 0; got shape "
            f"{array.shape} with {np.sum(~(array >= 0))} negative or NaN"
        )
    return array

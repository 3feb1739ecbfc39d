"""Forget ratio: how much of what fine-tuning taught of a task a model has lost again.

    forget ratio = (acc_ft - acc_forget) / (acc_ft - chance)

    acc_ft       accuracy of the model that was fine-tuned on the task       `before`
    acc_forget   accuracy of the unlearned model on the same rows            `after`
    chance       accuracy of guessing

"Unforgettable Generalization in Language Models" (arXiv 2409.02228). On unseen rows of the task
that was unlearned, 1 says that unlearning generalised and 0 that it stayed with the rows it was
taught; on other tasks, what is not 0 is damage. More than 1 is worse than guessing, below 0 better
than before.

Differences.  The ratio is the paper's [notes].  The interval is ours: Fieller's, of the ratio of
two means on the same rows, with half a row added to each of the four cells (right or wrong, before
and after), as Agresti and Min (2005) do for a difference of paired shares, so that rows which all
went one way are not taken for certain.  Rows are the unit; what a second seed would give it does
not say.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jedit.core.checks import Range, check_numbers

OPEN_SHARE = Range(0, 1 - 1e-9, is_open=True)


class ForgetRatio(NamedTuple):
    """A forget ratio with its interval.

    Attributes:
        value: the ratio; NaN where the fine-tuned model is no better than guessing.
        low: lower end of the interval; minus infinity where the rows do not tell that the
            fine-tuned model is better than guessing.
        high: upper end, likewise.
    """

    value: float
    low: float
    high: float


def forget_ratio(
    before: ArrayLike, after: ArrayLike, *, chance: float, confidence: float = 0.95
) -> ForgetRatio:
    """Return the forget ratio of a task.

        before, after = (
            metrics.exact_memorization(apply, p, rows) == 1 for p in (params, unlearned)
        )
        found = metrics.forget_ratio(before, after, chance=0.5)

    Args:
        before: which rows the fine-tuned model gets right, (n,).
        after: which of the same rows the unlearned model gets right, in the same order.
        chance: accuracy of guessing, for instance 1 / number of answers, from 0 to 1 (without).
        confidence: of the interval; 0.95 is arbitrary.

    Raises:
        ValueError: no row, not as many rows before as after, or something but right and wrong.
    """
    check_numbers(Range(0, 1 - 1e-9), chance=chance)
    check_numbers(OPEN_SHARE, confidence=confidence)
    a, b = (_checked(name, x) for name, x in (("before", before), ("after", after)))
    if a.shape != b.shape:
        raise ValueError(f"before has {len(a)} rows and after {len(b)}; they are to be the same")
    gained = a.mean() - chance
    value = (a.mean() - b.mean()) / gained if gained > 0 else float("nan")
    # Each of the four kinds of rows once more, at half its weight.
    a, b = np.append(a, [1, 1, 0, 0]), np.append(b, [1, 0, 1, 0])
    weights = np.append(np.ones(len(a) - 4), [0.5] * 4)
    weights /= weights.sum()
    number = len(a) - 2
    lost, over = a - b, a - chance
    means = np.array([weights @ lost, weights @ over])
    centred = np.stack([lost, over]) - means[:, None]
    covariance = (centred * weights) @ centred.T
    return ForgetRatio(float(value), *_fieller(means, covariance / number, confidence))


def _fieller(means: np.ndarray, covariance: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the ratios r at which means[0] - r means[1] is within z of its own deviations of 0."""
    square = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    c, b, a = np.array([means[0] ** 2, means[0] * means[1], means[1] ** 2]) - square * np.array(
        [covariance[0, 0], covariance[0, 1], covariance[1, 1]]
    )
    # A gain that is not told from none bounds no ratio.
    if a <= 0 or means[1] <= 0:
        return float("-inf"), float("inf")
    root = np.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def _checked(name: str, hits: ArrayLike) -> np.ndarray:
    values = np.asarray(hits)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} must be (n,), one entry a row; got shape {values.shape}")
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(f"{name} must say right (1) or wrong (0) of each row")
    return values.astype(np.float64)

"""Multiple-choice accuracy: is the right option the one the model finds likeliest?

    plain         argmin_k  Σ_s -log p(option_k,s)                  `multiple_choice_accuracy`
    normalized    argmin_k  Σ_s -log p(option_k,s) / length_k       `normalized_choice_accuracy`

each option scored after the same question.  Higher: known better; chance is 1/k, and what WMDP
(arXiv 2403.03218) wants of a model that has forgotten.  A tie goes to the lower option, as in
EleutherAI's lm-evaluation-harness, so that a model which finds all alike scores the share of "A".

The plain one is the harness' `acc`, WMDP's and MMLU's, whose options are the letters A to D, so
that lengths do not matter.  The normalized one is its `acc_norm` when the lengths are the options'
characters; by tokens or by bytes it is another number.

Differences.  None from the harness, to which open-unlearning leaves both.
"""

import numpy as np
from numpy.typing import ArrayLike


def multiple_choice_accuracy(option_loss: ArrayLike, answers: ArrayLike) -> float:
    """Return the share of questions whose right option has the lowest summed loss.

    Args:
        option_loss: (n, k), summed over each option's tokens (`answer_nll_sum_per_row`), in nats;
            infinity where a question has fewer options.
        answers: (n,), the index of each question's right option.

    Returns:
        The share, from 0 to 1.

    Raises:
        ValueError: if the shapes are not (n, k) and (n,), there is no question, a loss is NaN, or
            an answer is no option.
    """
    losses, right = _checked(option_loss, answers)
    return float(np.mean(losses.argmin(axis=1) == right))


def normalized_choice_accuracy(
    option_loss: ArrayLike, lengths: ArrayLike, answers: ArrayLike
) -> float:
    """Return the share of questions whose right option has the lowest loss per unit of length.

    Args:
        option_loss: losses (n, k), summed over each option's tokens, in nats; infinity where a
            question has fewer options.
        lengths: lengths (n, k) of the options: characters for the harness' `acc_norm`, or tokens;
            above 0, also where a loss is infinite.
        answers: the index of each question's right option, (n,).

    Returns:
        The share, from 0 to 1.

    Raises:
        ValueError: what `multiple_choice_accuracy` refuses, or a length that is not above 0.
    """
    losses, right = _checked(option_loss, answers)
    units = np.asarray(lengths, np.float64)
    if units.shape != losses.shape or not np.all(units > 0):
        raise ValueError(
            f"lengths must be above 0 and of the losses' shape {losses.shape}, got shape "
            f"{units.shape} with {np.sum(~(units > 0))} not above 0"
        )
    return float(np.mean((losses / units).argmin(axis=1) == right))


def _checked(option_loss: ArrayLike, answers: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    losses, right = np.asarray(option_loss, np.float64), np.asarray(answers)
    if losses.ndim != 2 or losses.size == 0 or right.shape != losses.shape[:1]:
        raise ValueError(
            f"expected losses of shape (n, k) and answers of shape (n,), n and k > 0; got "
            f"{losses.shape} and {right.shape}"
        )
    if not np.issubdtype(right.dtype, np.integer):
        raise ValueError(f"answers must be indices of options, got {right.dtype}")
    if np.any(right < 0) or np.any(right >= losses.shape[1]):
        raise ValueError(f"answers must be from 0 to {losses.shape[1] - 1}, got {right.tolist()}")
    if np.any(np.isnan(losses)):
        raise ValueError(f"option_loss has {np.sum(np.isnan(losses))} NaN")
    return losses, right

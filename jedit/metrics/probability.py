"""Probability of an answer (TOFU, arXiv 2401.06121), from its length-normalised loss.

    L_n      = Σ_s -log p(y_ns) / |y_n|                     `answer_nll_per_row`
    P_n      = exp(-L_n)                                    the geometric mean over the tokens
    P_n^norm = P_n / (P_n + Σ_k P_n(wrong answer k))        given wrong answers to choose from

Higher: known better.  TOFU reports the mean of P_n for the retain and forget questions, whose
answers are sentences, and the mean of P_n^norm for real authors and world facts, whose right and
wrong answers are short.  On the forget set a good value is the retrained model's, not 0.

Differences.  open-unlearning adds 1e-10 to the denominator of P_n^norm, which thereby goes to 0
for a model to which all answers have become unlikely (a loss above 23 nats per token), however it
ranks them; ours divides in the logarithm and has no such term.  Its `probability_w_options` also
drops the rows that have no value, but then numbers those that are left by the first indices of
the whole set; ours takes arrays without gaps.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def answer_probability(loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each answer's probability, from 0 to 1 and in float64.

    Args:
        loss: (n,), length-normalised and in nats, as from `answer_nll_per_row`; infinity gives 0.

    Returns:
        The n probabilities.

    Raises:
        ValueError: if the losses do not have one axis.
    """
    losses = np.asarray(loss, np.float64)
    if losses.ndim != 1:
        raise ValueError(f"expected losses of shape (n,), got {losses.shape}")
    return np.exp(-losses)


def normalized_probability(loss: ArrayLike, wrong_loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each right answer's share of the probability that it and the wrong ones have.

    Args:
        loss: (n,), the length-normalised loss of each question's right answer.
        wrong_loss: (n, k), those of its k wrong answers.

    Returns:
        The n shares, in float64; NaN where all the losses are infinite.

    Raises:
        ValueError: if the shapes are not (n,) and (n, k).
    """
    right, wrong = np.asarray(loss, np.float64), np.asarray(wrong_loss, np.float64)
    if right.ndim != 1 or wrong.ndim != 2 or len(wrong) != len(right) or wrong.shape[1] == 0:
        raise ValueError(
            f"expected losses of shapes (n,) and (n, k), got {right.shape} and {wrong.shape}"
        )
    all_losses = np.concatenate([right[:, None], wrong], axis=1)
    with np.errstate(invalid="ignore"):  # infinity less infinity, where all are infinite
        shifted = np.exp(all_losses.min(axis=1, keepdims=True) - all_losses)
    return shifted[:, 0] / shifted.sum(axis=1)

"""Open-unlearning's own definitions, where they are others than jedit's, for logs beside its own.

    exact memorization     |{s : argmax p(. | y_n,<s) = y_ns}| / T_n
    extraction strength    1 - k_n / T_n,  k_n the first of 0 ... T_n - 1 from which on every token
                           is the likeliest, and T_n - 1 where there is none
    Min-K%, Min-K%++       as `min_k_scores` and `min_k_plus_plus_scores`
    gradient norm          mean over the tensors of ‖∇ -(1/T_n) Σ_s log p(y_ns)‖
    truth ratio            exp(-mean_k L(wrong k)) / (exp(-L(right)) + 1e-10)
    normalised share       P(right) / (P(right) + Σ_k P(wrong k) + 1e-10)
    PrivLeak               100 (A - A*) / (A* + 1e-10),  A = 1 - AUC

over the T_n labelled tokens of an answer but the last, whatever that is ("to ignore eos
prediction").  An answer of one token has none left: its exact memorization is NaN there, its
extraction strength and both Min-K are 0, and its gradient norm is NaN.

Differences.  None from open-unlearning at its commit d3d7cf9 of December 2025, but two: its
gradient norm is a mean over PyTorch's tensors, ours over the leaves of the parameters, so that one
that stacks all layers counts once; and Min-K%++ takes the variance as a mean of squares, where it
has a difference of two large numbers.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example, counted_outputs
from jedit.metrics.gradient_norm import gradient_norm_scores
from jedit.metrics.likelihood_attacks import SHARE, standardized
from jedit.metrics.streaming import each_batch
from jedit.objectives.token_nll import labelled_values

SMALL = 1e-10


class TokenScores(NamedTuple):
    """Four scores for each row that has a labelled token, arrays of shape (n,).

    Attributes:
        exact_memorization: share of right tokens; NaN for a row of one token.
        extraction_strength: extraction strength; never 0 but for a row of one token.
        min_k: Min-K% score, lower for members.
        min_k_plus_plus: Min-K%++ score, lower for members.
    """

    exact_memorization: Float[np.ndarray, " n"]
    extraction_strength: Float[np.ndarray, " n"]
    min_k: Float[np.ndarray, " n"]
    min_k_plus_plus: Float[np.ndarray, " n"]


@on_auto_axes
def token_scores(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch, *, share: float = SHARE
) -> TokenScores:
    """Return all scores that are made of single tokens' predictions, from one forward pass.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the model's parameters.
        batches: rows; one none of whose tokens counts, such as fills up the last batch, is left
            out.
        share: k of Min-K%; 0.4, open-unlearning's for TOFU.

    Returns:
        The scores, in the order given.

    Raises:
        ValueError: if a batch is packed, or has not one target per output.
    """
    rows = []
    for batch in each_batch(apply, params, batches):
        parts = jax.device_get(_tokens(apply, params, batch))
        for is_hit, log_p, z, counted in zip(*parts, strict=True):
            if counted.any():
                # Without the last counted token, whatever it is, as open-unlearning has it.
                kept = np.flatnonzero(counted)[:-1]
                rows.append(_scores_of_row(is_hit[kept], log_p[kept], z[kept], share))
    return TokenScores(*np.array(rows, np.float64).reshape(-1, 4).T)


@on_auto_axes
def gradient_norms(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each row's mean over the tensors of its gradient's norms; NaN for a row of one token.

    Rows that count nothing are left out. Costs a gradient per row.

    Raises:
        ValueError: if a batch is packed, or has no targets.
    """
    found = []
    for batch in each_batch(apply, params, batches):
        shorter, lengths = _without_last(batch)
        norms = np.full(len(lengths), np.nan)
        norms[lengths > 1] = gradient_norm_scores(apply, params, shorter, by_tensor=True)
        found.append(norms[lengths > 0])
    return np.concatenate([np.zeros(0), *found])


def truth_ratio(loss: ArrayLike, wrong_loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each question's truth ratio, of losses (n,) of right and (n, k) of wrong answers."""
    wrong = np.exp(-np.asarray(wrong_loss, np.float64).mean(axis=1))
    return wrong / (np.exp(-np.asarray(loss, np.float64)) + SMALL)


def normalized_probability(loss: ArrayLike, wrong_loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each right answer's share, of the losses (n,) of right and (n, k) of wrong answers."""
    right, wrong = (np.exp(-np.asarray(x, np.float64)) for x in (loss, wrong_loss))
    return right / (right + wrong.sum(axis=1) + SMALL)


def forget_truth_ratio(ratios: ArrayLike) -> float:
    """Return the mean of min(TR, 1/TR): "closer_to_1_better"."""
    values = np.asarray(ratios, np.float64)
    return float(np.mean(np.minimum(values, 1 / (values + SMALL))))


def privleak(auc: float, retrained_auc: float) -> float:
    """Return PrivLeak in percent, of two AUCs that are 1 where all forget rows look trained on."""
    return 100 * (retrained_auc - auc) / (1 - retrained_auc + SMALL)


def _scores_of_row(is_hit, log_p, z, share: float) -> tuple[float, float, float, float]:
    number = len(is_hit)
    if not number:
        return (np.nan, 0.0, 0.0, 0.0)
    # The shortest hint ends behind the last miss: all tokens after it come by themselves.
    misses = np.flatnonzero(~is_hit)
    k = min(misses[-1] + 1, number - 1) if len(misses) else 0
    lowest = max(1, int(number * share))
    min_k, min_k_plus_plus = (
        -float(np.mean(np.sort(x.astype(np.float64))[:lowest])) for x in (log_p, z)
    )
    return float(np.mean(is_hit)), 1 - k / number, min_k, min_k_plus_plus


@partial(jax.jit, static_argnums=0)
def _tokens(apply: Apply, params: PyTree, batch: Batch) -> tuple[Array, Array, Array, Array]:
    """Return, of each token, whether it is the likeliest, log p, z of Min-K%++, and if it counts.

    Each is of shape (batch, t).
    """

    def values(logits, targets, counted):
        is_hit = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
        return is_hit, *standardized(logits, targets), counted

    found = labelled_values(values, apply, params, batch)
    return tuple(by_example(batch, x) for x in found)  # pyright: ignore[reportReturnType]


def _without_last(batch: Batch) -> tuple[Batch, np.ndarray]:
    """Return the batch without each row's last counted token, and how many each counts with it.

    Raises:
        ValueError: if the batch is packed, or has no targets.
    """
    if batch.targets is None:
        raise ValueError("batch.targets has shape None, expected one label per output")
    lead = batch.targets.shape
    counted = np.asarray(by_example(batch, counted_outputs(batch, lead)))
    # Counted from the right, so that the last counted token is the one at which the sum is 1.
    shorter = counted & (np.cumsum(counted[:, ::-1], axis=1)[:, ::-1] > 1)
    mask = jnp.asarray(shorter.reshape(lead), jnp.float32)
    return batch._replace(mask=mask), counted.sum(axis=1)

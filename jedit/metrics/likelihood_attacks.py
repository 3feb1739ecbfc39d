"""Membership attacks on a language model by its likelihoods: one score per row, lower for members.

    loss          L_n = -mean_s log p(y_ns)                       `answer_nll_per_row`
    zlib          L_n / bytes of the row's text, compressed       Carlini et al., 2012.07805
    reference     L_n - L_n(reference model)                      Carlini et al., 2012.07805
    Min-K%        -mean over the share k of lowest log p(y_ns)    Shi et al., 2310.16789
    Min-K%++      -mean over the share k of lowest z_ns           Zhang et al., 2404.02936

    z_s = (log p(y_s) - μ_s) / σ_s,  μ_s and σ_s mean and deviation of log p under p itself

All are in the direction of a loss: a text that was trained on scores low.  `membership_auc` makes
one number of the scores of two sets, `gradient_norm_scores` is the sixth attack.  (A classifier's
`membership_scores` go the other way, higher for members.)

Differences.  MUSE's code takes int(k |y|) tokens, for a short row none, and has NaN; here, as in
open-unlearning, one token at least.  open-unlearning scores a row without labelled tokens 0, which
is what a perfectly memorised one has; ours leaves it out.  It leaves each answer's last labelled
token out of Min-K, Min-K++ and the gradient norm, not of the other three; here `mask` says what
counts, and `open_unlearning` has its numbers.  It takes σ² as a difference of two large numbers;
ours is the mean of squares, with the same floor.
"""

import zlib
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE_SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example
from jedit.metrics.streaming import each_batch
from jedit.objectives.token_nll import labelled_values, token_nll

SHARE = 0.4
MIN_VARIANCE = 1e-6  # open-unlearning's: where the model is certain, log p hardly varies


def zlib_scores(loss: ArrayLike, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Return each row's loss over the length of its text when compressed, in nats per byte.

    Args:
        loss: length-normalised losses in nats, (n,).
        texts: the n texts whose loss it is (for question and answer, the answers), as UTF-8.

    Returns:
        The n scores.

    Raises:
        ValueError: if there is not one text per loss.
    """
    losses = np.asarray(loss, np.float64)
    if losses.ndim != 1 or isinstance(texts, str) or len(texts) != len(losses):
        raise ValueError(
            f"expected losses of shape (n,) and a list of n texts, got {losses.shape} and "
            f"{'a string' if isinstance(texts, str) else f'{len(texts)} texts'}"
        )
    return losses / np.array([len(zlib.compress(text.encode())) for text in texts], np.float64)


def reference_scores(loss: ArrayLike, reference_loss: ArrayLike) -> Float[np.ndarray, " n"]:
    """Return each row's loss less its loss under another model, one not trained on any of them.

    Raises:
        ValueError: if the two are not of one shape (n,).
    """
    losses, references = np.asarray(loss, np.float64), np.asarray(reference_loss, np.float64)
    if losses.ndim != 1 or losses.shape != references.shape:
        raise ValueError(
            f"expected two losses of one shape (n,), got {losses.shape} and {references.shape}"
        )
    return losses - references


@on_auto_axes
def min_k_scores(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch, *, share: float = SHARE
) -> Float[np.ndarray, " n"]:
    """Return each row's Min-K% score, in nats.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the model's parameters.
        batches: batches of rows; a row none of whose tokens counts is left out.
        share: k, of the row's tokens that are looked at: int(k |y|) of them, one at least; 0.4,
            MUSE's and open-unlearning's, where the two papers try 0.1 to 0.6 and 1.

    Returns:
        The scores, in the order given; with a share of 1 the loss.

    Raises:
        ValueError: if the share is not above 0 and at most 1, or a batch is packed.
    """
    check_numbers(POSITIVE_SHARE, share=share)
    parts = [_token_log_p(apply, params, batch) for batch in each_batch(apply, params, batches)]
    return _means_of_lowest(parts, share)


@on_auto_axes
def min_k_plus_plus_scores(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch, *, share: float = SHARE
) -> Float[np.ndarray, " n"]:
    """Return each row's Min-K%++ score, in standard deviations.

    The arguments are those of `min_k_scores`, with the same share of 0.4, MUSE's and open-
    unlearning's.

    The share is 0.4, MUSE's and open-unlearning's, there and here.

    Raises:
        ValueError: if the share is not above 0 and at most 1, or a batch is packed.
    """
    check_numbers(POSITIVE_SHARE, share=share)
    parts = [_token_z(apply, params, batch) for batch in each_batch(apply, params, batches)]
    return _means_of_lowest(parts, share)


def _means_of_lowest(parts: list[tuple[Array, Array]], share: float) -> Float[np.ndarray, " n"]:
    means = []
    for values, counted in jax.device_get(parts):
        for row, is_counted in zip(values.astype(np.float64), counted, strict=True):
            chosen = np.sort(row[is_counted])
            if chosen.size:
                means.append(-np.mean(chosen[: max(1, int(chosen.size * share))]))
    return np.array(means, np.float64)


@partial(jax.jit, static_argnums=0)
def _token_log_p(
    apply: Apply, params: PyTree, batch: Batch
) -> tuple[Float[Array, "batch t"], Bool[Array, "batch t"]]:
    def values(logits, targets, counted):
        return -token_nll(logits, targets), counted

    picked, counted = labelled_values(values, apply, params, batch)
    return by_example(batch, picked), by_example(batch, counted)


@partial(jax.jit, static_argnums=0)
def _token_z(
    apply: Apply, params: PyTree, batch: Batch
) -> tuple[Float[Array, "batch t"], Bool[Array, "batch t"]]:
    def values(logits, targets, counted):
        return standardized(logits, targets)[1], counted

    z, counted = labelled_values(values, apply, params, batch)
    return by_example(batch, z), by_example(batch, counted)


def standardized(
    logits: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]
) -> tuple[Float[Array, "*lead"], Float[Array, "*lead"]]:
    """Return log p and z of Min-K%++ at the targets."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    likely = jnp.where(p > 0, log_p, 0)  # 0 times minus infinity is 0 here
    mean = jnp.sum(p * likely, axis=-1)
    variance = jnp.sum(p * (likely - mean[..., None]) ** 2, axis=-1)
    picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return picked, (picked - mean) / jnp.sqrt(jnp.maximum(variance, MIN_VARIANCE))

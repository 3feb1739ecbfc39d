"""Masked cross-entropy and output KL of a categorical model: what every objective is made of.

Logits carry the classes on their last axis; their other axes, the lead, are the outputs that a
batch counts.  An output counts when it stands in `mask` and in `valid`.  Losses are in nats, in
float32 or wider.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jedit.core.arguments import check_batch, check_labels
from jedit.core.batch import Apply, Batch
from jedit.core.outputs import by_example, counted_outputs, kl_terms
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks


def token_nll(
    logits: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]
) -> Float[Array, "*lead"]:
    """Return -log softmax(logits) at the targets, output by output."""
    logits = wide(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_kl(
    reference_logits: Float[Array, "*lead classes"], logits: Float[Array, "*lead classes"]
) -> Float[Array, "*lead"]:
    """Return KL(p_reference || p), output by output, with its digits kept where p is close."""
    log_p = jax.nn.log_softmax(wide(reference_logits), axis=-1)
    log_q = jax.nn.log_softmax(wide(logits), axis=-1)
    return jnp.sum(kl_terms(log_p, log_q), axis=-1)


def soft_cross_entropy(
    probabilities: Float[Array, "*lead classes"], logits: Float[Array, "*lead classes"]
) -> Float[Array, "*lead"]:
    """Return -Σ q log softmax(logits), output by output; where q is 0 nothing is added."""
    log_p = jax.nn.log_softmax(wide(logits), axis=-1)
    q = probabilities.astype(log_p.dtype)
    return -jnp.sum(jnp.where(q > 0, q * log_p, 0), axis=-1)


def masked_mean(values: Float[Array, "*lead"], counted: Bool[Array, "*lead"]) -> Float[Array, ""]:
    """Return the mean of the values that count, 0 if none does."""
    total = jnp.sum(jnp.where(counted, values, 0))
    return total / jnp.maximum(jnp.sum(counted), 1).astype(total.dtype)


def labelled_values(
    values: Callable[..., PyTree], apply: Apply, params: PyTree, batch: Batch, *others: PyTree
) -> PyTree:
    """Return what a function makes of logits and labels, of large outputs in blocks of rows.

    Args:
        values: `(logits, targets, counted, *logits of others) -> arrays` of the lead's shape, each
            output's of its own logits: in float32 or wider the logits, 0 where they do not count
            the targets, and which outputs count.
        apply: `apply(params, inputs) -> logits`.
        params: the parameters.
        batch: the rows.
        others: the parameters of further models, on whose logits no gradient is taken.

    Raises:
        TypeError: it is no batch, or its targets are no integers.
        ValueError: if the batch has no targets, or not one per output.
    """
    check_batch(batch, "the objective's batch")

    def of_logits(outputs: tuple[Array, ...], rows: Batch) -> PyTree:
        fixed = (wide(jax.lax.stop_gradient(logits)) for logits in outputs[1:])
        return values(*_labelled(outputs[0], rows), *fixed)

    return in_row_blocks(of_logits, apply, (params, *others), batch)


def counted_nll(
    apply: Apply, params: PyTree, batch: Batch
) -> tuple[Float[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return each output's negative log-likelihood, 0 where it does not count, and which count.

    Targets that do not count may hold anything, -100 for instance. Large outputs are computed in
    blocks of rows.

    Raises:
        ValueError: if the batch has no targets, or not one per output.
    """
    check_batch(batch, "the objective's batch")
    return in_row_blocks(lambda outputs, rows: nll_of(outputs[0], rows), apply, (params,), batch)


def nll_of(
    logits: Float[Array, "*lead classes"], batch: Batch
) -> tuple[Float[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return what `counted_nll` does, of logits that are there."""
    logits, targets, counted = _labelled(logits, batch)
    return jnp.where(counted, token_nll(logits, targets), 0), counted


def counted_kl(
    apply: Apply, reference: PyTree, params: PyTree, batch: Batch
) -> tuple[Float[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return KL(p_reference || p), output by output, and which count; in blocks of rows as well."""

    def values(outputs: tuple[Array, ...], rows: Batch) -> tuple[Array, Array]:
        divergence = token_kl(*outputs)
        return divergence, counted_outputs(rows, divergence.shape)

    return in_row_blocks(values, apply, (reference, params), batch)


def _labelled(
    logits: Float[Array, "*lead classes"], batch: Batch
) -> tuple[Float[Array, "*lead classes"], Int[Array, "*lead"], Bool[Array, "*lead"]]:
    # Wide before the softmax: in bfloat16 the NLL of a memorised token has no digit left.
    logits = wide(logits)
    if batch.targets is None or batch.targets.shape != logits.shape[:-1]:
        got = None if batch.targets is None else batch.targets.shape
        raise ValueError(
            f"batch.targets has shape {got}, expected one label per output, {logits.shape[:-1]}"
        )
    check_labels(batch.targets, "batch.targets")
    # Class 0 stands in for targets such as -100, which would index out of range.
    counted = counted_outputs(batch, logits.shape[:-1])
    return logits, jnp.where(counted, batch.targets, 0), counted


def sequence_nll(apply: Apply, params: PyTree, batch: Batch) -> Float[Array, " batch"]:
    """Return each example's negative log-likelihood, summed over its outputs that count.

    Raises:
        ValueError: the batch is packed.
    """
    nll, _ = counted_nll(apply, params, batch)
    return jnp.sum(by_example(batch, nll), axis=-1)

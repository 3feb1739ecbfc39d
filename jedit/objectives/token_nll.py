"""Masked cross-entropy and output KL of a categorical model: what every objective is made of.

Logits carry the classes on their last axis; their other axes, the lead, are the outputs that a
batch counts.  An output counts when it stands in `mask` and in `valid`.  Losses are in nats, in
float32 or wider.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jedit.typing import Batch

Apply = Callable[[PyTree, Any], Array]


def token_nll(
    logits: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]
) -> Float[Array, "*lead"]:
    """Return -log softmax(logits) at the targets, output by output."""
    logits = _wide(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_kl(
    reference_logits: Float[Array, "*lead classes"], logits: Float[Array, "*lead classes"]
) -> Float[Array, "*lead"]:
    """Return KL(p_reference || p), output by output, with its digits kept where p is close."""
    log_p = jax.nn.log_softmax(_wide(reference_logits), axis=-1)
    log_q = jax.nn.log_softmax(_wide(logits), axis=-1)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Both sum to one, so q - p may be added to p log(p / q): each term is then of second order in
    # the difference, where the plain sum cancels terms of first order.
    d = jnp.where(p > 0, log_p - log_q, 0)
    is_near = (jnp.abs(d) < 0.5) & (p > 0)
    d_near = jnp.where(is_near, d, 0)
    terms = jnp.where(is_near, p * (jnp.expm1(-d_near) + d_near), (q - p) + p * d)
    return jnp.sum(terms, axis=-1)


def soft_cross_entropy(
    probabilities: Float[Array, "*lead classes"], logits: Float[Array, "*lead classes"]
) -> Float[Array, "*lead"]:
    """Return -Σ q log softmax(logits), output by output; where q is 0 nothing is added."""
    log_p = jax.nn.log_softmax(_wide(logits), axis=-1)
    q = probabilities.astype(log_p.dtype)
    return -jnp.sum(jnp.where(q > 0, q * log_p, 0), axis=-1)


def counted_outputs(batch: Batch, lead_shape: tuple[int, ...]) -> Bool[Array, "*lead"]:
    """Return which outputs count: those in `mask` that are also `valid`.

    Raises:
        ValueError: if one of the two does not have the outputs' leading shape.
    """
    counted = jnp.ones(lead_shape, bool)
    for name, given in (("mask", batch.mask), ("valid", batch.valid)):
        if given is None:
            continue
        if given.shape != lead_shape:
            raise ValueError(
                f"batch.{name} has shape {given.shape}, but the outputs' leading shape is "
                f"{lead_shape}; give one entry per output"
            )
        counted &= given.astype(bool)
    return counted


def masked_mean(values: Float[Array, "*lead"], counted: Bool[Array, "*lead"]) -> Float[Array, ""]:
    """Return the mean of the values that count, 0 if none does."""
    total = jnp.sum(jnp.where(counted, values, 0))
    return total / jnp.maximum(jnp.sum(counted), 1).astype(total.dtype)


def counted_nll(
    params: PyTree, batch: Batch, *, apply: Apply
) -> tuple[Float[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return each output's negative log-likelihood, 0 where it does not count, and which count.

    Targets that do not count may hold anything, -100 for instance.

    Raises:
        ValueError: if the batch has no targets, or not one per output.
    """
    logits = apply(params, batch.inputs)
    if batch.targets is None or batch.targets.shape != logits.shape[:-1]:
        got = None if batch.targets is None else batch.targets.shape
        raise ValueError(
            f"batch.targets has shape {got}, expected one label per output, {logits.shape[:-1]}"
        )
    counted = counted_outputs(batch, logits.shape[:-1])
    nll = token_nll(logits, jnp.where(counted, batch.targets, 0))
    return jnp.where(counted, nll, 0), counted


def sequence_nll(params: PyTree, batch: Batch, *, apply: Apply) -> Float[Array, " batch"]:
    """Return each example's negative log-likelihood, summed over its outputs that count."""
    nll, _ = counted_nll(params, batch, apply=apply)
    return jnp.sum(nll.reshape(nll.shape[0], -1), axis=-1)


def _wide(x: Array) -> Array:
    return x if jnp.finfo(x.dtype).bits > 32 else x.astype(jnp.float32)

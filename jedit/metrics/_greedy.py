"""Which outputs a model gets right by itself: its likeliest class, under the given prefix."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from jedit.core.batch import Apply, Batch
from jedit.objectives.token_nll import labelled_values


def greedy_hits(
    params: PyTree, batch: Batch, *, apply: Apply
) -> tuple[Bool[Array, "*lead"], Bool[Array, "*lead"]]:
    """Return which outputs count and are right, and which count; a tie is its lower class.

    Raises:
        ValueError: if the batch has no targets, or not one per output.
    """
    return labelled_values(_hits, apply, params, batch)


def _hits(logits: Array, targets: Array, counted: Array) -> tuple[Array, Array]:
    return counted & (jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets), counted

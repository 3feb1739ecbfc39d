"""How far an edit moved a model's outputs: mean KL(p_original || p_edited), in nats.

On the retain set, lower is better: it is what a retain budget bounds.  On the forget set against a
model retrained without it (`original` the retrained one), lower is closer to never having learned.

Differences.  open-unlearning's KL, of its retain loss, is the mean over all positions, padding and
prompts included, so that it depends on how a batch is padded; ours is over those that count.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.metrics.streaming import (
    RowSums,
    each_batch,
    mean_of_sums,
    rows_of_sums,
    sums_by_row,
)
from jedit.objectives.token_nll import counted_kl


@on_auto_axes
def output_kl(
    apply: Apply, original: PyTree, edited: PyTree, batches: Iterable[Batch] | Batch
) -> float:
    """Return the mean KL over all outputs that count, in all batches; targets are not needed."""
    return mean_of_sums(
        [
            _sum_kl(apply, original, edited, batch)
            for batch in each_batch(apply, (original, edited), batches, has_labels=False)
        ]
    )


@on_auto_axes
def output_kl_per_row(
    apply: Apply, original: PyTree, edited: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each example's mean KL over its outputs that count, in the order given.

    An example none of whose outputs counts, such as one that fills up the last batch, is left out.
    """
    sums, counts = rows_of_sums(
        [
            _row_kl(apply, original, edited, batch)
            for batch in each_batch(apply, (original, edited), batches, has_labels=False)
        ]
    )
    return sums / counts


@partial(jax.jit, static_argnums=0)
def _row_kl(apply: Apply, original: PyTree, edited: PyTree, batch: Batch) -> RowSums:
    divergence, counted = counted_kl(apply, original, edited, batch)
    return sums_by_row(batch, jnp.where(counted, divergence, 0), counted)


@partial(jax.jit, static_argnums=0)
def _sum_kl(apply: Apply, original: PyTree, edited: PyTree, batch: Batch) -> tuple[Array, Array]:
    divergence, counted = counted_kl(apply, original, edited, batch)
    return jnp.sum(jnp.where(counted, divergence, 0)), jnp.sum(counted)

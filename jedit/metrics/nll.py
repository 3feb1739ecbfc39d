"""Negative log-likelihood of the given targets, in nats.

    nll                       Σ_o -log p(y_o) / M, over all M outputs that count
    answer_nll_per_row        Σ_s -log p(y_ns) / M_n, for each example n
    answer_nll_sum_per_row    Σ_s -log p(y_ns)

Lower: known better.  The second is length-normalised, as `truth_ratio` and Forget Quality need it,
the third is not, as `multiple_choice_accuracy` needs it.
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
from jedit.objectives.token_nll import counted_nll


@on_auto_axes
def nll(apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch) -> float:
    """Return the mean negative log-likelihood over all outputs that count, in all batches."""
    return mean_of_sums(
        [_sum_and_count(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )


@on_auto_axes
def answer_nll_per_row(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each example's mean negative log-likelihood, in the order given.

    An example none of whose outputs counts, such as one that fills up the last batch, is left out.
    The examples of packed batches, all of one `pack`, are its rows, in their order there.
    """
    sums, counts = rows_of_sums(
        [_row_sums(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )
    return sums / counts


@on_auto_axes
def answer_nll_sum_per_row(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch
) -> Float[np.ndarray, " n"]:
    """Return each example's summed negative log-likelihood, in the order given.

    An example none of whose outputs counts is left out. The examples of packed batches, all of one
    `pack`, are its rows, in their order there.

    An example none of whose outputs counts is left out here too; packed batches as above.
    """
    return rows_of_sums(
        [_row_sums(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )[0]


@partial(jax.jit, static_argnums=0)
def _sum_and_count(apply: Apply, params: PyTree, batch: Batch) -> tuple[Array, Array]:
    values, counted = counted_nll(apply, params, batch)
    return jnp.sum(values), jnp.sum(counted)


@partial(jax.jit, static_argnums=0)
def _row_sums(apply: Apply, params: PyTree, batch: Batch) -> RowSums:
    values, counted = counted_nll(apply, params, batch)
    return sums_by_row(batch, values, counted)

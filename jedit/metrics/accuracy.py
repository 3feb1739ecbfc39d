"""Share of the outputs that count whose likeliest class is the target; higher: known better.

For a classifier this is the accuracy, for a language model the token accuracy under the given
prefix.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.metrics._greedy import greedy_hits
from jedit.metrics.streaming import each_batch, mean_of_sums


@on_auto_axes
def accuracy(apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch) -> float:
    """Return the accuracy over all outputs that count, in all batches; a tie is its lower class."""
    return mean_of_sums(
        [_hits(apply, params, batch) for batch in each_batch(apply, params, batches)]
    )


@partial(jax.jit, static_argnums=0)
def _hits(apply: Apply, params: PyTree, batch: Batch) -> tuple[Array, Array]:
    hits, counted = greedy_hits(params, batch, apply=apply)
    return jnp.sum(hits), jnp.sum(counted)

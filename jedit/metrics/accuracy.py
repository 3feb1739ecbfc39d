"""Share of the outputs that count whose likeliest class is the target; higher: known better.

For a classifier this is the accuracy, for a language model the token accuracy under the given
prefix.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.metrics.streaming import each_batch, mean_of_sums
from jedit.objectives.token_nll import Apply
from jedit.outputs import counted_outputs
from jedit.typing import Batch


def accuracy(apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch) -> float:
    """Return the accuracy over all outputs that count, in all batches; a tie is its lower class."""
    return mean_of_sums([_hits(apply, params, batch) for batch in each_batch(batches)])


@partial(jax.jit, static_argnums=0)
def _hits(apply: Apply, params: PyTree, batch: Batch) -> tuple[Array, Array]:
    logits = apply(params, batch.inputs)
    if batch.targets is None or batch.targets.shape != logits.shape[:-1]:
        got = None if batch.targets is None else batch.targets.shape
        raise ValueError(
            f"batch.targets has shape {got}, expected one label per output, {logits.shape[:-1]}"
        )
    counted = counted_outputs(batch, logits.shape[:-1])
    is_hit = jnp.argmax(logits, axis=-1).astype(batch.targets.dtype) == batch.targets
    return jnp.sum(is_hit & counted), jnp.sum(counted)

"""How a recommender ranks: recall@10 and NDCG@10 of the items that were chosen next."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.data import batches
from jedit.recipes.fitting import rows_of

TOP = 10


def ranking(apply: Callable, params: PyTree, rows: Batch, *, chunk: int = 64) -> dict[str, float]:
    """Rank all items but those that the user has had, where the rows count.

    Each place where rows count has one right item, so that recall is how often it is among the
    first ten, and NDCG the mean of 1/log2(1 + rank) where it is. What scores the same as the right
    item stands before it.

    Args:
        apply: `apply(params, items) -> logits`, of which the first is that of padding.
        params: the parameters.
        rows: items, by time, with the next ones for targets; mask says which are asked for.
        chunk: rows that are computed at a time; 64 is arbitrary.

    Returns:
        "recall" and "ndcg", both of the first ten; a model whose logits are not finite ranks
        nothing, and has 0.
    """
    found = []
    for part in batches(rows, min(chunk, rows_of(rows))):
        ranks, is_counted = map(np.asarray, _ranks(apply, params, part))
        found.append(ranks[is_counted])
    ranks = np.concatenate(found)
    if np.any(ranks == 0):
        return {"recall": 0.0, "ndcg": 0.0}
    is_among = ranks <= TOP
    gains = np.where(is_among, 1 / np.log2(1 + ranks), 0)
    return {"recall": float(np.mean(is_among)), "ndcg": float(np.mean(gains))}


@functools.partial(jax.jit, static_argnums=0)
def _ranks(apply: Callable, params: PyTree, rows: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the right item's rank from 1 at every place, 0 where logits are not finite."""
    assert rows.targets is not None
    logits = wide(apply(params, rows.inputs))
    count = logits.shape[-1]
    had = jax.nn.one_hot(rows.inputs, count, dtype=bool)
    # Item 0 is padding, and what the user has had is not recommended.
    is_out = jnp.cumsum(had, axis=1, dtype=jnp.int32).astype(bool).at[..., 0].set(True)
    own = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)
    ranks = jnp.sum((logits >= own) & (~is_out), axis=-1)
    ranks = jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), ranks, 0)
    return ranks, counted_outputs(rows, ranks.shape)

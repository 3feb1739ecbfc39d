"""Logits of a large vocabulary a few rows at a time, so that they are never there as a whole.

Eight rows of 512 tokens have 2.5 GB of logits over 152k words in float32, and a loss and its
gradient several times that.  A row's losses are of its own outputs alone, so rows are taken in
blocks, and the backward pass computes a block's outputs once more.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch

MOST_BYTES = 2**28  # of outputs in float32 that are there at a time; arbitrary


def in_row_blocks(
    values: Callable[[tuple[Array, ...], Batch], PyTree],
    apply: Apply,
    models: tuple[PyTree, ...],
    batch: Batch,
) -> PyTree:
    """Return what a function makes of models' outputs, in blocks of rows where these are large.

    To be traced: otherwise the outputs are computed as a whole first.

    Args:
        values: `(outputs of each model, batch) -> arrays`, whose first axes are the batch's rows,
            each of them of its own row alone.
        apply: `apply(params, inputs) -> outputs`.
        models: the parameters of each model.
        batch: the rows.

    Returns:
        `values` of all rows. Outputs of one model of more than `MOST_BYTES` in float32 are computed
        in blocks that have less, one row at least.
    """

    def at_once(models: tuple[PyTree, ...], batch: Batch) -> PyTree:
        return values(tuple(apply(params, batch.inputs) for params in models), batch)

    outputs = tuple(apply(params, batch.inputs) for params in models)
    rows = outputs[0].shape[0] if outputs[0].ndim else 1
    most = MOST_BYTES * rows // max(4 * math.prod(outputs[0].shape), 1)
    if most >= rows:
        return values(outputs, batch)
    # What was traced above enters nothing, and so no program.
    size = next(n for n in range(max(most, 1), 0, -1) if rows % n == 0)

    # Block j has the rows j, j + n, j + 2n, ...: of rows that are split over devices each has some.
    def cut(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(size, rows // size, *x.shape[1:]), 1, 0)

    def joined(x: Any) -> Any:
        return jnp.moveaxis(x, 0, 1).reshape(rows, *x.shape[2:])

    block = jax.checkpoint(at_once)
    found = jax.lax.map(lambda part: block(models, part), jax.tree.map(cut, batch))
    return jax.tree.map(joined, found)

"""Logits of a large vocabulary a few rows at a time, so that they are never there as a whole.

Eight rows of 512 tokens have 2.5 GB of logits over 152k words in float32, and a loss and its
gradient several times that.  What is made of a row's outputs is of that row alone, so rows are
taken in blocks: values row by row are joined again (`in_row_blocks`, whose backward pass computes a
block's outputs once more), and sums over rows are added up (`sum_over_blocks`).
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch

MOST_BYTES = 2**28  # of a block's outputs in float32, on all devices together; arbitrary

Total = TypeVar("Total")


def num_blocks(outputs: Array | jax.ShapeDtypeStruct) -> int:
    """Return into how many blocks of as many rows a batch with these outputs is to be cut.

    A block's outputs have `MOST_BYTES` in float32 at most, or are those of one row. How rows lie is
    not known under a trace, so that the bound is of all devices together, and not of each: where a
    block has fewer rows than there are devices that share the rows, some have none of it.
    """
    rows = outputs.shape[0] if outputs.ndim else 0
    most = MOST_BYTES * rows // max(4 * math.prod(outputs.shape), 1)
    if most >= rows:
        return 1
    return rows // next(n for n in range(max(most, 1), 0, -1) if rows % n == 0)


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
        `values` of all rows.
    """

    def at_once(models: tuple[PyTree, ...], batch: Batch) -> PyTree:
        return values(tuple(apply(params, batch.inputs) for params in models), batch)

    outputs = tuple(apply(params, batch.inputs) for params in models)
    number = num_blocks(outputs[0])
    if number == 1:
        return values(outputs, batch)
    # What was traced above enters nothing, and so no program.
    block = jax.checkpoint(at_once)
    found = jax.lax.map(lambda part: block(models, part), cut(batch, number))
    # The rows in their order again, as `cut` took them apart.
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def sum_over_blocks(terms: Callable[[Batch], Total], batch: Batch, number: int) -> Total:
    """Return the sum over `number` blocks of a batch of what a function makes of each."""
    if number == 1:
        return terms(batch)

    def add(total: Total, part: Batch) -> tuple[Total, None]:
        return jax.tree.map(jnp.add, total, terms(part)), None

    parts = cut(batch, number)
    one = jax.eval_shape(terms, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    return jax.lax.scan(add, zero, parts)[0]


def pieces_of(apply: Apply, params: PyTree, batch: Batch) -> list[Batch]:
    """Return a batch in blocks of rows, for a program that is called with one after the other."""
    number = num_blocks(jax.eval_shape(apply, params, batch.inputs))
    if number == 1:
        return [batch]
    parts = cut(batch, number)
    return [jax.tree.map(lambda x, j=j: x[j], parts) for j in range(number)]


def cut(batch: Batch, number: int) -> Batch:
    """Return a batch whose arrays lead with the blocks, and then with a block's rows.

    Block j has the rows j, j + number, j + 2 number, ...: of rows that are split over devices each
    block has some of every device's.
    """

    def split(x: Any) -> Array:
        x = jnp.asarray(x)
        if not x.ndim:  # one number for all rows
            return jnp.broadcast_to(x, (number,))
        return jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)

"""Batches of equal shape out of arrays, so that a compiled step is compiled once."""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, check_numbers


def batches(
    examples: Batch,
    size: int,
    *,
    drop_remainder: bool = False,
    order: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Batch]:
    """Cut examples into batches that all have the same shapes.

    The last batch is filled up with rows of zeros whose `mask` and `valid` are zero, so that they
    count nowhere. A `mask` or `valid` that is None becomes all ones, that every batch may have one
    structure.

    Args:
        examples: the arrays to cut; examples come first in each.
        size: number of examples in a batch.
        drop_remainder: leave the examples out that do not fill a batch, instead of filling it up.
        order: indices of the examples in the order to take them (a permutation shuffles, a part
            selects); None: as they stand.

    Returns:
        An iterator over batches of JAX arrays.

    Raises:
        TypeError: an argument of another type.
        ValueError: `size` is not positive, or leaves no batch, or there are no targets.
    """
    check_numbers(COUNT, size=size)
    check_batch(examples, "examples")
    if examples.targets is None:
        raise ValueError("examples.targets is None: rows are counted by their targets")
    targets = np.asarray(examples.targets)
    ones = np.ones(targets.shape, np.float32)
    mask, valid = (ones if x is None else x for x in (examples.mask, examples.valid))
    whole = Batch(*jax.tree.map(np.asarray, (examples.inputs, targets, mask, valid)))
    order = np.arange(len(targets)) if order is None else np.asarray(order)
    num_batches = len(order) // size if drop_remainder else math.ceil(len(order) / size)
    if num_batches == 0:
        raise ValueError(
            f"{len(order)} examples make no batch of {size}"
            + (" when the remainder is dropped." if drop_remainder else ".")
        )
    # Not a generator itself: the checks above run when it is called, not when it is first used.
    return (_cut(whole, order[i * size : (i + 1) * size], size) for i in range(num_batches))


def _cut(whole: Batch, chosen: Int[np.ndarray, " chosen"], size: int) -> Batch:
    def rows(array: np.ndarray) -> Array:
        padding = np.zeros((size - len(chosen), *array.shape[1:]), array.dtype)
        return jnp.asarray(np.concatenate([array[chosen], padding]))

    return jax.tree.map(rows, whole)


def answers_only(batch: Batch) -> Batch:
    """Return the batch with what `mask` counts as all that is `valid`: the answers' tokens alone.

    A curvature's moments of inputs go over every position that is `valid`. Those of an engram are
    to go over the answers' tokens, as the loss does, and of a batch like this they do. What a model
    sees stays the same: no model reads `valid`.

    Raises:
        ValueError: the batch has no mask.
    """
    if batch.mask is None:
        raise ValueError("batch.mask says which outputs are answers; got None")
    counted = jnp.asarray(batch.mask)
    if batch.valid is not None:
        counted *= jnp.asarray(batch.valid).astype(counted.dtype)
    return batch._replace(mask=counted, valid=counted)


def stack_requests(requests: Sequence[Batch]) -> Batch:
    """Stack forget sets of different sizes for `batch_unlearn`, filled up where they are ragged.

    Rows and positions are filled up at the end, with zeros that neither `mask` nor `valid` count.

    Args:
        requests: R sets; their inputs are one array each, (rows, ...), and they agree in the
            number of axes.

    Returns:
        One batch whose leaves lead with R, (R, rows, ...), as wide as the largest set.

    Raises:
        TypeError: a request that is no batch, or that has several input arrays.
        ValueError: there are none, or they disagree in the number of axes.
    """
    if not requests:
        raise ValueError("there are no requests to stack.")
    whole = []
    for i, request in enumerate(requests):
        check_batch(request, f"requests[{i}]")
        if request.targets is None:
            raise ValueError(f"requests[{i}].targets is None: a request is to raise their loss")
        targets = np.asarray(request.targets)
        ones = np.ones(targets.shape, np.float32)
        mask, valid = (ones if x is None else np.asarray(x) for x in (request.mask, request.valid))
        whole.append((np.asarray(request.inputs), targets, mask, valid))
    stacked = []
    for arrays in zip(*whole, strict=True):
        if len({array.ndim for array in arrays}) > 1:
            shapes = ", ".join(str(shape) for shape in sorted({a.shape for a in arrays}))
            raise ValueError(f"the requests' arrays differ in the number of axes: {shapes}.")
        shape = np.max([array.shape for array in arrays], axis=0)
        filled = np.zeros((len(arrays), *shape), arrays[0].dtype)
        for i, array in enumerate(arrays):
            filled[(i, *(slice(n) for n in array.shape))] = array
        stacked.append(jnp.asarray(filled))
    return Batch(*stacked)

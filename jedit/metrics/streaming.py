"""Sums over batches, as means that weigh every counted output alike and as rows in their order."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jedit.core.arguments import check_function, check_params, checked_batches, refuse_tracers
from jedit.core.batch import Apply, Batch, PackedTokens
from jedit.core.devices import on_auto
from jedit.core.outputs import by_example, check_contents


def each_batch(
    apply: Apply,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    has_labels: bool = True,
) -> Iterator[Batch]:
    """Check a metric's arguments, and yield its batches.

    Args:
        apply: the model's function, `apply(params, inputs) -> outputs`.
        params: the model's parameters, or a sequence of several models'.
        batches: one batch, or several.
        has_labels: whether the targets are to be classes of the outputs.

    Yields:
        Each batch.

    Raises:
        TypeError: an argument of another type.
        ValueError: the params are traced; a mask of anything but 0 and 1, or a label that is no
            class of the outputs.
    """
    check_function(apply)
    check_params(params)
    refuse_tracers("a metric", params, "call it on the params that come out")
    for number, batch in enumerate(map(on_auto, checked_batches(batches))):
        limits = None
        if has_labels and batch.targets is not None:
            limits = (0, jax.eval_shape(apply, params, batch.inputs).shape[-1] - 1)
        check_contents(batch, f"batch {number}", limits=limits, must_count=False)
        yield batch


def mean_of_sums(sums: list[tuple[Array, Array]]) -> float:
    """Return the mean from each batch's (sum, count), both on the device until here.

    The last additions are in Python's float64: float32 cannot count beyond 2^24 tokens.

    Raises:
        ValueError: if nothing was counted.
    """
    totals, counts = zip(*jax.device_get(sums), strict=True) if sums else ((), ())
    count = sum(int(c) for c in counts)
    if count == 0:
        raise ValueError("no output counts: there are no batches, or mask and valid leave out all")
    return sum(float(t) for t in totals) / count


class RowSums(NamedTuple):
    """Sums over the counted outputs of each row of one batch, on the device.

    Attributes:
        totals: sum of each row; for a packed batch, the value of each output.
        counts: number of counted outputs in each total.
        rows: None, or for a packed batch the number of the row that each total belongs to.
    """

    totals: Shaped[Array, " sums"]
    counts: Int[Array, " sums"]
    rows: Int[Array, " sums"] | None = None


def sums_by_row(
    batch: Batch, values: Shaped[Array, "*lead"], counted: Bool[Array, "*lead"]
) -> RowSums:
    """Return the sums of values that are 0 where they do not count, for `rows_of_sums`."""
    if isinstance(batch.inputs, PackedTokens):
        # A row's outputs lie in one sequence; how many rows there are is known outside alone.
        flat = (x.reshape(-1) for x in (values, counted.astype(int), batch.inputs.segments))
        return RowSums(*flat)
    values, counted = (by_example(batch, x) for x in (values, counted))
    return RowSums(jnp.sum(values, axis=1), jnp.sum(counted, axis=1))


def rows_of_sums(sums: list[RowSums]) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return each example's sum, in float64, and count, from those of the batches.

    An example that counts nothing, such as one that fills up the last batch, is left out. Those of
    packed batches come in the order of their rows.

    Raises:
        ValueError: if some batches are packed and others are not.
    """
    parts = jax.device_get(sums)
    totals = np.concatenate([np.zeros(0), *(part.totals for part in parts)]).astype(np.float64)
    counts = np.concatenate([np.zeros(0, int), *(part.counts for part in parts)])
    numbers = [part.rows for part in parts if part.rows is not None]
    if numbers:
        if len(numbers) < len(parts):
            raise ValueError("some of the batches are packed and others are not; take all as one")
        rows = np.concatenate(numbers)
        # Rows are numbered from 1; number 0 is padding, which counts nothing and drops out below.
        totals, counts = (np.bincount(rows, weights=x) for x in (totals, counts))
        counts = counts.astype(int)
    return totals[counts > 0], counts[counts > 0]

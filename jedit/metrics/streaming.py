"""Sums over batches, as means that weigh every counted output alike and as rows in their order."""

from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jedit.typing import Batch


def each_batch(batches: Iterable[Batch] | Batch) -> Iterable[Batch]:
    """Return the batches; one batch by itself is a tuple, and would iterate over its fields."""
    return [batches] if isinstance(batches, Batch) else batches


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


def rows_of_sums(
    sums: list[tuple[Num[Array, " batch"], Int[Array, " batch"]]],
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return each example's sum, in float64, and count, from each batch's, both on the device.

    An example that counts nothing, such as one that fills up the last batch, is left out.
    """
    parts = jax.device_get(sums)
    totals = np.concatenate([np.zeros(0), *(s for s, _ in parts)]).astype(np.float64)
    counts = np.concatenate([np.zeros(0, int), *(c for _, c in parts)])
    return totals[counts > 0], counts[counts > 0]

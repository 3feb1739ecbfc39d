"""Means over batches that weigh every counted output alike, whatever batch it stands in."""

from collections.abc import Iterable

import jax
from jaxtyping import Array

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

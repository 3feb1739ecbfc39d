"""Which rows a step sees.

Rows are drawn epoch by epoch: epoch e is a permutation of the set, made from `fold_in(key, e)`, and
the epochs follow one another in one stream that is cut into batches.  So each row is seen equally
often, to within one, and the rows of step s depend on the key and on s: not on the number of steps,
not on where a run was broken off, not on the number of devices.

Where a method says which retain rows go beside which forget row, those are what a step sees of the
retain set.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from jedit.core.row_order import piece_of_rounds


def row_streams(
    sets: tuple[PyTree | None, ...],
    first: int,
    steps: int,
    batch_size: int,
    keys: Key[Array, " sets"],
) -> tuple[Int[Array, "steps size"] | None, ...]:
    """Return the row numbers of `steps` steps from `first` on, for each set."""
    return tuple(
        None if rows is None else row_stream(num_rows(rows), first, steps, batch_size, set_key)
        for rows, set_key in zip(sets, keys, strict=True)
    )


def row_stream(
    count: int, first: int, steps: int, batch_size: int, key: Key[Array, ""]
) -> Int[Array, "steps size"]:
    """Return a piece of the stream of permutations, end to end, cut into batches."""
    size = min(batch_size, count)
    epoch, offset = divmod(first * size, count)
    place = jnp.asarray([epoch, offset], jnp.int32)
    return piece_of_rounds(count, steps * size, place, key).reshape(steps, size)


def paired_stream(
    stream: Int[Array, "steps size"],
    first: int,
    pairing: Callable[..., np.ndarray],
    *,
    num_forget: int,
    num_retain: int,
) -> Int[Array, "steps beside"]:
    """Return the retain rows that go beside the forget rows of a stream, forget row by forget row.

    Args:
        stream: numbers of forget rows, from step `first` on.
        first: the first step.
        pairing: `(*, epoch) -> (num_forget, several)` numbers of retain rows.
        num_forget: how many forget rows there are.
        num_retain: how many retain rows there are.

    Raises:
        ValueError: the pairing gives something else.
    """
    steps, size = stream.shape
    epochs = (first * size + np.arange(steps * size)) // num_forget
    low, high = (int(epochs[0]), int(epochs[-1])) if epochs.size else (0, 0)
    tables = [
        _checked_table(pairing(epoch=e), num_forget, num_retain) for e in range(low, high + 1)
    ]
    several = {table.shape[1] for table in tables}
    if len(several) != 1:
        raise ValueError(f"pairing gave {sorted(several)} retain rows a forget row, by the epoch")
    found = jnp.asarray(np.stack(tables))[(epochs - low).reshape(steps, size), stream]
    return found.reshape(steps, -1)


def _checked_table(table: np.ndarray, num_forget: int, num_retain: int) -> np.ndarray:
    table = np.asarray(table)
    is_whole = np.issubdtype(table.dtype, np.integer)
    if table.ndim != 2 or len(table) != num_forget or not table.size or not is_whole:
        raise ValueError(
            f"pairing must give ({num_forget}, several) row numbers, some for each forget row; got "
            f"{table.shape}, {table.dtype}"
        )
    if table.min() < 0 or table.max() >= num_retain:
        raise ValueError(
            f"pairing must give numbers of retain rows, from 0 to {num_retain - 1}; got "
            f"{table.min()} to {table.max()}"
        )
    return table.astype(np.int32)


def num_rows(rows: PyTree) -> int:
    """Return the common leading size of all leaves.

    Raises:
        ValueError: the leaves have no common size, or it is 0.
    """
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(rows)}
    if len(sizes) != 1 or sizes == {0}:
        shapes = [leaf.shape for leaf in jax.tree.leaves(rows)]
        raise ValueError(
            f"the arrays of a set must lead with its rows, the same number and at least 1; got "
            f"shapes {shapes}"
        )
    return sizes.pop()

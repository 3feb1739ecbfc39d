"""Which rows a step sees, where each comes in all of its views and then rests (view-batch replay).

    step s sees, of the stream of permutations in which every row stands V times in a row, the
    places s B to (s + 1) B - 1

A visit is the step in which a row is seen in all of its views; the recall interval is the number of
steps from one visit to the next, n V / B on average.  With a new permutation each round, as the
released code has it (Lee et al., arXiv 2503.18371), it lies anywhere up to almost twice that; it is
0 where B / V does not divide n and one step ends a round and begins the next with the same row.
With one permutation for all rounds it is n V / B exactly, if B / V divides n, and else to within
one step: that is ours, and makes "enough rest" a number.

What a step sees depends on the key and on the step alone: a run that was broken off goes on from
any step, and shapes are static.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jedit.core.checks import COUNT, COUNT_OR_ZERO, POSITIVE, check_numbers
from jedit.core.row_order import piece_of_rounds


def view_batches(
    num_rows: int,
    *,
    first: int,
    steps: int,
    batch_size: int,
    views: int,
    key: Key[Array, ""],
    is_fixed: bool = False,
) -> Int[Array, "steps batch_size"]:
    """Return the numbers of what each step sees.

        numbers = view_batches(len(rows), first=0, steps=100, batch_size=32, views=4, key=key)
        row, view = divmod(numbers[step], 4)

    Args:
        num_rows: n, how many rows there are.
        first: the first step, from 0.
        steps: how many steps.
        batch_size: B, views in a step; a multiple of `views`.
        views: V, views of each row.
        key: the random key of the permutations.
        is_fixed: one permutation for all rounds, so that each row rests equally long; otherwise a
            new one each round, as the released code has it.

    Returns:
        Numbers of views, view v of row i being i V + v; those of one row stand together.

    Raises:
        ValueError: a number out of its range, or `batch_size` is no multiple of `views`, or holds
            more rows than there are.
    """
    check_numbers(COUNT, num_rows=num_rows, steps=steps, batch_size=batch_size, views=views)
    check_numbers(COUNT_OR_ZERO, first=first)
    if batch_size % views or batch_size // views > num_rows:
        raise ValueError(
            "batch_size must be a multiple of views, and hold no more rows than there are; got "
            f"{batch_size} for {num_rows} rows of {views} views"
        )
    visits = batch_size // views
    round_, place = divmod(first * visits, num_rows)
    at = jnp.asarray([round_, place], jnp.int32)
    rows = piece_of_rounds(num_rows, steps * visits, at, key, is_fixed=is_fixed)
    numbers = rows[:, None] * views + jnp.arange(views, dtype=rows.dtype)[None]
    return numbers.reshape(steps, batch_size)


def views_for(interval: float, *, num_rows: int, batch_size: int) -> int:
    """Return V, the divisor of the batch size with which rows rest nearest to an interval.

    Args:
        interval: wanted steps from one visit to a row to the next.
        num_rows: how many rows there are.
        batch_size: views in a step.
    """
    check_numbers(POSITIVE, interval=interval)
    check_numbers(COUNT, num_rows=num_rows, batch_size=batch_size)
    divisors = np.array([v for v in range(1, batch_size + 1) if batch_size % v == 0])
    return int(divisors[np.argmin(np.abs(num_rows * divisors / batch_size - interval))])

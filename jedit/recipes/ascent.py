"""The baselines' loop: Adam on an objective of forget and retain rows, seen at several lengths."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.recipes.training import rows_of
from jedit.typing import Batch

OPTIMIZER = optax.scale_by_adam()


def ascend(
    objective: Callable,
    params: PyTree,
    forget: Batch,
    retain: Batch,
    *,
    learning_rate: float,
    looks: tuple[int, ...],
    batch_size: int,
    key: Array,
) -> Iterator[tuple[int, float, PyTree]]:
    """Run the loop, stopping to look after the given numbers of steps.

    The learning rate is an argument of the compiled step, so that a grid of them compiles once. The
    forget set is gone through in a new random order each time; retain rows are drawn likewise.

    Args:
        objective: `(params, forget, retain, reference params) -> (scalar, aux)`, lowered.
        params: where to begin; they are also the reference.
        forget: the rows to be forgotten.
        retain: the rows to be kept.
        learning_rate: of Adam.
        looks: the numbers of steps, rising.
        batch_size: rows of either set in one step; fewer if the set has fewer.
        key: of the orders.

    Yields:
        Steps taken, seconds they took without compiling, and the params there.
    """
    reference, state, seconds = params, OPTIMIZER.init(params), 0.0
    draws = [
        _draws(batch, looks[-1], min(batch_size, rows_of(batch)), key=subkey)
        for batch, subkey in zip((forget, retain), jax.random.split(key), strict=True)
    ]
    rate = jnp.asarray(learning_rate, jnp.float32)
    # Once for nothing: the clock below must not see the compiler.
    jax.block_until_ready(
        _step(objective, params, state, draws[0][0], draws[1][0], rate, reference)
    )
    for first, last in itertools.pairwise((0, *looks)):
        start = time.perf_counter()
        for i in range(first, last):
            params, state = _step(
                objective, params, state, draws[0][i], draws[1][i], rate, reference
            )
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        yield last, seconds, params


@functools.partial(jax.jit, static_argnames="objective")
def _step(objective, params, state, forget, retain, rate, reference):
    gradient, _ = jax.grad(objective, has_aux=True)(params, forget, retain, reference)
    updates, state = OPTIMIZER.update(gradient, state)
    params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, params, updates)
    return params, state


def _draws(batch: Batch, total: int, size: int, *, key: Array) -> list[Batch]:
    """The rows of each step, from one random order of the set after another."""
    batch = jax.tree.map(np.asarray, batch)
    num_rows = rows_of(batch)
    rounds = -(-total * size // num_rows)
    keys = jax.random.split(key, rounds)
    orders = np.asarray(jax.vmap(lambda k: jax.random.permutation(k, num_rows))(keys))
    orders = orders.reshape(-1)[: total * size].reshape(total, size)
    return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in orders]

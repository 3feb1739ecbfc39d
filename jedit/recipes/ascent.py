"""The methods that train, each seen at several lengths of one run."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.methods import TrainingMethod
from jedit.typing import Batch
from jedit.unlearn import History, LoopState, unlearn


def ascend(
    method: TrainingMethod,
    params: PyTree,
    forget: Batch | tuple[Batch, Batch],
    retain: Batch,
    *,
    learning_rate: float,
    looks: tuple[int, ...],
    batch_size: int,
    key: Array,
) -> list[tuple[int, float, PyTree]]:
    """Run the loop, and look after the given numbers of steps.

    Args:
        method: its objective takes `reference_params`, its optimizer's state holds the rate.
        params: where to begin; they are also the reference.
        forget: the rows to be forgotten.
        retain: the rows to be kept.
        learning_rate: put into the optimizer's state.
        looks: the numbers of steps, rising.
        batch_size: rows of either set in one step; fewer if the set has fewer.
        key: of the orders.

    Returns:
        Steps taken, seconds they took without compiling, and the params there, for each look.
    """
    state = method.optimizer.init(params)
    rate = jnp.full_like(optax.tree_utils.tree_get(state, "learning_rate"), learning_rate)
    state = optax.tree_utils.tree_set(state, learning_rate=rate)
    every = math.gcd(*looks)
    run = functools.partial(
        unlearn,
        method.objective,
        method.optimizer,
        LoopState(0, params, state),
        jax.tree.map(jnp.asarray, forget),
        jax.tree.map(jnp.asarray, retain),
        key=key,
        batch_size=batch_size,
        update_args=method.update_args,
        objective_args={"reference_params": params},
    )
    # Once for nothing: the clock must not see the compiler.
    jax.block_until_ready(run(steps=every))
    found, seconds, start = [], 0.0, time.perf_counter()

    def look(state: LoopState, history: History) -> None:
        nonlocal seconds, start
        jax.block_until_ready((state, history))
        seconds += time.perf_counter() - start
        if state.step in looks:
            found.append((state.step, seconds, jax.tree.map(jnp.copy, state.params)))
        start = time.perf_counter()

    run(steps=looks[-1], every=every, callback=look)
    return found

"""Training the models that a scene is about: Adam, a short warm-up, then a constant rate.

The rate stays constant so that a model stopped early is a point of the longer training.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.objectives import retain_nll
from jedit.typing import Batch

WARM_UP = 20


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
        epochs: passes over the rows; the model is kept after each of these.
        batch_size: rows of a step; what does not fill an epoch's last batch is left out of it.
        learning_rate: of Adam, after the warm-up.
    """

    epochs: tuple[int, ...]
    batch_size: int
    learning_rate: float

    def __str__(self) -> str:
        """The recipe in words."""
        lengths = " or ".join(map(str, self.epochs))
        return (
            f"{lengths} epochs, Adam at learning rate {self.learning_rate:g} after {WARM_UP} steps "
            f"of warm-up, batches of {self.batch_size} rows"
        )


class Trained(NamedTuple):
    """A model after so many epochs, and the seconds up to there (compiling included)."""

    params: PyTree
    epochs: int
    seconds: float


def train(
    apply: Callable, params: PyTree, rows: Batch, recipe: Recipe, *, key: Array
) -> list[Trained]:
    """Train by the recipe on the mean loss over counted outputs.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: where to begin.
        rows: what to train on.
        recipe: how.
        key: of the order of the rows.

    Returns:
        The model after each of the recipe's numbers of epochs.
    """
    start = time.perf_counter()
    rows = jax.tree.map(np.asarray, rows)
    num_rows = rows_of(rows)
    size = min(recipe.batch_size, num_rows)
    optimizer = _optimizer(recipe.learning_rate)
    state = optimizer.init(params)
    found = []
    for epoch in range(max(recipe.epochs)):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), num_rows)
        order = np.asarray(order)[: num_rows // size * size].reshape(-1, size)
        for chosen in order:
            # Cut on the host: the compiled step knows the batch, and not how many rows there are.
            batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], rows)
            params, state = _step(apply, optimizer.update, params, state, batch)
        if epoch + 1 in recipe.epochs:
            jax.block_until_ready(params)
            found.append(Trained(params, epoch + 1, time.perf_counter() - start))
    return found


def rows_of(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(jax.tree.leaves(batch.inputs)[0])


@functools.cache
def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0.0, learning_rate, WARM_UP)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(apply, update, params, state, batch):
    def loss(params):
        return retain_nll(params, None, batch, apply=apply)

    gradient, _ = jax.grad(loss, has_aux=True)(params)
    updates, state = update(gradient, state, params)
    return optax.apply_updates(params, updates), state

"""Training the models that a scene is about: Adam, a short warm-up, then a constant rate.

The rate stays constant so that a model stopped early is a point of the longer training.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.objectives import RetainNLL
from jedit.recipes.progress import Say, ignore, tell
from jedit.training import LoopState, Watch, fit
from jedit.training.watch import History

WARM_UP = 20


class Recipe(NamedTuple):
    """Settings of a training with Adam: its length, its batches and its learning rate.

    Attributes:
        epochs: numbers of passes over the rows; the model is kept after each of these.
        batch_size: number of rows in a step; an epoch is as many steps as there are whole batches.
        learning_rate: Adam's learning rate after the warm-up.
    """

    epochs: tuple[int, ...]
    batch_size: int
    learning_rate: float

    def __str__(self) -> str:
        """Write the recipe in words."""
        lengths = " or ".join(map(str, self.epochs))
        return (
            f"{lengths} epochs, Adam at learning rate {self.learning_rate:g} after {WARM_UP} steps "
            f"of warm-up, batches of {self.batch_size} rows"
        )


class Trained(NamedTuple):
    """A model after so many epochs, and the seconds up to there, compiling included."""

    params: PyTree
    epochs: int
    seconds: float


def train(
    apply: Callable,
    params: PyTree,
    rows: Batch,
    recipe: Recipe,
    *,
    key: Array,
    say: Say = ignore,
) -> list[Trained]:
    """Train by the recipe on the mean loss over counted outputs.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters to begin with.
        rows: the rows to train on.
        recipe: how long, in which batches and at which rate to train.
        key: key of the order of the rows.
        say: a watcher, told after each epoch how far the training is.

    Returns:
        The model after each of the recipe's numbers of epochs.
    """
    start = time.perf_counter()
    size = min(recipe.batch_size, rows_of(rows))
    steps = rows_of(rows) // size
    found = []

    def keep(state: LoopState, history: History) -> None:
        del history
        epochs = state.step // steps
        tell(say, epochs, max(recipe.epochs))
        if epochs in recipe.epochs:
            # A copy, since the loop's next step writes into this memory; waited for, since dispatch
            # is asynchronous and the seconds would else be too few.
            kept = jax.block_until_ready(jax.tree.map(jnp.copy, state.params))
            found.append(Trained(kept, epochs, time.perf_counter() - start))

    fit(
        _Loss(apply),
        _optimizer(recipe.learning_rate),
        params,
        rows,
        epochs=max(recipe.epochs) * steps * size / rows_of(rows),  # whole batches alone
        key=key,
        batch_size=size,
        watch=Watch(keep, every=steps),
    )
    return found


def rows_of(batch: Batch) -> int:
    """Return how many examples a batch holds."""
    return len(jax.tree.leaves(batch.inputs)[0])


@functools.cache
def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0.0, learning_rate, WARM_UP)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of one model, equal by value, so that a second training compiles nothing anew."""

    apply: Callable

    def __call__(self, params: PyTree, rows: Batch) -> tuple[Array, dict[str, Array]]:
        return RetainNLL()(self.apply, params, None, rows)

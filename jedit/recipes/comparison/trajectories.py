"""The methods that train, each seen at several lengths of one run."""

import functools
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.methods.row import ForgetRows
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from jedit.training.freezing import split, which_are_trained
from jedit.training.method import prepared
from jedit.training.rate import with_learning_rate
from jedit.training.watch import History


def ascend(
    method: TrainingMethod,
    apply: Callable,
    params: PyTree,
    forget: ForgetRows,
    retain: Batch,
    *,
    learning_rates: tuple[float, ...],
    looks: tuple[int, ...],
    key: Array,
) -> Iterator[list[tuple[int, float, PyTree]]]:
    """Run the loop at each rate, and look after the given numbers of steps.

    Args:
        method: its optimizer's state holds the rate.
        apply: `apply(params, inputs) -> outputs`.
        params: where to begin; they are also the reference.
        forget: the rows to be forgotten.
        retain: the rows to be kept.
        learning_rates: put into the optimizer's state, one after the other.
        looks: the numbers of steps, rising.
        key: of the orders.

    Yields:
        For each rate the steps taken, the seconds they took without compiling, and the params
        there, for each look.
    """
    every = math.gcd(*looks)
    sets = tuple(jax.tree.map(jnp.asarray, rows) for rows in (forget, retain))
    method, (forget, retain) = prepared(method, apply, params, sets)
    for i, learning_rate in enumerate(learning_rates):
        run = functools.partial(
            unlearn,
            method,
            apply,
            start_at(method, params, learning_rate),
            forget,
            retain,
            key=key,
        )
        looked = _Looks(looks)
        try:
            if i == 0:  # once for nothing: the clock must not see the compiler
                jax.block_until_ready(run(steps=every))
                looked = _Looks(looks)
            run(steps=looks[-1], watch=Watch(looked, every))
        except FloatingPointError:  # the rate was too large
            looked.fill(destroyed(params))
        yield looked.found


def start_at(method: TrainingMethod, params: PyTree, learning_rate: float) -> LoopState:
    """Return where a method's loop begins, with the rate put into its optimizer's state."""
    state = method.optimizer.init(split(params, which_are_trained(params, method.trainable)))
    return LoopState(0, params, with_learning_rate(state, learning_rate))


def destroyed(params: PyTree) -> PyTree:
    """What stands in a comparison for a model that a loop has driven beyond the finite numbers."""
    return jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)


class _Looks:
    """Keeps the params at the looks, and stops the clock while it does."""

    def __init__(self, looks: tuple[int, ...]):
        self.looks, self.found = looks, []
        self._seconds, self._start = 0.0, time.perf_counter()

    def __call__(self, state: LoopState, history: History) -> None:
        jax.block_until_ready((state, history))
        self._seconds += time.perf_counter() - self._start
        if state.step in self.looks:
            params = jax.tree.map(jnp.copy, state.params)
            self.found.append((state.step, self._seconds, params))
        self._start = time.perf_counter()

    def fill(self, params: PyTree) -> None:
        """Take the same params at all looks that are still to come."""
        seen = {step for step, *_ in self.found}
        self.found += [(step, self._seconds, params) for step in self.looks if step not in seen]

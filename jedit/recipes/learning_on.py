"""Learn tasks one after the other, and look at all of them at every step: the stability gap.

A `Learner` says how a task is learnt and what is kept of it.  `learn_on` runs it over a stream, in
the one training loop of jedit: the rows of the task stand in the place of the forget set, the rows
that are kept in that of the retain set, and what else is kept (anchors and curvatures, intervals,
gradients) is the objective's *reference*, an argument of the compiled steps, so that all tasks but
the first share one program where shapes stay the same.

Reported are the scores of all tasks after every update and what De Lange et al. (arXiv 2205.13452)
make of them: what a task falls to on the way, and not only what it is at the end.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.display import short_repr
from jedit.metrics.stability import (
    minimum_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from jedit.objectives import LearnNLL
from jedit.training import LoopState, TrainingMethod, Watch, unlearn

WINDOWS = (10, 100)  # De Lange et al., both windows of their tables


class Kept(NamedTuple):
    """What a learner keeps when a task has been learnt.

    Attributes:
        rows: rows of earlier tasks, which the objective sees as its retain set; None: none.
        reference: what the objective sees as its reference: any pytree of arrays; None: the params
            at the beginning of the task.
        rest: what `Learner.keep` itself goes on with, and no step sees.
    """

    rows: PyTree | None = None
    reference: PyTree | None = None
    rest: Any = None

    __repr__ = short_repr


class Learner(NamedTuple):
    """How tasks are learnt one after the other, and what is kept of each.

        Learner(TrainingMethod(LearnNLL(), optax.sgd(0.1)))                        # nothing is kept
        Learner(TrainingMethod(with_retain(LearnNLL()), optax.sgd(0.1)), keep)     # replay

    Attributes:
        method: how the second task and all later ones are learnt: `forget` are the rows of the
            task, `retain` and `reference` what is kept. Or a function of what is kept that makes
            one, for methods whose arrays stand in the optimizer; it compiles anew at every task.
        keep: `(apply, params, rows, kept, *, key) -> Kept`, called when a task has been learnt;
            `kept` is that of the task before, None after the first. None: nothing is kept.
        first: how the first task is learnt, of which nothing is kept yet; None: by the plain
            `LearnNLL` with the optimizer of `method`, if that is no function and needs no argument
            out of what is kept.
    """

    method: TrainingMethod | Callable[[Kept], TrainingMethod]
    keep: Callable[..., Kept] | None = None
    first: TrainingMethod | None = None

    __repr__ = short_repr


class Learnt(NamedTuple):
    """What came of a stream of tasks.

    Attributes:
        params: the parameters after the last task.
        scores: one score a task at every look, the first before any update.
        updates: how many updates were made before each look.
        ends: for each task, the look at which it had been learnt.
    """

    params: PyTree
    scores: Float[np.ndarray, "looks tasks"]
    updates: Int[np.ndarray, " looks"]
    ends: Int[np.ndarray, " tasks"]

    __repr__ = short_repr


class Stability(NamedTuple):
    """What the scores come to; the windows count looks, which are updates if each was looked at.

    Attributes:
        final: mean score of all tasks at the end.
        minimum: min-ACC, from when each task had been learnt.
        worst_case: WC-ACC.
        forgetting: WF^w by window w, from when each task was begun; lower is better.
        plasticity: WP^w by window w.
    """

    final: float
    minimum: float
    worst_case: float
    forgetting: dict[int, float]
    plasticity: dict[int, float]


def learn_on(
    learner: Learner,
    apply: Apply,
    params: PyTree,
    tasks: Sequence[PyTree],
    *,
    steps: int,
    evaluate: Callable[[PyTree], Float[Array, " tasks"]],
    key: Key[Array, ""],
    every: int = 1,
) -> Learnt:
    """Learn the tasks in turn, and score all of them at every look.

    The optimizer begins each task anew.

    Args:
        learner: how they are learnt, and what is kept.
        apply: `apply(params, inputs) -> outputs`.
        params: where to begin.
        tasks: the rows of each task, a batch or `Views`, in the order in which they are learnt.
        steps: updates on each task.
        evaluate: `params -> (tasks,)`, the scores, such as `accuracies` makes.
        key: the random key; learners that differ in their method alone see the same rows of a task
            in the same order.
        every: updates between two looks, which divide `steps`; 1: at every update, as the stability
            gap asks for.

    Raises:
        ValueError: fewer than two tasks, or `every` does not divide `steps`.
    """
    check_numbers(COUNT, steps=steps, every=every)
    if len(tasks) < 2:
        raise ValueError(f"learning on needs at least two tasks, got {len(tasks)}")
    if steps % every:
        raise ValueError(f"every must divide steps, got {every} and {steps}")
    scores, updates = [_scores(evaluate, params, len(tasks))], [0]
    kept: Kept | None = None
    for number, rows in enumerate(tasks):
        order, own = jax.random.split(jax.random.fold_in(key, number))

        def look(state: LoopState, history: Any, done: int = number * steps) -> None:
            del history
            scores.append(_scores(evaluate, state.params, len(tasks)))
            updates.append(done + state.step)

        here = Kept() if kept is None else kept
        params, _ = unlearn(
            _method(learner, here) if number else _first(learner),
            apply,
            LoopState(0, params, None, here.reference),
            rows,
            here.rows,
            steps=steps,
            key=order,
            watch=Watch(look, every=every),
        )
        # After the last task nothing is learnt for which something had to be kept.
        if learner.keep is not None and number + 1 < len(tasks):
            kept = learner.keep(apply, params, rows, kept, key=own)
    ends = (np.arange(len(tasks)) + 1) * (steps // every)
    return Learnt(params, np.stack(scores), np.asarray(updates), ends)


def accuracies(apply: Apply, tests: Sequence[Batch]) -> Callable[[PyTree], Float[Array, " tasks"]]:
    """Return the function of params that gives the accuracy on each test set, compiled.

    All test sets stay on the device; their outputs are made one set after the other.
    """
    fixed = tuple(jax.tree.map(jnp.asarray, tuple(tests)))
    return lambda params: _accuracies(apply, params, fixed)


@functools.partial(jax.jit, static_argnums=0)
def _accuracies(apply: Apply, params: PyTree, tests: tuple[Batch, ...]) -> Array:
    """Compile once for streams of one shape: that of another seed runs the same program."""
    from jedit.metrics._greedy import greedy_hits

    found = (greedy_hits(params, test, apply=apply) for test in tests)
    return jnp.stack([jnp.sum(hits) / jnp.sum(counted) for hits, counted in found])


def stability(learnt: Learnt, windows: Sequence[int] = WINDOWS) -> Stability:
    """Return what the scores of a stream come to.

    Args:
        learnt: a stream that has been learnt.
        windows: w of WF^w and WP^w, in looks; 10 and 100 are De Lange et al.'s.
    """
    scores, ends = learnt.scores, learnt.ends
    begun = np.concatenate([[0], ends[:-1]])
    last = float(scores[-1, -1])
    return Stability(
        float(np.mean(scores[-1])),
        minimum_accuracy(scores, ends),
        worst_case_accuracy(scores, last, ends),
        {w: windowed_forgetting(scores, w, begun) for w in windows},
        {w: windowed_plasticity(scores, w, begun) for w in windows},
    )


def plain(optimizer: optax.GradientTransformation, batch_size: int = 32) -> TrainingMethod:
    """Return the method by which a first task is learnt: the mean NLL of its rows."""
    return TrainingMethod(LearnNLL(), optimizer, batch_size=batch_size)


def _method(learner: Learner, kept: Kept) -> TrainingMethod:
    method = learner.method
    return method if isinstance(method, TrainingMethod) else method(kept)


def _first(learner: Learner) -> TrainingMethod:
    method = learner.method
    if learner.first is not None:
        return learner.first
    if not isinstance(method, TrainingMethod):
        raise ValueError(
            "a learner whose method is a function of what is kept needs `first`, the method of the "
            "first task; `plain(optimizer)` is one"
        )
    return TrainingMethod(
        LearnNLL(), method.optimizer, trainable=method.trainable, batch_size=method.batch_size
    )


def _scores(evaluate: Callable, params: PyTree, num_tasks: int) -> np.ndarray:
    found = np.asarray(evaluate(params), np.float64)
    if found.shape != (num_tasks,):
        raise ValueError(
            f"evaluate must return one score for each of {num_tasks} tasks, got {found.shape}"
        )
    return found

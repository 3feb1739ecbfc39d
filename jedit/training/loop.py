"""The one training loop: `unlearn` on a forget and a retain set, `fit` on a single one.

The steps between two looks run in one compiled call (`jedit.training.steps`).  The sets stay on the
device; which rows a step sees is said in `jedit.training.rows`.  Where a set's rows are split over
a mesh, so is every batch of them, and parameters stay where they were.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.arguments import (
    check_checkpoint,
    check_function,
    check_key,
    check_kind,
    check_optimizer,
    check_params,
)
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers, loop_failure
from jedit.core.devices import on_auto, on_auto_axes, places_of, row_sharding
from jedit.core.outputs import check_sets
from jedit.training.freezing import merge, split, which_are_trained
from jedit.training.method import TrainingMethod, prepared
from jedit.training.rows import num_rows, paired_stream, row_streams
from jedit.training.steps import Program, Read, advance, joined
from jedit.training.watch import History, LoopState, Watch

# What a number of epochs may be off by, in steps, when it was divided out of a number of steps.
SLACK = 1e-6


@on_auto_axes
def unlearn(
    method: TrainingMethod,
    apply: Callable[[PyTree, PyTree], Array],
    params: PyTree | LoopState,
    forget: Batch | PyTree,
    retain: Batch | PyTree | None = None,
    *,
    steps: int,
    key: Key[Array, ""],
    watch: Watch | None = None,
) -> tuple[PyTree, History]:
    """Run a method that trains over draws of forget and retain rows.

        method = TrainingMethod(with_retain(NPO()), optax.adam(1e-4))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Calling again with equal objectives, the same `apply` and optimizer and the same shapes does not
    compile again.  The given params are copied, not overwritten: they are the reference that
    objectives compare with, an argument of the compiled steps and not a constant of them.

    Args:
        method: what to lower and how, such as `methods.rosu` returns it.
        apply: `apply(params, inputs) -> outputs`.
        params: where to start: parameters, or a `LoopState`, to go on with a run broken off there;
            it keeps the first reference.
        forget: the whole forget set, a Batch or any pytree whose leaves lead with the rows.
        retain: the whole retain set, of the same kind, or None for objectives that do without.
        steps: number of updates in all, those before a given `LoopState` included.
        key: the random key that decides which rows a step sees.
        watch: who looks on, and what is saved; None: nobody and nothing.

    Returns:
        The new params, and a dict of arrays with one entry per step taken: "loss" and what aux
        holds, at the params before the step's update.

    Raises:
        TypeError: an argument is something else, or an objective cannot be hashed.
        ValueError: negative steps, sets without rows or that count no output, masks that are none,
            or nothing to train; the checkpoint is of another call, or its `every` is no multiple of
            the callback's.
        FloatingPointError: a loss, or a parameter after the last step or before a callback, is not
            finite: it says at which step, and whether parameters or rows were so from the start.
    """
    check_numbers(COUNT_OR_ZERO, steps=steps)
    check_kind(method, TrainingMethod, "method", "such as TrainingMethod(objective, optimizer)")
    check_function(apply)
    five = "(apply, params, forget, retain, reference)"
    check_function(method.objective, "objective", five)
    if method.update_args is not None:
        check_function(method.update_args, "update_args", five)
    if method.prepare is not None:
        check_function(method.prepare, "prepare", "(apply, reference, forget, retain)")
    for name in ("objective", "update_args"):
        _check_hashable(getattr(method, name), name)
    extra = method.update_args
    how = _How(
        _OfSets(method.objective, apply),
        method.optimizer,
        None if extra is None else _OfSets(extra, apply),
        method.trainable,
        method.batch_size,
        method.pairing,
    )
    if method.prepare is not None:
        start = params if isinstance(params, LoopState) else LoopState(0, params, None)
        reference = start.params if start.reference is None else start.reference
        check_params(reference)
        given = jax.tree.map(jnp.asarray, (forget, retain))
        method, (forget, retain) = prepared(method, apply, reference, given)
    sets = {"forget": forget, "retain": retain}
    return _train(how, params, sets, steps=steps, key=key, watch=watch)


@on_auto_axes
def fit(
    loss: Callable[[PyTree, PyTree], tuple[Float[Array, ""], dict[str, Array]]],
    optimizer: optax.GradientTransformation,
    params: PyTree | LoopState,
    data: Batch | PyTree,
    *,
    epochs: float | int,
    key: Key[Array, ""],
    batch_size: int = 32,
    watch: Watch | None = None,
) -> tuple[PyTree, History]:
    """Train on one set: `unlearn`'s loop with `loss(params, rows) -> (scalar, aux)`.

    Args:
        loss: what to minimise; aux is a dict of scalars.
        optimizer: any optax transform of the gradients.
        params: where to start: parameters, or a `LoopState`, to go on with a run broken off there.
        data: the whole set, a Batch or any pytree whose leaves lead with the rows.
        epochs: how often each row is seen, in fractions too; rounded up to whole steps.
        key: the random key that decides which rows a step sees.
        batch_size: rows in a step, 32 (arbitrary); a smaller set is taken whole.
        watch: who looks on, and what is saved; None: nobody and nothing.

    Returns:
        The new params, and a dict of arrays with one entry per step taken, as `unlearn` returns.

    Raises:
        TypeError: an argument is something else.
        ValueError: there are no rows or nothing to train, a number is out of its range, or the
            checkpoint is of another call.
        FloatingPointError: a loss or a parameter is not finite, as `unlearn` says it.
    """
    check_numbers(NOT_NEGATIVE, epochs=epochs)
    check_numbers(COUNT, batch_size=batch_size)
    check_function(loss, "loss", "(params, rows)")
    if data is None:
        raise ValueError("there are no rows to train on, got None")
    count = num_rows(data)
    steps = math.ceil(epochs * count / min(batch_size, count) - SLACK)
    how = _How(_OfRows(loss), optimizer, None, None, batch_size)
    return _train(how, params, {"data": data}, steps=steps, key=key, watch=watch)


class _How(NamedTuple):
    """The functions and settings of a loop that do not depend on its sets."""

    objective: Callable
    optimizer: optax.GradientTransformation
    update_args: Callable | None
    trainable: str | None
    batch_size: int
    pairing: Callable | None = None


@dataclasses.dataclass(frozen=True)
class _OfSets:
    """An objective, or its `update_args`, as the steps call it: equal by value."""

    function: Callable
    apply: Callable

    def __call__(self, params: PyTree, drawn: tuple, reference: PyTree) -> Any:
        return self.function(self.apply, params, *drawn, reference)


@dataclasses.dataclass(frozen=True)
class _OfRows:
    """A loss of one set's rows, as the steps call it: equal by value."""

    function: Callable

    def __call__(self, params: PyTree, drawn: tuple, reference: PyTree) -> Any:
        del reference  # a loss of `fit` has none
        return self.function(params, *drawn)


def _beside(stream: Any, first: int, pairing: Callable, sets: tuple) -> Array:
    forget, retain = sets
    if forget is None or retain is None:
        raise ValueError("the method has a pairing, of retain rows with forget rows; give it both")
    counts = {"num_forget": num_rows(forget), "num_retain": num_rows(retain)}
    return paired_stream(stream, first, pairing, **counts)


def _check_hashable(value: Any, name: str) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"the {name} is an argument of the compiler, so it must be hashable: a function, or a "
            f"frozen dataclass of numbers and functions; got {value!r}"
        ) from error


def _train(
    how: _How,
    params: PyTree | LoopState,
    named: dict[str, PyTree | None],
    *,
    steps: int,
    key: Array,
    watch: Watch | None,
) -> tuple[PyTree, History]:
    watch = Watch() if watch is None else watch
    check_kind(watch, Watch, "watch", "such as Watch(callback, every=10)")
    callback, every, checkpoint = watch
    check_numbers(COUNT, batch_size=how.batch_size, every=every)
    start = params if isinstance(params, LoopState) else LoopState(0, params, None)
    check_optimizer(how.optimizer)
    check_params(start.params)
    check_key(key)
    check_checkpoint(checkpoint)
    if all(rows is None for rows in named.values()):
        raise ValueError("there are no rows to train on, got None")
    params, is_trained = start.params, which_are_trained(start.params, how.trainable)
    begin = int(start.step)  # an array, after a checkpoint
    state = start.optimizer_state
    if state is None:
        # Large arrays that a transform holds go into its state, and with it into the call as
        # arguments; made under jit they would be constants of the program.
        # A curvature that a transform holds may lie on explicit axes, which this loop does not see.
        state = on_auto(how.optimizer.init(split(params, is_trained)))
    # The compiled call overwrites what it is given, and somebody else may hold these.
    trained, state = jax.tree.map(jnp.copy, (split(params, is_trained), state))
    check_sets(named)
    sets = jax.tree.map(jnp.asarray, tuple(named.values()))
    reference = params if start.reference is None else start.reference
    read = Read(params, reference, sets)
    program = Program(
        *how[:3],
        is_trained,
        places_of((trained, state)),
        tuple(row_sharding(rows) for rows in sets),
    )
    keys = jax.random.split(key, len(sets))
    origin, histories = begin, []
    with contextlib.nullcontext() if checkpoint is None else contextlib.closing(checkpoint):
        if checkpoint is not None:
            every = every if callback is not None and every is not None else checkpoint.every
            if checkpoint.every % every:
                raise ValueError(
                    f"the checkpoint's every must be a multiple of the callback's, got "
                    f"{checkpoint.every} and {every}"
                )
            fixed = (how.batch_size, how.trainable, begin, every)
            given = (params, start.reference, state, key, sets, fixed)
            if how.pairing is not None:
                given += (how.pairing(epoch=0),)
            done, (trained, state), past = checkpoint.resume("loop", given, (trained, state))
            if done:
                begin = done
                histories.append(past)
        stop = max(steps, begin)
        # Where the loop stops to be looked at; with no step to take it runs once, for the history.
        marks = [*(range(begin, stop, every or stop or 1) or [stop]), stop]
        for first, last in itertools.pairwise(marks):
            if first == last and histories:
                break  # all was done before
            before = None if callback is None else jax.tree.map(jnp.copy, trained)
            streams = row_streams(sets, first, last - first, how.batch_size, keys)
            if how.pairing is not None:
                streams = (streams[0], _beside(streams[0], first, how.pairing, sets))
            trained, state, history, is_finite = advance(program, trained, state, read, streams)
            if not isinstance(is_finite, Tracer) and not bool(is_finite):
                reached = merge(trained, params, is_trained)
                raise FloatingPointError(
                    loop_failure(history["loss"], first, reached, params, named)
                )
            histories.append(history)
            if callback is not None and last > first:
                reached = merge(trained, params, is_trained)
                if callback(LoopState(last, reached, state, reference), history):
                    trained = before
                    break
            if checkpoint is None or last == first:
                continue
            if last == stop or (last - origin) % checkpoint.every == 0:
                histories = [joined(histories)]
                checkpoint.save(last, (trained, state), histories[0])
    return merge(trained, params, is_trained), joined(histories)

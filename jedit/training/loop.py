"""The one training loop: `unlearn` on a forget and a retain set, `fit` on a single one.

The steps between two looks run in one compiled call, a `lax.scan` whose body gathers rows,
differentiates the objective and applies an optax update.  The sets stay on the device, and what a
call is given of parameters and optimizer state it overwrites.

Rows are drawn epoch by epoch: epoch e is a permutation of the set, made from `fold_in(key, e)`, and
the epochs follow one another in one stream that is cut into batches.  So each row is seen equally
often, to within one, and the rows of step s depend on the key and on s: not on the number of steps,
not on where a run was broken off, not on the number of devices.  Where a set's rows are split over
a mesh, so is every batch of them, and parameters stay where they were.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int, Key, PyTree

from jedit.core.arguments import (
    check_checkpoint,
    check_function,
    check_key,
    check_optimizer,
    check_params,
)
from jedit.core.batch import Batch, Resumable
from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers, loop_failure
from jedit.core.devices import RowSharding, kept, on_auto_axes, places_of, row_sharding, split_rows
from jedit.core.display import short_repr
from jedit.core.outputs import check_sets
from jedit.core.paths import matcher, parameter_paths

History = dict[str, Array]


class LoopState(NamedTuple):
    """Where a loop stands, and all it needs to go on from there.

    Attributes:
        step: updates made so far.
        params: the parameters, frozen ones included.
        optimizer_state: of the trained ones.
    """

    step: int
    params: PyTree
    optimizer_state: PyTree

    __repr__ = short_repr


@on_auto_axes
def unlearn(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    forget: Batch | PyTree,
    retain: Batch | PyTree | None = None,
    *,
    steps: int,
    key: Key[Array, ""],
    batch_size: int = 32,
    trainable: str | None = None,
    objective_args: Mapping[str, Any] | None = None,
    update_args: Callable | None = None,
    every: int | None = None,
    callback: Callable[[LoopState, History], Any] | None = None,
    checkpoint: Resumable | None = None,
) -> tuple[PyTree, History]:
    """Minimise an objective over draws of forget and retain rows.

    Calling again with the same functions and shapes does not compile again.  The given params are
    copied, not overwritten: they are still there to compare with.

    A retain budget is a callback that says when it is spent:

        def spent(state, history):
            return output_kl(apply, params, state.params, heldout) > 0.05

    Args:
        objective: `(params, forget_rows, retain_rows, **objective_args) -> (scalar, aux)`, such as
            those of `jedit.objectives` with `apply` fixed by `functools.partial`; aux is a dict of
            scalars.
        optimizer: any optax transform; its update also gets `value=`, the objective's, and what
            `update_args` returns.
        params: where to start: parameters, or a `LoopState`, to go on with a run broken off there.
        forget: the whole forget set, a Batch or any pytree whose leaves lead with the rows.
        retain: the whole retain set likewise, or None for objectives that do without.
        steps: number of updates in all, those before a given `LoopState` included.
        key: decides the rows.
        batch_size: rows of each set in a step; a smaller set is taken whole.
        trainable: regular expression; a parameter in whose path it is not found stays bit-identical
            and has neither gradient nor optimizer state: in the optimizer's trees, None stands
            there. None: all real parameters are trained.
        objective_args: further keyword arguments of the objective. Large arrays, reference params
            for instance, belong here: what a `partial` holds is compiled in as a constant.
        update_args: `(params, forget_rows, retain_rows) -> dict` of further keyword arguments of
            the optimizer's update, computed at each step; a tree like params is cut as they are,
            and a function of params still gets whole ones.
        every: call `callback` after so many steps, and after the last.
        callback: gets the state and the history since the last call. The state's arrays are
            overwritten when the loop goes on: copy what is to be kept. If it returns something
            true the loop stops, and the params returned are those of the call before.
        checkpoint: a `jedit.Checkpoint`: the loop's state is saved every so many steps, and the
            same call again goes on from the last save, to the bit; the callback is called again for
            the steps that are taken again. The functions must be the same too, which is not
            checked. The programs are those of the checkpoint's `every`, if there is no callback's.

    Returns:
        The new params, and a dict of arrays with one entry per step taken: "loss" and what aux
        holds, at the params before the step's update.

    Raises:
        TypeError: an argument that is something else.
        ValueError: negative steps, sets without rows or that count no output, masks that are none,
            or nothing to train; the checkpoint is of another call, or its `every` is no multiple of
            `every`.
        FloatingPointError: a loss, or a parameter after the last step or before a callback, is not
            finite: it says at which step, and whether parameters or rows were so from the start.
    """
    return _train(
        objective,
        optimizer,
        params,
        (forget, retain),
        ("forget", "retain"),
        steps=steps,
        key=key,
        batch_size=batch_size,
        trainable=trainable,
        objective_args=objective_args,
        update_args=update_args,
        every=every,
        callback=callback,
        checkpoint=checkpoint,
    )


@on_auto_axes
def fit(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: Batch | PyTree,
    *,
    key: Key[Array, ""],
    steps: int | None = None,
    epochs: float | int | None = None,
    batch_size: int = 32,
    every: int | None = None,
    callback: Callable[[LoopState, History], Any] | None = None,
    checkpoint: Resumable | None = None,
) -> tuple[PyTree, History]:
    """Train on one set: `unlearn`'s loop with `loss(params, rows) -> (scalar, aux)`.

    Args:
        loss: what to minimise; aux is a dict of scalars.
        optimizer: any optax transform.
        params: where to start.
        data: the whole set, a Batch or any pytree whose leaves lead with the rows.
        key: decides the rows.
        steps: number of updates; give this or `epochs`.
        epochs: how often each row is seen; rounded up to whole steps.
        batch_size: rows in a step.
        every: as of `unlearn`.
        callback: as of `unlearn`.
        checkpoint: as of `unlearn`.

    Returns:
        As `unlearn`.

    Raises:
        TypeError: an argument that is something else.
        ValueError: if not exactly one of `steps` and `epochs` is given; and as `unlearn`.
        FloatingPointError: as `unlearn`.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"give steps or epochs, one of them; got {steps=}, {epochs=}")
    check_numbers(NOT_NEGATIVE, epochs=epochs)
    check_numbers(COUNT, batch_size=batch_size)
    if epochs is not None:
        num_rows = _num_rows(data)
        steps = math.ceil(epochs * num_rows / min(batch_size, num_rows))
    return _train(
        loss,
        optimizer,
        params,
        (data,),
        ("data",),
        steps=steps or 0,
        key=key,
        batch_size=batch_size,
        every=every,
        callback=callback,
        checkpoint=checkpoint,
    )


def _train(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    sets: tuple[PyTree | None, ...],
    names: tuple[str, ...],
    *,
    steps: int,
    key: Array,
    batch_size: int,
    trainable: str | None = None,
    objective_args: Mapping[str, Any] | None = None,
    update_args: Callable | None = None,
    every: int | None = None,
    callback: Callable | None = None,
    checkpoint: Resumable | None = None,
) -> tuple[PyTree, History]:
    check_numbers(COUNT_OR_ZERO, steps=steps)
    check_numbers(COUNT, batch_size=batch_size, every=every)
    start = params if isinstance(params, LoopState) else LoopState(0, params, None)
    check_function(objective, "objective", "(params, rows, ...)")
    check_optimizer(optimizer)
    check_params(start.params)
    check_key(key)
    check_checkpoint(checkpoint)
    if all(rows is None for rows in sets):
        raise ValueError("there are no rows to train on, got None")
    params, is_trained = start.params, _is_trained(start.params, trainable)
    begin = int(start.step)  # an array, after a checkpoint
    state = start.optimizer_state
    if state is None:
        # Large arrays that a transform holds go into its state, and with it into the call as
        # arguments; made under jit they would be constants of the program.
        state = optimizer.init(_split(params, is_trained))
    # The compiled call overwrites what it is given, and somebody else may hold these.
    trained, state = jax.tree.map(jnp.copy, (_split(params, is_trained), state))
    named = dict(zip(names, sets, strict=True))
    check_sets(named)
    sets = jax.tree.map(jnp.asarray, sets)
    places = places_of((trained, state))
    over = tuple(row_sharding(rows) for rows in sets)
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
            given = (params, state, key, sets, objective_args, batch_size, trainable, begin, every)
            done, (trained, state), past = checkpoint.resume("loop", given, (trained, state))
            if done:
                begin = done
                histories.append(past)
        stop = max(steps, begin)
        marks = [*(range(begin, stop, every or stop or 1) or [stop]), stop]
        for first, last in itertools.pairwise(marks):
            if first == last and histories:
                break  # all was done before
            before = None if callback is None else jax.tree.map(jnp.copy, trained)
            trained, state, history, is_finite = _advance(
                (objective, optimizer, update_args),
                is_trained,
                (places, over),
                trained,
                state,
                params,
                _row_streams(sets, first, last - first, batch_size, keys),
                sets,
                dict(objective_args or {}),
            )
            if not isinstance(is_finite, Tracer) and not bool(is_finite):
                merged = _merge(trained, params, is_trained)
                raise FloatingPointError(
                    loop_failure(history["loss"], first, merged, params, named)
                )
            histories.append(history)
            if callback is not None and last > first:
                merged = _merge(trained, params, is_trained)
                if callback(LoopState(last, merged, state), history):
                    trained = before
                    break
            if checkpoint is None or last == first:
                continue
            if last == stop or (last - origin) % checkpoint.every == 0:
                histories = [_joined(histories)]
                checkpoint.save(last, (trained, state), histories[0])
    return _merge(trained, params, is_trained), _joined(histories)


def _advance(functions, is_trained, where, trained, state, params, streams, sets, objective_args):
    """Take the steps in one compiled call, or one by one where a loop would be slow.

    XLA's CPU compiler rewrites convolutions for its fast kernels at the top of a program alone
    (jax issue 12868): the gradient of one takes six times as long inside a loop.
    """
    rest = (sets, objective_args)
    fixed = (functions, is_trained, where)
    given = (*fixed, trained, state, params, streams, *rest)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(given[3:])):
        # Nothing can be overwritten under a transformation.
        return jax.jit(_take_steps, static_argnums=(0, 1, 2))(*given)
    steps = len(jax.tree.leaves(streams)[0])
    is_cpu = jax.default_backend() == "cpu"
    if steps < 2 or not is_cpu or not _has_convolution(_steps.trace(*given).jaxpr.jaxpr):
        return _steps(*given)
    histories, flags = [], []
    for i in range(steps):
        row = jax.tree.map(lambda numbers, i=i: numbers[i : i + 1], streams)
        trained, state, one, is_finite = _steps(*fixed, trained, state, params, row, *rest)
        histories.append(one)
        flags.append(is_finite)
    return trained, state, _joined(histories), np.all(jax.device_get(flags))


def _has_convolution(jaxpr) -> bool:
    def inner(value):
        if isinstance(value, tuple | list):
            return any(map(inner, value))
        value = getattr(value, "jaxpr", value)
        return hasattr(value, "eqns") and _has_convolution(value)

    return any(
        eqn.primitive.name == "conv_general_dilated" or any(map(inner, eqn.params.values()))
        for eqn in jaxpr.eqns
    )


def _joined(histories: list[History]) -> History:
    """One history of several; on the host, unless traced, as compiling a long one takes long."""
    if len(histories) == 1:
        return histories[0]
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(histories))
    concatenate = jnp.concatenate if is_traced else np.concatenate
    return jax.tree.map(lambda *parts: jnp.asarray(concatenate(parts)), *histories)


def _take_steps(
    functions: tuple[Callable, optax.GradientTransformation, Callable | None],
    is_trained: tuple[bool, ...],
    where: tuple[Any, tuple[RowSharding | None, ...]],
    trained: PyTree,
    state: PyTree,
    params: PyTree,
    streams: tuple[Array | None, ...],
    sets: tuple[PyTree | None, ...],
    objective_args: dict[str, Any],
) -> tuple[PyTree, PyTree, History, Array]:
    """As many steps as the streams have rows, and whether losses and parameters are finite.

    `where` holds the shardings of what is trained, and those of the sets' rows.
    """
    objective, optimizer, update_args = functions
    places, over = where
    structure = jax.tree.structure(params)
    optimizer = optax.with_extra_args_support(optimizer)

    def cut(extra: Any) -> Any:
        """What the optimizer sees of an extra argument: of whole params, the trained part."""
        if callable(extra):
            return lambda tree: cut(extra(_merge(tree, params, is_trained)))
        is_like_params = jax.tree.structure(extra) == structure
        return _split(extra, is_trained) if is_like_params else extra

    def step(carry: tuple, numbers: tuple) -> tuple[tuple, History]:
        trained, state = carry
        drawn = [
            None if rows is None else split_rows(jax.tree.map(lambda leaf, i=i: leaf[i], rows), at)
            for rows, i, at in zip(sets, numbers, over, strict=True)
        ]

        def loss_fn(trained: PyTree) -> tuple[Array, dict[str, Array]]:
            return objective(_merge(trained, params, is_trained), *drawn, **objective_args)

        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        extra = {}
        if update_args is not None:
            extra = update_args(_merge(trained, params, is_trained), *drawn)
            extra = {name: cut(value) for name, value in extra.items()}
        updates, state = optimizer.update(gradients, state, trained, value=loss, **extra)
        trained = optax.apply_updates(trained, updates)
        return kept((trained, state), places), {**aux, "loss": loss}

    if len(jax.tree.leaves(streams)[0]) == 1:
        (trained, state), one = step((trained, state), jax.tree.map(lambda x: x[0], streams))
        history = jax.tree.map(lambda x: x[None], one)
        return trained, state, history, _are_finite(history["loss"], trained)
    (trained, state), history = lax.scan(step, (trained, state), streams)
    trained, state = kept((trained, state), places)  # what leaves a scan is placed anew
    # Looked at once a call: a loss that is not finite, or at the end a parameter.
    return trained, state, history, _are_finite(history["loss"], trained)


def _are_finite(losses: Array, trained: PyTree) -> Array:
    found = [jnp.all(jnp.isfinite(x)) for x in (losses, *jax.tree.leaves(trained))]
    return jnp.all(jnp.stack(found))


_steps = jax.jit(_take_steps, static_argnums=(0, 1, 2), donate_argnums=(3, 4))


def _row_streams(
    sets: tuple[PyTree | None, ...], first: int, steps: int, batch_size: int, keys: Array
) -> tuple[Int[Array, "steps size"] | None, ...]:
    """Return the row numbers of `steps` steps from `first` on, for each set."""
    return tuple(
        None if rows is None else _row_stream(_num_rows(rows), first, steps, batch_size, set_key)
        for rows, set_key in zip(sets, keys, strict=True)
    )


def _row_stream(
    num_rows: int, first: int, steps: int, batch_size: int, key: Array
) -> Int[Array, "steps size"]:
    """Return a piece of the stream of permutations, end to end, cut into batches."""
    size = min(batch_size, num_rows)
    epoch, offset = divmod(first * size, num_rows)
    place = jnp.asarray([epoch, offset], jnp.int32)
    return _piece(num_rows, steps * size, place, key).reshape(steps, size)


@partial(jax.jit, static_argnums=(0, 1))
def _piece(num_rows: int, length: int, place: Array, key: Array) -> Int[Array, " length"]:
    """Return `length` numbers of the stream from an offset in an epoch on."""
    numbers = jnp.arange(num_rows, dtype=jnp.int32)
    # A piece reaches into one permutation more than would hold it.
    epochs = place[0] + jnp.arange(-(-length // num_rows) + 1, dtype=jnp.int32)

    def permutation(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), numbers)

    stream = jax.vmap(permutation)(epochs).reshape(-1)
    return lax.dynamic_slice(stream, (place[1],), (length,))


def _num_rows(rows: PyTree) -> int:
    """Return the common leading size of all leaves.

    Raises:
        ValueError: if there is none, or it is 0.
    """
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(rows)}
    if len(sizes) != 1 or sizes == {0}:
        shapes = [leaf.shape for leaf in jax.tree.leaves(rows)]
        raise ValueError(
            f"the arrays of a set must lead with its rows, the same number and at least 1; got "
            f"shapes {shapes}"
        )
    return sizes.pop()


def _is_trained(params: PyTree, trainable: str | None) -> tuple[bool, ...]:
    """Return, leaf by leaf, whether it is trained; what is not real never is.

    Raises:
        ValueError: if nothing is.
    """
    named = parameter_paths(params)
    is_found = matcher("" if trainable is None else trainable, "trainable")
    chosen = tuple(
        jnp.issubdtype(leaf.dtype, jnp.floating) and is_found(path) for path, leaf in named
    )
    if not any(chosen):
        paths = [path for path, _ in named]
        raise ValueError(f"trainable={trainable!r} matches no real parameter; paths: {paths}")
    return chosen


def _split(params: PyTree, is_trained: tuple[bool, ...]) -> PyTree:
    """Return params with None, which is no leaf, in place of what is frozen; paths stay."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [leaf if chosen else None for leaf, chosen in zip(leaves, is_trained, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def _merge(trained: PyTree, params: PyTree, is_trained: tuple[bool, ...]) -> PyTree:
    leaves, treedef = jax.tree.flatten(params)
    new = treedef.flatten_up_to(trained)
    merged = [n if chosen else p for n, p, chosen in zip(new, leaves, is_trained, strict=True)]
    return jax.tree.unflatten(treedef, merged)

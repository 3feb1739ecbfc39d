"""The compiled part of the loop: so many steps in one call.

A `lax.scan` whose body gathers rows, differentiates the objective and applies an optax update.
What a call is given of trained parameters and optimizer state it overwrites; frozen parameters, the
reference and the sets are arguments that it only reads, and those that its functions do not use
never enter the program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, PyTree

from jedit.core.devices import RowSharding, kept, split_rows
from jedit.training.freezing import merge, split
from jedit.training.watch import History


class Program(NamedTuple):
    """Everything that is fixed when the steps are compiled; equal values share one program.

    Attributes:
        objective: `(params, rows of each set, reference) -> (scalar, aux)`.
        optimizer: the optax transform that makes updates of gradients.
        update_args: `(params, rows of each set, reference) -> dict`, or None.
        is_trained: leaf by leaf of the parameters.
        places: the shardings of what is trained and of the optimizer's state.
        over: how the rows of each set are split over devices; None: they are not.
    """

    objective: Callable
    optimizer: optax.GradientTransformation
    update_args: Callable | None
    is_trained: tuple[bool, ...]
    places: Any
    over: tuple[RowSharding | None, ...]


class Read(NamedTuple):
    """The arrays that the steps read and do not change.

    Attributes:
        params: the parameters as they were, whose frozen ones stay.
        reference: the params before unlearning.
        sets: the whole sets, of which each step gathers its rows.
    """

    params: PyTree
    reference: PyTree
    sets: tuple[PyTree | None, ...]


Taken = tuple[PyTree, PyTree, History, Bool[Array, ""]]


def advance(program: Program, trained: PyTree, state: PyTree, read: Read, streams: tuple) -> Taken:
    """Take as many steps as the streams have rows, in one compiled call.

    They are taken one by one where a loop would be slow: XLA's CPU compiler rewrites convolutions
    for its fast kernels at the top of a program alone (jax issue 12868), so that the gradient of
    one takes six times as long inside a loop.

    Returns:
        What is trained, the optimizer's state, the history, and whether losses and parameters are
        finite.
    """
    given = (trained, state, read, streams)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(given)):
        # Nothing can be overwritten under a transformation.
        return jax.jit(_take_steps, static_argnums=0)(program, *given)
    steps = len(jax.tree.leaves(streams)[0])
    is_cpu = jax.default_backend() == "cpu"
    if steps < 2 or not is_cpu or not _has_convolution(traced(program, *given).jaxpr.jaxpr):
        return _steps(program, *given)
    histories, flags = [], []
    for i in range(steps):
        row = jax.tree.map(lambda numbers, i=i: numbers[i : i + 1], streams)
        trained, state, one, is_finite = _steps(program, trained, state, read, row)
        histories.append(one)
        flags.append(is_finite)
    return trained, state, joined(histories), jnp.asarray(np.all(jax.device_get(flags)))


def traced(
    program: Program, trained: PyTree, state: PyTree, read: Read, streams: tuple
) -> jax.stages.Traced:
    """Return the program that `advance` compiles, of arrays or of their shapes."""
    return _steps.trace(program, trained, state, read, streams)


def joined(histories: list[History]) -> History:
    """Return one history of several; on the host, unless traced, as compiling takes long."""
    if len(histories) == 1:
        return histories[0]
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(histories))
    concatenate = jnp.concatenate if is_traced else np.concatenate
    return jax.tree.map(lambda *parts: jnp.asarray(concatenate(parts)), *histories)


# By identity; a program's is the same at each call, and a large one takes long to look through.
@functools.lru_cache(maxsize=64)
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


def _take_steps(
    program: Program, trained: PyTree, state: PyTree, read: Read, streams: tuple
) -> Taken:
    params, reference, sets = read
    is_trained, places = program.is_trained, program.places
    structure = jax.tree.structure(params)
    optimizer = optax.with_extra_args_support(program.optimizer)

    def cut(extra: Any) -> Any:
        """Cut an extra argument to what the optimizer sees: of whole params, the trained part."""
        if callable(extra):
            return lambda tree, *more: cut(extra(merge(tree, params, is_trained), *more))
        is_like_params = jax.tree.structure(extra) == structure
        return split(extra, is_trained) if is_like_params else extra

    def step(carry: tuple, numbers: tuple) -> tuple[tuple, History]:
        trained, state = carry
        drawn = tuple(
            None if rows is None else split_rows(jax.tree.map(lambda leaf, i=i: leaf[i], rows), at)
            for rows, i, at in zip(sets, numbers, program.over, strict=True)
        )

        def loss_fn(trained: PyTree) -> tuple[Array, dict[str, Array]]:
            return program.objective(merge(trained, params, is_trained), drawn, reference)

        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        extra = {}
        if program.update_args is not None:
            extra = program.update_args(merge(trained, params, is_trained), drawn, reference)
            extra = {name: cut(value) for name, value in extra.items()}
        updates, state = optimizer.update(gradients, state, trained, value=loss, **extra)
        trained = optax.apply_updates(trained, updates)
        return kept((trained, state), places), {**aux, "loss": loss}

    # One step by itself is no scan, so that its convolutions stand at the top of the program.
    if len(jax.tree.leaves(streams)[0]) == 1:
        (trained, state), one = step((trained, state), jax.tree.map(lambda x: x[0], streams))
        history = jax.tree.map(lambda x: x[None], one)
        return trained, state, history, _are_finite(history["loss"], trained)
    (trained, state), history = lax.scan(step, (trained, state), streams)
    trained, state = kept((trained, state), places)  # what leaves a scan is placed anew
    # Looked at once a call: a loss that is not finite, or at the end a parameter.
    return trained, state, history, _are_finite(history["loss"], trained)


def _are_finite(losses: Array, trained: PyTree) -> Bool[Array, ""]:
    found = [jnp.all(jnp.isfinite(x)) for x in (losses, *jax.tree.leaves(trained))]
    return jnp.all(jnp.stack(found))


_steps = jax.jit(_take_steps, static_argnums=0, donate_argnums=(1, 2))

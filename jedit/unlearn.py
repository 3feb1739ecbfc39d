"""The one training loop: `unlearn` on a forget and a retain set, `fit` on a single one.

All steps run in one compiled call, a `lax.scan` whose body gathers rows, differentiates the
objective and applies an optax update.  The sets stay on the device.

Rows are drawn epoch by epoch: epoch e is a permutation of the set, made from `fold_in(key, e)`, and
the epochs follow one another in one stream that is cut into batches.  So each row is seen equally
often, to within one, and the rows of step s depend on the key and on s, not on the number of steps.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from jedit.typing import Batch

History = dict[str, Array]


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
) -> tuple[PyTree, History]:
    """Minimise an objective over draws of forget and retain rows.

    Calling again with the same functions and shapes does not compile again.  `params` are not
    donated: they are still there to compare with.

    Args:
        objective: `(params, forget_rows, retain_rows, **objective_args) -> (scalar, aux)`, such as
            those of `jedit.objectives` with `apply` fixed by `functools.partial`; aux is a dict of
            scalars.
        optimizer: any optax transform; its update also gets `value=`, the objective's, and what
            `update_args` returns.
        params: where to start.
        forget: the whole forget set, a Batch or any pytree whose leaves lead with the rows.
        retain: the whole retain set likewise, or None for objectives that do without.
        steps: number of updates.
        key: decides the rows.
        batch_size: rows of each set in a step; a smaller set is taken whole.
        trainable: regular expression; a parameter in whose path it is not found stays bit-identical
            and has neither gradient nor optimizer state: in the optimizer's trees, None stands
            there. None: all real parameters are trained.
        objective_args: further keyword arguments of the objective. Large arrays, reference params
            for instance, belong here: what a `partial` holds is compiled in as a constant.
        update_args: `(params, forget_rows, retain_rows) -> dict` of further keyword arguments of
            the optimizer's update, computed at each step; a tree like params is cut as they are.

    Returns:
        The new params, and a dict of arrays with one entry per step: "loss" and what aux holds, at
        the params before the step's update.
    """
    return _train(
        objective,
        optimizer,
        params,
        (forget, retain),
        steps=steps,
        key=key,
        batch_size=batch_size,
        trainable=trainable,
        objective_args=dict(objective_args or {}),
        update_args=update_args,
    )


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

    Returns:
        As `unlearn`.

    Raises:
        ValueError: if not exactly one of `steps` and `epochs` is given.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"give steps or epochs, one of them; got {steps=}, {epochs=}")
    if epochs is not None:
        num_rows = _num_rows(data)
        steps = math.ceil(epochs * num_rows / min(batch_size, num_rows))
    return _train(
        loss,
        optimizer,
        params,
        (data,),
        steps=steps or 0,
        key=key,
        batch_size=batch_size,
    )


def _train(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    sets: tuple[PyTree | None, ...],
    *,
    steps: int,
    key: Array,
    batch_size: int,
    trainable: str | None = None,
    objective_args: Mapping[str, Any] | None = None,
    update_args: Callable | None = None,
) -> tuple[PyTree, History]:
    if steps < 0 or batch_size < 1:
        raise ValueError(f"steps must be at least 0 and batch_size 1, got {steps} and {batch_size}")
    is_trained = _is_trained(params, trainable)
    # Large arrays that a transform holds go into its state, and with it into the call as arguments;
    # made under jit they would be constants of the program.
    state = optimizer.init(_split(params, is_trained))
    return _scan(
        objective,
        optimizer,
        update_args,
        (is_trained, steps, batch_size),
        params,
        state,
        sets,
        key,
        dict(objective_args or {}),
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scan(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    update_args: Callable | None,
    static: tuple[tuple[bool, ...], int, int],
    params: PyTree,
    state: PyTree,
    sets: tuple[PyTree | None, ...],
    key: Array,
    objective_args: dict[str, Any],
) -> tuple[PyTree, History]:
    is_trained, steps, batch_size = static
    structure = jax.tree.structure(params)
    optimizer = optax.with_extra_args_support(optimizer)
    streams = tuple(
        None if rows is None else _row_stream(_num_rows(rows), steps, batch_size, set_key)
        for rows, set_key in zip(sets, jax.random.split(key, len(sets)), strict=True)
    )

    def step(carry: tuple, numbers: tuple) -> tuple[tuple, History]:
        trained, state = carry
        drawn = [
            None if rows is None else jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            for rows, i in zip(sets, numbers, strict=True)
        ]

        def loss_fn(trained: PyTree) -> tuple[Array, dict[str, Array]]:
            return objective(_merge(trained, params, is_trained), *drawn, **objective_args)

        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        extra = {}
        if update_args is not None:
            extra = update_args(_merge(trained, params, is_trained), *drawn)
            is_like_params = {k: jax.tree.structure(v) == structure for k, v in extra.items()}
            extra = {k: _split(v, is_trained) if is_like_params[k] else v for k, v in extra.items()}
        updates, state = optimizer.update(gradients, state, trained, value=loss, **extra)
        return (optax.apply_updates(trained, updates), state), {**aux, "loss": loss}

    start = (_split(params, is_trained), state)
    (trained, _), history = lax.scan(step, start, streams, length=steps)
    return _merge(trained, params, is_trained), history


def _row_stream(num_rows: int, steps: int, batch_size: int, key: Array) -> Int[Array, "steps size"]:
    """Return the row numbers of each step: permutations, end to end, cut into batches."""
    size = min(batch_size, num_rows)
    num_epochs = -(-steps * size // num_rows)
    numbers = jnp.arange(num_rows, dtype=jnp.int32)
    epochs = jnp.arange(num_epochs, dtype=jnp.int32)

    def permutation(epoch: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), numbers)

    stream = jax.vmap(permutation)(epochs)
    return stream.reshape(-1)[: steps * size].reshape(steps, size)


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
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    chosen = tuple(
        jnp.issubdtype(leaf.dtype, jnp.floating)
        and (trainable is None or re.search(trainable, path) is not None)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    )
    if not any(chosen):
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

"""One small network in four libraries, each with the training loop that its users write."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState

from jedit.transforms import with_update_args


class Loop(NamedTuple):
    """A library's parameters and its loop.

    Attributes:
        apply: `apply(params, x)`, params as its optimizer's update sees them.
        tree: params, or what is shaped like them, of arrays named "w", "b" and "v".
        named: the reverse.
        run: `run(arrays, transform, extras, gradient, steps)`: named parameters after each step,
            and how often the step was traced; `gradient` is of a loss by the parameters, and
            `extras(params)` the transform's further arguments.
    """

    apply: Callable
    tree: Callable[[dict], Any]
    named: Callable[[Any], dict]
    run: Callable[..., tuple[list[dict], int]]


def plain() -> Loop:
    """Bare functions and optax."""

    def apply(params, x):
        return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]

    same = lambda tree: dict(tree)  # noqa: E731
    return Loop(apply, same, same, _functional(apply, same, same))


def by_optax_alone(loop: Loop) -> Loop:
    """Optax's loop over another library's own tree, for what depends on the names of leaves."""
    return loop._replace(run=_functional(loop.apply, loop.tree, loop.named))


def haiku() -> Loop:
    """Haiku's parameters are a dictionary of dictionaries, and its loop is optax's."""

    def network(x):
        x = jnp.tanh(hk.Linear(6, name="hidden")(x))
        return hk.Linear(3, with_bias=False, name="out")(x)

    def tree(arrays):
        return {"hidden": {"w": arrays["w"], "b": arrays["b"]}, "out": {"w": arrays["v"]}}

    def named(params):
        return params["hidden"] | {"v": params["out"]["w"]}

    apply = hk.without_apply_rng(hk.transform(network)).apply
    return Loop(apply, tree, named, _functional(apply, tree, named))


def _functional(apply, tree, named):
    def run(arrays, transform, extras, gradient, steps):
        params, traces, seen = tree(arrays), [], []
        state = transform.init(params)

        @functools.partial(jax.jit, donate_argnums=1)  # as large models' loops do
        def step(params, state):
            traces.append(1)
            grads = gradient(apply, params)
            updates, state = transform.update(grads, state, params, **extras(params))
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
            seen.append(named(params))
        return seen, len(traces)

    return run


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.out = nnx.Linear(6, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def nnx_model(arrays):
    """The module with these arrays, a tree of `flax_nnx`'s."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: _Nnx(nnx.Rngs(0))))
    leaves = jax.tree.leaves(arrays)
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(abstract), leaves))


def flax_nnx() -> Loop:
    """`nnx.Optimizer`: init sees variables, update their arrays."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: _Nnx(nnx.Rngs(0))))

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    def tree(arrays):
        hidden = {"kernel": arrays["w"], "bias": arrays["b"]}
        return nnx.State({"hidden": hidden, "out": {"kernel": arrays["v"]}})

    def named(params):
        hidden = params["hidden"]
        return {"w": hidden["kernel"], "b": hidden["bias"], "v": params["out"]["kernel"]}

    def run(arrays, transform, extras, gradient, steps):
        model, traces, seen = nnx_model(tree(arrays)), [], []
        optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            traces.append(1)
            grads = nnx.grad(gradient.loss)(model)
            params = nnx.as_pure(nnx.state(model, nnx.Param))
            optimizer.update(model, grads, **extras(params))

        for _ in range(steps):
            step(model, optimizer)
            arrays = nnx.as_pure(nnx.state(model, nnx.Param))
            seen.append(named(jax.tree.map(jnp.copy, arrays)))
        return seen, len(traces)

    return Loop(apply, tree, named, run)


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(6, name="hidden")(x))
        return nn.Dense(3, use_bias=False, name="out")(x)


def flax_train_state() -> Loop:
    """`TrainState.apply_gradients`, which has no place for further arguments of the optimizer."""

    def apply(params, x):
        return _Linen().apply({"params": params}, x)

    def tree(arrays):
        hidden = {"kernel": arrays["w"], "bias": arrays["b"]}
        return {"hidden": hidden, "out": {"kernel": arrays["v"]}}

    def named(params):
        hidden = params["hidden"]
        return {"w": hidden["kernel"], "b": hidden["bias"], "v": params["out"]["kernel"]}

    def run(arrays, transform, extras, gradient, steps):
        tx, traces, seen = with_update_args(transform, extras), [], []
        state = TrainState.create(apply_fn=apply, params=tree(arrays), tx=tx)

        @jax.jit
        def step(state):
            traces.append(1)
            return state.apply_gradients(grads=gradient(apply, state.params))

        for _ in range(steps):
            state = step(state)
            seen.append(named(state.params))
        return seen, len(traces)

    return Loop(apply, tree, named, run)


class _Equinox(eqx.Module):
    hidden: eqx.nn.Linear
    activation: Callable
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.out(self.activation(self.hidden(x)))


def equinox() -> Loop:
    """`eqx.filter_jit` on a module whose leaves are not all arrays."""
    key = jax.random.key(0)
    module = _Equinox(
        eqx.nn.Linear(4, 6, key=key), jnp.tanh, eqx.nn.Linear(6, 3, use_bias=False, key=key)
    )
    static = eqx.filter(module, eqx.is_inexact_array, inverse=True)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    def leaves(module):
        return module.hidden.weight, module.hidden.bias, module.out.weight

    def tree(arrays):
        parts = arrays["w"].T, arrays["b"], arrays["v"].T
        return eqx.filter(eqx.tree_at(leaves, module, parts), eqx.is_inexact_array)

    def named(params):
        w, b, v = leaves(params)
        return {"w": w.T, "b": b, "v": v.T}

    def run(arrays, transform, extras, gradient, steps):
        model, traces, seen = eqx.combine(tree(arrays), static), [], []
        state = transform.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, state):
            traces.append(1)
            grads = eqx.filter_grad(lambda m: gradient.loss(jax.vmap(m)))(model)
            params = eqx.filter(model, eqx.is_inexact_array)
            updates, state = transform.update(grads, state, params, **extras(params))
            return eqx.apply_updates(model, updates), state

        for _ in range(steps):
            model, state = step(model, state)
            seen.append(named(eqx.filter(model, eqx.is_inexact_array)))
        return seen, len(traces)

    return Loop(apply, tree, named, run)


LOOPS = {
    "nnx.Optimizer": flax_nnx,
    "Flax TrainState": flax_train_state,
    "Equinox": equinox,
    "Haiku": haiku,
}

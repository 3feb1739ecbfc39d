"""Unlearn the batch by noisy natural steps first, then let an optimizer relearn it (refresh).

    θ_0 = θ
    θ_{j+1} = θ_j + γ (F + λ)⁻¹ ∇L_t(θ_j) + N(0, 2γ (F + λ)⁻¹)       j = 0 ... J - 1
    u = (θ_J - θ) + step(∇L(θ_J))

The derivation and the source are in `jedit.methods.consolidation.refresh`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers
from jedit.core.precision import wide
from jedit.curvature import Curvature, power, solve
from jedit.curvature.checks import check_has_powers


class UnlearnFirstState(NamedTuple):
    """The optimizer's state, and how far the stream of random numbers is.

    Attributes:
        inner: the state of the optimizer that relearns.
        count: the number of updates made, int32.
    """

    inner: PyTree
    count: Array


def unlearn_first(
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    inner_steps: int = 1,
    damping: float = 0.1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer take its step from where the batch has been unlearnt a little.

    It stands in the optimizer's place; what comes behind it would change the noise's covariance.

        unlearn_first(optax.sgd(0.1), rate=1e-6)

    `update` needs params and the extra arguments `curvature`, F; `forget_grad_fn(params) -> tree`,
    the gradient of the loss that is unlearnt, and `grad_fn(params) -> tree`, that of the loss that
    is lowered. The gradient that it is given is not looked at.

    Args:
        optimizer: the optimizer that relearns.
        rate: γ, the length of an unlearning step; the noise's variance is twice as large.
        inner_steps: J, unlearning steps before each update; 1 is the released code's.
        damping: λ, in units of each block's mean eigenvalue; 0.1 is arbitrary.
        seed: seed of the noise; 0 is arbitrary.

    Returns:
        The transform. Parameters that the curvature does not cover are relearnt and not unlearnt.
        An update costs J + 1 gradients, and two rotations of every block J times over.

    Raises:
        ValueError: a number out of its range; at `update`, an argument is missing, or the curvature
            has no eigenvectors.
    """
    check_numbers(NOT_NEGATIVE, rate=rate, damping=damping)
    check_numbers(COUNT, inner_steps=inner_steps)
    check_numbers(COUNT_OR_ZERO, seed=seed)
    inner = optax.with_extra_args_support(optimizer)

    def init(params) -> Any:
        return UnlearnFirstState(inner.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates,
        state,
        params=None,
        *,
        curvature=None,
        forget_grad_fn=None,
        grad_fn=None,
        **extra_args,
    ) -> Any:
        if params is None or curvature is None or forget_grad_fn is None or grad_fn is None:
            raise ValueError(
                "unlearn_first needs params and the extra arguments curvature, forget_grad_fn and "
                "grad_fn (params -> tree) at update"
            )
        check_has_powers(curvature)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        moved = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p).dtype), params)
        for step in range(inner_steps):
            gradient = forget_grad_fn(_beside(params, moved))
            noise_key = jax.random.fold_in(key, step)
            taken = unlearning_step(curvature, gradient, rate=rate, damping=damping, key=noise_key)
            moved = jax.tree.map(lambda m, t: m + t.astype(m.dtype), moved, taken)
        there = _beside(params, moved)
        relearnt, after = inner.update(grad_fn(there), state.inner, there, **extra_args)
        whole = jax.tree.map(
            lambda m, u, p: (m + u.astype(m.dtype)).astype(p.dtype), moved, relearnt, updates
        )
        return whole, UnlearnFirstState(after, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def unlearning_step(
    curvature: Curvature, gradient: PyTree, *, rate: float, damping: float, key: Array
) -> PyTree:
    """Return γ (F + λ)⁻¹ g + N(0, 2γ (F + λ)⁻¹), zero for parameters without a block."""
    leaves, treedef = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, x.shape, wide(x).dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    ascent = solve(curvature, jax.tree.map(wide, gradient), damping=damping)
    noise = power(curvature, jax.tree.unflatten(treedef, drawn), -0.5, damping=damping)
    return jax.tree.map(lambda a, z: rate * a + (2 * rate) ** 0.5 * z, ascent, noise)


def _beside(params: PyTree, moved: PyTree) -> PyTree:
    return jax.tree.map(lambda p, m: (wide(p) + m).astype(p.dtype), params, moved)

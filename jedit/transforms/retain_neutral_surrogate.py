"""Retain gradients from where forgetting has gone ahead at no retain cost (ROSU, arXiv 2605.05871).

δ = argmax g_fᵀδ,  g_rᵀδ = 0,  ‖δ‖ <= ρ        `retain_neutral_perturbation`
u = ∇L_r(θ + δ)                                 applied at θ
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jedit.core.arguments import check_word
from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import exponents, shifted, wide_dtype
from jedit.geometry import (
    RetainOrthogonalInfo,
    retain_neutral_perturbation,
    retain_orthogonal,
)
from jedit.geometry.surrogate import Scope

Outer = Literal["transport", "amplify", "push"]


class RetainNeutralSurrogateState(NamedTuple):
    """The last step's angle between the gradients and first-order gain of the perturbation."""

    info: RetainOrthogonalInfo


def retain_neutral_surrogate(
    radius: float,
    *,
    outer: Outer = "transport",
    strength: float = 1.0,
    scope: Scope = "global",
    constrained: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Replace the retain gradient at θ by the one at θ + δ.

    Stands first in a chain, where gradients come in; what follows is any optimizer:

        optax.chain(retain_neutral_surrogate(0.05), optax.sgd(0.01, momentum=0.9))

    `update` is given the retain gradient g_r at θ, the params, and the extra arguments
    `forget_grads`, g_f at θ, a tree like it, and `grad_fn(params) -> tree`, the gradient of the
    retain objective.

    Args:
        radius: ρ, the norm of the perturbation δ.
        outer: what is made of the gradient g at θ + δ, with q̂ = δ/‖δ‖: "transport", g itself (as in
            the code of the parent method, UAM); "amplify", g without `strength` times its part
            along q̂ where a step against g would undo forgetting [derived]; "push",
            g - strength ‖g‖ q̂ [derived].
        strength: γ; 1 is arbitrary.
        scope: where the constraint holds, "global" (the stated problem) or "leaf".
        constrained: True; False leaves the constraint out, δ = ρ g_f/‖g_f‖: UAM.

    Returns:
        The transform; a call of `update` costs one more gradient.

    Raises:
        ValueError: an unknown `outer` or `scope`, or a radius that is not positive; at `update`, no
            params or an extra argument missing.
    """
    check_numbers(POSITIVE, radius=radius)
    check_numbers(NOT_NEGATIVE, strength=strength)
    check_word(Outer, outer=outer)
    check_word(Scope, scope=scope)

    def init(params) -> Any:
        dtypes = [wide_dtype(p.dtype) for p in jax.tree.leaves(params)]
        zero = jnp.zeros((), jnp.result_type(*dtypes))
        return RetainNeutralSurrogateState(
            RetainOrthogonalInfo(zero, zero, zero, zero, jnp.zeros((), bool))
        )

    def update(
        updates, state, params=None, *, forget_grads=None, grad_fn=None, **extra_args
    ) -> Any:
        del state, extra_args
        if params is None or forget_grads is None or grad_fn is None:
            raise ValueError(
                "retain_neutral_surrogate needs params and the extra arguments forget_grads and "
                "grad_fn: optimizer.update(retain_grads, state, params, forget_grads=, grad_fn=)"
            )
        retain = updates if constrained else jax.tree.map(jnp.zeros_like, updates)
        delta, info = retain_neutral_perturbation(forget_grads, retain, radius=radius, scope=scope)
        if not constrained:  # the angle and the price are those of the true retain gradient
            _, true = retain_orthogonal(forget_grads, updates, scope=scope)
            info = info._replace(cos=true.cos, sin=true.sin, retain_change=_dot(updates, delta))
        there = jax.tree.map(lambda p, d: p + d.astype(p.dtype), params, delta)
        gradient = grad_fn(there)
        if outer != "transport":
            n = exponents(gradient)
            unit = shifted(gradient, jax.tree.map(jnp.negative, n))
            along = _dot(gradient, delta) / radius
            size = jnp.ldexp(jnp.sqrt(_dot(unit, unit)), jax.tree.leaves(n)[0])
            taken = jnp.maximum(along, 0) if outer == "amplify" else size
            taken = jnp.where(info.is_parallel, 0, strength * taken / radius)
            gradient = jax.tree.map(
                lambda g, d: g - taken.astype(g.dtype) * d.astype(g.dtype), gradient, delta
            )
        gradient = jax.tree.map(lambda g, u: g.astype(u.dtype), gradient, updates)
        return gradient, RetainNeutralSurrogateState(info)

    return optax.GradientTransformationExtraArgs(init, update)


@on_auto_axes
def _dot(x, y):
    parts = jax.tree.map(
        lambda a, b: jnp.vdot(a.astype(wide_dtype(a.dtype)), b.astype(wide_dtype(a.dtype))), x, y
    )
    return jax.tree.reduce(jnp.add, parts)

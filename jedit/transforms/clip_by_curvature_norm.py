"""Bound a step by what it is predicted to cost: scale u down until ½ uᵀFu <= predicted_kl."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.precision import exponents, shifted
from jedit.curvature import Curvature, quadratic_form, trace
from jedit.transforms._arrays import owned


class ClipByCurvatureNormState(NamedTuple):
    """The curvature, as an argument of the jitted step, and the last update's predicted cost.

    Attributes:
        curvature: F, the curvature of the retain outputs.
        predicted_kl: ½ uᵀFu of the last update before clipping, nats per output.
    """

    curvature: Curvature
    predicted_kl: Array


def clip_by_curvature_norm(
    curvature: Curvature, predicted_kl: float | Array | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Scale an update down so that its predicted retain KL, ½ uᵀFu, is at most `predicted_kl`.

    A trust region: it bounds each step, not their sum, and by prediction, not in truth. Stands
    last, after the learning rate and weight decay, for it bounds the change that is really made:

        optax.chain(optax.adamw(1e-4), clip_by_curvature_norm(curvature, predicted_kl=1e-3))

    Only covered parameters count, but the whole update is scaled.

    Args:
        curvature: F, the curvature of the retain outputs, shaped for these params.
        predicted_kl: nats per unmasked output; or an optax schedule of it, by the step's number.

    Returns:
        The transform; its state holds a copy of the curvature, and a call of `update` costs one
        `quadratic_form`.

    Raises:
        ValueError: a `predicted_kl` that is negative or not finite; at `update`, the updates are
            not shaped like the curvature's parameters.
    """
    if callable(predicted_kl):
        return optax.inject_hyperparams(clip_by_curvature_norm)(curvature, predicted_kl)
    check_numbers(NOT_NEGATIVE, predicted_kl=predicted_kl)

    def predicted(curvature, updates):
        return 0.5 * quadratic_form(curvature, updates)

    def init(params) -> Any:
        del params  # Flax's nnx.Optimizer gives variables here, and their arrays at update
        shape = jax.eval_shape(trace, curvature)  # of the same dtype
        return ClipByCurvatureNormState(owned(curvature), jnp.zeros(shape.shape, shape.dtype))

    def update(updates, state, params=None, **extra_args) -> Any:
        del params, extra_args
        # Squares of updates leave the dtype long before updates do.
        n = jax.tree.leaves(exponents(updates))[0]
        unit = predicted(state.curvature, shifted(updates, jax.tree.map(lambda _: -n, updates)))
        kl = jnp.ldexp(unit, 2 * n)
        is_over = kl > predicted_kl
        factor = jnp.sqrt(predicted_kl / jnp.where(is_over, unit, 1))
        factor = jnp.where(is_over, jnp.ldexp(factor, -n), 1)
        updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return updates, ClipByCurvatureNormState(state.curvature, kl)

    return optax.GradientTransformationExtraArgs(init, update)

"""Add the gradient of an L1 penalty of the parameters: u <- u + γ_t sign(θ)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jedit.core.checks import NOT_NEGATIVE, check_numbers


class AddL1GradientState(NamedTuple):
    """The state of `add_l1_gradient`: t, the number of updates made, int32."""

    count: Array


def add_l1_gradient(
    strength: float | optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Make an objective's gradient that of objective + γ‖θ‖₁.

    Stands first, since it adds to a gradient and not to a step:

        optax.chain(add_l1_gradient(1e-4), optax.sgd(0.01))

    Args:
        strength: γ, or a schedule of it. A parameter that is zero is not moved.

    Returns:
        The transform; `update` needs params.

    Raises:
        ValueError: a strength that is negative or not finite; at `update`, params are missing.
    """
    if not callable(strength):
        check_numbers(NOT_NEGATIVE, strength=strength)
    schedule = strength if callable(strength) else optax.constant_schedule(strength)

    def init(params) -> Any:
        del params
        return AddL1GradientState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        if params is None:
            raise ValueError("add_l1_gradient needs params: optimizer.update(g, state, params)")
        gamma = jnp.asarray(schedule(state.count))
        added = jax.tree.map(
            lambda u, p: u + gamma.astype(u.dtype) * jnp.sign(p).astype(u.dtype), updates, params
        )
        return added, AddL1GradientState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)

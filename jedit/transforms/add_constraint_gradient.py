"""Add the gradient of a constraint, at a weight that grows while it is broken.

    u <- u + λ_t ∇L_r(θ_t),   λ_{t+1} = max(0, λ_t + s (L_r(θ_t) - ε))   from the step `delay` on

λ is the dual variable of L_r <= ε: with a gradient of what is to be minimised in u, updates descend
the Lagrangian in θ and ascend it in λ.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jedit.core.checks import COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers


class AddConstraintGradientState(NamedTuple):
    """The state of `add_constraint_gradient`.

    Attributes:
        dual: λ of the next update, in the default float dtype.
        count: the number of updates made, int32.
    """

    dual: Array
    count: Array


def add_constraint_gradient(
    tolerance: float | Array, *, dual: float = 1.0, dual_rate: float = 1.0, delay: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Make an objective's gradient that of the Lagrangian of objective, L_r <= tolerance.

    Stands first, since it adds to a gradient and not to a step:

        optax.chain(add_constraint_gradient(0.3), optax.adam(1e-5))

    Its `update` needs `retain_loss`, L_r at the parameters, and `retain_grads`, its gradient.

    Args:
        tolerance: ε, the loss that is allowed, in L_r's units.
        dual: λ at the first update; 1.0 is GradDiff's in open-unlearning, where PDU's stands.
        dual_rate: s, how fast λ changes; 1.0 is PDU's in open-unlearning.
        delay: number of updates at whose end λ stays as it is; 0 is PDU's in open-unlearning.

    Returns:
        The transform.

    Raises:
        ValueError: a number is negative or not finite; at `update`, an extra argument is missing.
    """
    check_numbers(NOT_NEGATIVE, tolerance=tolerance, dual=dual, dual_rate=dual_rate)
    check_numbers(COUNT_OR_ZERO, delay=delay)

    def init(params) -> Any:
        del params
        first = jnp.full((), dual, jnp.result_type(float))
        return AddConstraintGradientState(first, jnp.zeros((), jnp.int32))

    def update(
        updates, state, params=None, *, retain_loss=None, retain_grads=None, **extra_args
    ) -> Any:
        del params, extra_args
        if retain_loss is None or retain_grads is None:
            raise ValueError(
                "add_constraint_gradient needs the extra arguments retain_loss (a number) and "
                "retain_grads (a tree) at update"
            )
        added = jax.tree.map(
            lambda u, g: u + state.dual.astype(u.dtype) * g.astype(u.dtype), updates, retain_grads
        )
        loss, allowed, rate = (
            jnp.asarray(x, state.dual.dtype) for x in (retain_loss, tolerance, dual_rate)
        )
        moved = jnp.maximum(state.dual + rate * (loss - allowed), 0)
        after = jnp.where(state.count >= delay, moved, state.dual)
        return added, AddConstraintGradientState(after, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)

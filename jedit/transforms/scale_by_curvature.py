"""Precondition updates by a curvature: u <- (F + λ)⁻¹ u, a natural-gradient step in its metric."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.curvature import Curvature, Inverted, inverted
from jedit.curvature.types import Uncovered
from jedit.transforms._arrays import owned, sharded_like, without_frozen


class ScaleByCurvatureState(NamedTuple):
    """The inverse: in the state, so that it is an argument of the jitted step, not a constant."""

    inverse: Inverted


def scale_by_curvature(
    curvature: Curvature,
    *,
    damping: float | Array = 1e-2,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by (F + λ)⁻¹, so that they are free where the retain outputs do not look.

    Stands where Adam's scaling would stand, before the learning rate:

        optax.chain(scale_by_curvature(curvature), optax.scale_by_learning_rate(0.1))

    Adam after it would undo most of it; weight decay belongs after it.

    Args:
        curvature: F, the curvature of the retain outputs, shaped for these params.
        damping: λ, in units of each block's mean eigenvalue (ours: 0.01 to 0.1). A schedule of it,
            by `optax.inject_hyperparams`, is followed where all blocks have eigenvectors; a
            curvature with factors that have none stays at the λ of `init`.
        absolute: True: λ is in units of the eigenvalues themselves; False, it is not.
        uncovered: updates of parameters without a block become "zero" (they stay frozen; the
            default), or pass as they are by "identity".

    Returns:
        The transform; its state holds the inverse, with a copy of the curvature or of its damped
        factors, made once at `init`; a call of `update` is one solve. Given params, an update of
        "zero" reads no gradient, so that a compiled step does not compute those of frozen
        parameters.

    Raises:
        ValueError: a damping that is negative or not finite; at `update`, the updates are not
            shaped like the curvature's parameters.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)

    def init(params) -> Any:
        del params
        how = {"damping": damping, "absolute": absolute, "uncovered": uncovered}
        return ScaleByCurvatureState(owned(inverted(curvature, **how)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        inverse = state.inverse
        if not inverse.inverses:  # eigenvalues are damped as they are used: a schedule's λ of now
            inverse = dataclasses.replace(inverse, damping=jnp.asarray(damping, float))
        solved = inverse(updates)
        like = updates
        if uncovered == "zero":
            like = without_frozen(updates, params, state.inverse.covered)
        return sharded_like(solved, like), state

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_curvature(state, curvature: Curvature):
    """Put a newly estimated curvature into every curvature transform of an optimizer's state.

    Args:
        state: state of a chain that holds `scale_by_curvature` or `clip_by_curvature_norm`.
        curvature: the new one, of the same structure as the old; what was kept of that is its
            inverse is made anew, at the same damping.

    Returns:
        The new state.
    """

    def is_one(node):
        return isinstance(node, Curvature | Inverted)

    def renewed(node):
        if isinstance(node, Inverted):
            return owned(node.again(curvature))
        return owned(curvature) if isinstance(node, Curvature) else node

    return jax.tree.map(renewed, state, is_leaf=is_one)

"""Hold a null space in the parameter change that is really made, rounding of the dtype included.

    v = P u - e        e <- (round(θ + v) - θ) - v

e is what rounding to the parameters' dtype made of the last update beyond what was asked; it is
taken back at the next step, so that the sum of all changes stays within one rounding of the sum of
projected updates instead of drifting from it, and out of the null space, step by step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jedit.core.precision import wide_dtype
from jedit.curvature.types import Uncovered
from jedit.geometry import Projector, project
from jedit.transforms._arrays import owned


class ProjectRealisedUpdateState(NamedTuple):
    """The projector, and what has leaked.

    Attributes:
        projector: P, the projector that updates pass through.
        leak: e, a tree like params in float32 or wider.
    """

    projector: Projector
    leak: PyTree


def project_realised_update(
    projector: Projector, *, uncovered: Uncovered = "zero"
) -> optax.GradientTransformationExtraArgs:
    """Project the whole update, and take back at each step what rounding let through before.

    Stands last in the chain; `project_to_null_space` there is the same for parameters whose dtype
    holds every update exactly. Worth its memory, one copy of the params, for bfloat16.

        optax.chain(optax.adamw(1e-4), project_realised_update(projector))

    Args:
        projector: P, as `null_space` returns it.
        uncovered: "zero" (the default) or "identity", as for `project_to_null_space`.

    Returns:
        The transform; its state holds a copy of the projector, and a call of `update` costs one
        `project`.

    Raises:
        ValueError: at `update`, params are missing or lack a parameter of the projector.
    """

    def init(params) -> Any:
        leak = jax.tree.map(lambda p: jnp.zeros(p.shape, wide_dtype(p.dtype)), params)
        return ProjectRealisedUpdateState(owned(projector), leak)

    def update(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        if params is None:
            raise ValueError("project_realised_update needs params: optimizer.update(g, s, params)")
        wide = jax.tree.map(lambda u, e: u.astype(e.dtype), updates, state.leak)
        kept = project(state.projector, wide, uncovered=uncovered)
        # The leak is what the parameters have moved beyond all projected updates; it is made good
        # now, and what this step's own rounding adds is measured below.
        kept = jax.tree.map(jnp.subtract, kept, state.leak)
        out = jax.tree.map(lambda u, like: u.astype(like.dtype), kept, updates)
        realised = jax.tree.map(_realised, params, out, state.leak)
        leak = jax.tree.map(jnp.subtract, realised, kept)
        return out, ProjectRealisedUpdateState(state.projector, leak)

    return optax.GradientTransformationExtraArgs(init, update)


def _realised(param: Array, update: Array, wide: Array) -> Array:
    """Return round(θ + u) - θ. A cast there and back would do, but XLA is free to leave it out."""
    info = jnp.finfo(param.dtype)
    start = param.astype(wide.dtype)
    total = jax.lax.reduce_precision(start + update.astype(wide.dtype), info.nexp, info.nmant)
    return total - start

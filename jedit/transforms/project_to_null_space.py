"""Project updates off the inputs that the retain set uses: u <- P u (AlphaEdit's projection)."""

from typing import Any, NamedTuple

import optax

from jedit.curvature.types import Uncovered
from jedit.geometry import Projector, project
from jedit.transforms._arrays import owned, sharded_like, without_frozen


class ProjectToNullSpaceState(NamedTuple):
    """The projector: in the state, so that it is an argument of the jitted step, not a constant."""

    projector: Projector


def project_to_null_space(
    projector: Projector, *, uncovered: Uncovered = "zero"
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by P, so that what retained inputs see of them is nothing.

    Stands last, after Adam, momentum and weight decay, each of which leaves the null space:

        optax.chain(optax.adamw(1e-4), project_to_null_space(projector))

    Args:
        projector: P, as `null_space` returns it.
        uncovered: updates of parameters without a projector become "zero" (they stay frozen; the
            default), or pass as they are by "identity".

    Returns:
        The transform; its state holds a copy of the projector, and a call of `update` costs one
        `project`. Given params, an update of "zero" reads no gradient, so that a compiled step does
        not compute those of frozen parameters.

    Raises:
        ValueError: at `update`, the updates lack a parameter of the projector.
    """

    def init(params) -> Any:
        del params
        return ProjectToNullSpaceState(owned(projector))

    def update(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        projected = project(state.projector, updates, uncovered=uncovered)
        like = updates
        if uncovered == "zero":
            covered = [path for _, weight, _ in state.projector.blocks for path in weight.paths]
            like = without_frozen(updates, params, covered)
        return sharded_like(projected, like), state

    return optax.GradientTransformationExtraArgs(init, update)

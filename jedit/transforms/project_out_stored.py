"""Take stored directions out of an update: u <- u - QᵀQ u, with Q's rows given (OGD)."""

from typing import Any

import optax

from jedit.core.arguments import check_word
from jedit.geometry import project_out
from jedit.geometry.surrogate import Scope


def project_out_stored(*, scope: Scope = "global") -> optax.GradientTransformationExtraArgs:
    """Project updates off directions that are given at each update.

    Stands last, after Adam, momentum and weight decay, each of which leaves the subspace:

        optax.chain(optax.adam(1e-3), project_out_stored())

    `update` needs the extra argument `stored`: orthonormal rows, a tree like params each leaf of
    which has one axis more in front, as `RetainSubspace.value` returns them; rows of zeros are
    none. It is an argument and no state, so that new rows compile nothing.

    Args:
        scope: what the rows are orthonormal in, "global", the whole tree (OGD), or "leaf", every
            parameter by itself.

    Returns:
        The transform; an update costs 8 flops a parameter and row.

    Raises:
        ValueError: an unknown scope; at `update`, `stored` is missing.
    """
    check_word(Scope, scope=scope)

    def init(params) -> Any:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, stored=None, **extra_args) -> Any:
        del params, extra_args
        if stored is None:
            raise ValueError(
                "project_out_stored needs the extra argument stored at update: orthonormal rows, "
                "such as `stored_gradients(...).basis`"
            )
        return project_out(stored, updates, scope=scope), state

    return optax.GradientTransformationExtraArgs(init, update)

"""ROME: one association by a rank-one change (Meng et al., arXiv 2202.05262).

    Δ = argmin tr(ΔᵀCΔ)  subject to  k(W + Δ) = v*
      = (C⁻¹k)(v* - k W)ᵀ / (kᵀC⁻¹k)

    C   mean of k kᵀ over all that is to be kept, A of the curvature; damped
    ε   added to C, in units of its mean eigenvalue                       `damping`
    k, v* key and target value of the fact                                `_write`

Several facts are written one after another, the next into what the last has left: so only the last
is exact, and none knows of the others (MEMIT does).

Differences. C is damped, since that of few rows is singular; the constraint holds at any damping.
The bias is a coordinate of k where the curvature covers it. The code averages k over random
prefixes, and divides by the k of the row at hand; here they are one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import HIGHEST
from jedit.curvature import Curvature
from jedit.edits import Edit
from jedit.methods.associations._write import (
    AssociationInfo,
    Associations,
    Layers,
    input_moments,
    write,
)


@jax.jit
def solve(
    Q: Float[Array, "d d"],
    c: Float[Array, " d"],
    K: Float[Array, "n d"],
    R: Float[Array, "n d_out"],
) -> Float[Array, "d d_out"]:
    """Write each row of K in turn by the method's rank-one change, C = Q diag(c) Qᵀ damped."""
    H = jnp.matmul(K, Q, precision=HIGHEST) / c[None]
    H = jnp.matmul(H, Q.T, precision=HIGHEST)  # rows C⁻¹k

    def one(delta, row):
        k, h, r = row
        # Less what the facts before have written already: those that share a direction would count
        # it twice.
        missing = r - jnp.matmul(k, delta, precision=HIGHEST)
        reach = jnp.vdot(k, h, precision=HIGHEST)  # 0 for a key of zero, which writes nothing
        return delta + jnp.outer(h, missing) / jnp.where(reach > 0, reach, 1), None

    zero = jnp.zeros((K.shape[1], R.shape[1]), K.dtype)
    return jax.lax.scan(one, zero, (K, H, R))[0]


@on_auto_axes
def rome(
    apply: Callable,
    params: PyTree,
    curvature: Curvature,
    associations: Associations,
    targets: Float[Array, "n d"] | None,
    *,
    layer: str,
    damping: float = 1e-4,
) -> tuple[Edit, AssociationInfo]:
    """Write associations into one matrix, one after another.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters.
        curvature: curvature of what is to be kept; only its factor A is read.
        associations: the facts; only inputs and subjects are read.
        targets: v*, from `target_values` without `hidden`; None: zero, which removes.
        layer: path of the edited matrix.
        damping: ε, 1e-4 (ours, arbitrary; the paper's C has full rank).

    Returns:
        The edit, and what was found. 4 d² flops a fact, and as many for Δ.

    Raises:
        ValueError: ε negative, or a layer or targets that do not fit.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    moments = input_moments(curvature)

    def solve_layer(path: str, K: Array, M: Array | None, R: Array) -> Array:
        del M
        return solve(*moments[path].damped(damping, K.dtype), K, R)

    weights = {name: moment.weight for name, moment in moments.items()}
    return write(solve_layer, weights, apply, params, associations, targets, Layers(layer))

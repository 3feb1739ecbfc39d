"""MEMIT: many associations at once, by ridge regression (Meng et al., arXiv 2210.07229).

    Δ = argmin λ tr(ΔᵀCΔ) + ‖KΔ - R‖² = (λC + KᵀK)⁻¹ KᵀR

    C   mean of k kᵀ over all that is to be kept, A of the curvature; damped
    λ   how many kept keys C counts for, 15000                            `preservation`
    ε   added to C, in units of its mean eigenvalue                       `damping`
    K, R keys of the new facts, residuals of their values                 `_write`

Solved as S (SᵀKᵀKS + 1)⁻¹ SᵀKᵀR with S = Q (λc)^-½, C = Q diag(c) Qᵀ.

Differences. The papers edit W alone; here its bias too where the curvature covers it, as one more
coordinate of k (`select` of `kfac` decides). C is damped, since that of few rows is singular. λ
does not depend on the scale of activations, but on how many facts are written: it is to C what n is
to KᵀK. With a state in `layers`, KᵀK of earlier batches is added to λC, as sequential
runs of MEMIT in AlphaEdit's code do [code]; without, each batch is MEMIT's own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.curvature import Curvature
from jedit.edits import Edit
from jedit.methods.associations._write import (
    AssociationInfo,
    Associations,
    Layers,
    input_moments,
    regress,
    write,
)


@jax.jit
def solve(
    Q: Float[Array, "d d"],
    c: Float[Array, " d"],
    K: Float[Array, "n d"],
    M: Float[Array, "d d"] | None,
    R: Float[Array, "n d_out"],
    preservation: Float[Array, ""] | float,
) -> Float[Array, "d d_out"]:
    """Solve for the method's Δ = (λC + KᵀK + M)⁻¹ KᵀR, C = Q diag(c) Qᵀ damped, M = KₚᵀKₚ."""
    # The metric is whitened, S Sᵀ = (λC)⁻¹, so that ρ = 1 and no d x d matrix is ever inverted.
    S = Q / jnp.sqrt(preservation * c)[None]
    return regress(S, K, M, R, jnp.ones((), K.dtype))


@on_auto_axes
def memit(
    apply: Callable,
    params: PyTree,
    curvature: Curvature,
    associations: Associations,
    targets: Float[Array, "n d"] | None,
    *,
    layers: Layers,
    preservation: float = 15000.0,
    damping: float = 1e-4,
) -> tuple[Edit, AssociationInfo]:
    """Write associations, all in one regression a layer.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters.
        curvature: curvature of what is to be kept; only its factors A are read.
        associations: the facts; only inputs and subjects are read.
        targets: v*, from `target_values`; None: zero, R = -K W at every layer, which removes.
        layers: where they are written; with the state of the batches before, those are kept.
        preservation: λ. Paper: 15000 for GPT-J.
        damping: ε, 1e-4 (ours, arbitrary; the paper's C has full rank). With a state, λε must
            stay above the rounding of ‖K‖²: in float32 λ = 10 with 1e-4 has left nothing finite.

    Returns:
        The edit, and what was found. n³/3 flops a layer without a state, d³ with one.

    Raises:
        ValueError: λ not positive, ε negative, or layers, targets or state that do not fit.
    """
    check_numbers(POSITIVE, preservation=preservation)
    check_numbers(NOT_NEGATIVE, damping=damping)
    moments = input_moments(curvature)

    def solve_layer(path: str, K: Array, M: Array | None, R: Array) -> Array:
        return solve(*moments[path].damped(damping, K.dtype), K, M, R, preservation)

    weights = {name: moment.weight for name, moment in moments.items()}
    return write(solve_layer, weights, apply, params, associations, targets, layers)

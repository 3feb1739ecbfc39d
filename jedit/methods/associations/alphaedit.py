"""AlphaEdit: associations in the null space of what is kept (Fang et al., arXiv 2410.02355).

    Δ = U₀ (K̃ᵀK̃ + K̃ₚᵀK̃ₚ + ℓ)⁻¹ K̃ᵀR,   K̃ = K U₀,  K̃ₚ = Kₚ U₀

    U₀      eigenvectors of the kept inputs' moment with eigenvalue below a threshold  `projector`
    K, R    keys of the new facts, residuals of their values               `_write`
    Kₚ      keys of all earlier batches                                    `layers`
    ℓ       ridge, 10                                                      `ridge`

Equal to the published Δ = P (KᵀKP + KₚᵀKₚP + ℓ)⁻¹ KᵀR with P = U₀U₀ᵀ, but symmetric [derived]. A
relaxed projector has P = U diag(w) Uᵀ, and U₀ = U √w.

Differences. The threshold is `null_space`'s: by energy; the paper's is `by="eigenvalue"`, 2e-2.
That and ℓ have the unit of a squared activation and mean another thing in every model: unless
`absolute`, ℓ is in units of the mean eigenvalue of the moment. Paper and code edit W alone; here
its bias too where the curvature covers it, so that k's last coordinate is constant and more
directions are free (`select` of `kfac` decides).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.edits import Edit
from jedit.geometry import Projector
from jedit.methods.associations._write import (
    AssociationInfo,
    Associations,
    Layers,
    regress,
    write,
)


@jax.jit
def solve(
    U0: Float[Array, "d r"],
    K: Float[Array, "n d"],
    M: Float[Array, "d d"] | None,
    R: Float[Array, "n d_out"],
    ridge: Float[Array, ""],
) -> Float[Array, "d d_out"]:
    """Solve for the method's Δ by `regress` in the basis U0, with M = KₚᵀKₚ."""
    return regress(U0, K, M, R, ridge)


@on_auto_axes
def alphaedit(
    apply: Callable,
    params: PyTree,
    projector: Projector,
    associations: Associations,
    targets: Float[Array, "n d"] | None,
    *,
    layers: Layers,
    ridge: float = 10.0,
    absolute: bool = True,
) -> tuple[Edit, AssociationInfo]:
    """Write associations where what is kept does not look.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters.
        projector: a projector that `null_space` made of a curvature of what is to be kept.
        associations: the facts; only inputs and subjects are read.
        targets: v*, from `target_values`; None: zero, R = -K W at every layer, which removes.
        layers: where they are written; with the state of the batches before, those are kept.
        ridge: ℓ. Code: 10.
        absolute: True, as in the code: ℓ is in units of a squared activation; False: of the mean
            eigenvalue of the inputs' moment, as every damping is.

    Returns:
        The edit, and what was found. n³/3 flops a layer without a state, 2 d r (d + r) with one, r
        directions free. Not to be traced: r is the projector's.

    Raises:
        ValueError: ℓ not positive, layers, targets or state that do not fit, or a projector of
            leading eigenvectors alone.
    """
    check_numbers(POSITIVE, ridge=ridge)
    check_kind(projector, Projector, "projector", "as `null_space` returns it")
    factors = {name: factor for name, _, factor in projector.blocks}

    def solve_layer(path: str, K: Array, M: Array | None, R: Array) -> Array:
        U = projector.bases[factors[path]]
        assert U is not None
        if U.shape[-1] < U.shape[-2]:
            raise ValueError(
                f"the projector of {path!r} knows the {U.shape[-1]} leading eigenvectors alone, "
                'and the free ones are needed here: estimate the curvature by factorize="eigh"'
            )
        w, a = projector.weights[factors[path]][0], projector.eigenvalues[factors[path]][0]
        # Directions of weight zero are dropped, not multiplied by zero: r, which the cost is cubic
        # in, shrinks to the free ones. It makes the shape depend on values, so this cannot be
        # traced.
        U0 = (U[0] * jnp.sqrt(w)[None])[:, np.flatnonzero(w)]
        unit = jnp.ones((), a.dtype) if absolute else jnp.mean(a)
        return solve(U0.astype(K.dtype), K, M, R, (ridge * unit).astype(K.dtype))

    weights = {n: w for n, w, factor in projector.blocks if projector.bases[factor] is not None}
    return write(solve_layer, weights, apply, params, associations, targets, layers)

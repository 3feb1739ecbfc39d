"""U-CAN: turn down the outputs that answer forget rows more than retain rows (arXiv 2602.23400).

    a_j  = (E h_j²)^½ over forget rows, b_j over retain rows, each       h = x W
           over its root mean square in the matrix
    R_j  = max(0, (a_j - b_j) / (a_j + b_j))                              risk
    U_j  = Σ_i |W_ij| ‖x_i‖, over its largest in the matrix               utility
    γ_j  = exp(-κ (1 - U_j) max(0, R_j - τ))                              decay
    W_:j <- γ_j W_:j

    h    outputs of a matrix: LoRA's rank, or a layer's; the paper's rows are our columns
    ‖x_i‖ root mean square of an input over the retain rows
    τ    `least_risk`                     κ    `strength`

Forward passes are all it takes, and no new statistic: E h_j² is the diagonal of Wᵀ A W, with A the
moment of the inputs of either set. A bias is turned down with its column, so that the output itself
is multiplied by γ_j.

Differences. Confirmed [paper: abstract and notes] are that risk contrasts activations on the forget
set with those on the retain set, that utility combines weight magnitudes with the retain
activations' norms, that what is above a threshold of risk is scaled down by a smooth function and
not cut off, and that all of it happens on low-rank adapters. The contrast's form, that a set whose
rows drive all outputs harder makes no risk, how utility is normalised and enters, the exponential
and both defaults are ours. Any dense matrix will do here; for adapters alone, give curvatures
of `select="^lora/"` of what `with_lora` returns.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import NOT_NEGATIVE, SHARE, check_finite, check_numbers, culprit
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.curvature import Curvature
from jedit.edits import Edit
from jedit.methods._outputs import kernel_of, served_matrices
from jedit.methods._two_sets import add_changes


class UcanInfo(NamedTuple):
    """What was measured of every output of every matrix, by block; arrays (layers, d_out).

    Attributes:
        risk: R, 0 where retain rows drive it as much as forget rows do.
        utility: U, 1 at the output that retain rows use most.
        kept: γ, what the outputs are multiplied by.
    """

    risk: dict[str, Array]
    utility: dict[str, Array]
    kept: dict[str, Array]

    __repr__ = short_repr


def solve(
    a: Float[Array, "*layers d_out"],
    b: Float[Array, "*layers d_out"],
    U: Float[Array, "*layers d_out"],
    *,
    least_risk: float,
    strength: float,
) -> tuple[Float[Array, "*layers d_out"], Float[Array, "*layers d_out"]]:
    """Return risk R and decay γ of the outputs' root mean squares a and b, and their utility."""
    a, b = (x / jnp.where((n := _mean_root(x)) > 0, n, 1) for x in (a, b))
    both = a + b
    R = jnp.maximum(0, (a - b) / jnp.where(both > 0, both, 1))
    return R, jnp.exp(-strength * (1 - U) * jnp.maximum(0, R - least_risk))


@on_auto_axes
def ucan(
    params: PyTree,
    target: Curvature,
    rest: Curvature,
    *,
    least_risk: float = 0.0,
    strength: float = 8.0,
) -> tuple[Edit, UcanInfo]:
    """Turn down outputs that the target's rows drive harder than the rest's.

    Args:
        params: the parameters W.
        target: curvature of what is to be forgotten, of a text at its answers' tokens alone; only
            the factors A are read.
        rest: curvature of what is to be kept, of the same sites.
        least_risk: τ, the risk below which nothing is turned down; 0.0 (ours, arbitrary).
        strength: κ, how fast the decay falls with the risk; 8.0 (ours, arbitrary).

    Returns:
        The edit, and what was measured. The same rows in both sets leave everything as it is.

    Raises:
        ValueError: a number out of its range, curvatures of different sites or of no outputs, a
            parameter used at several sites, or no matrix with dense moments.
        FloatingPointError: parameters or moments are not finite.
    """
    check_numbers(SHARE, least_risk=least_risk)
    check_numbers(NOT_NEGATIVE, strength=strength)
    risk, utility, kept, changes = {}, {}, {}, {}
    for name, served in served_matrices(params, target, rest, "U-CAN"):
        weight, kernel = kernel_of(served)
        a, b = (_root(served.output_squares(m)) for m in (served.target, served.rest))
        inputs = _root(_diagonal(served.rest))[:, : weight.d_in]
        used = jnp.sum(jnp.abs(kernel) * inputs[:, :, None], axis=1)
        most = jnp.max(used, axis=1, keepdims=True)
        utility[name] = used / jnp.where(most > 0, most, 1)
        how = {"least_risk": least_risk, "strength": strength}
        risk[name], kept[name] = solve(a, b, utility[name], **how)
        change = (kept[name] - 1)[:, None, :] * served.matrix
        add_changes(changes, served.weight.scatter(change))
    check_finite("U-CAN's edit", changes, lambda: culprit(params, {}))
    return Edit(changes), UcanInfo(risk, utility, kept)


def _diagonal(moment: Float[Array, "layers d d"]) -> Float[Array, "layers d"]:
    return jnp.diagonal(moment, axis1=1, axis2=2)


def _mean_root(x: Float[Array, "*layers d"]) -> Float[Array, "*layers 1"]:
    return jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def _root(squares: Array) -> Array:
    return jnp.sqrt(jnp.maximum(squares, 0))

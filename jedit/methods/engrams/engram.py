"""AI Engram: the part of a weight that serves given inputs (ICML 2026, arXiv 2606.14997).

    W₊ = argmin 2 ‖X₊(W₊ - W)‖² + 2 ‖X₋W₊‖² = (S₊ + S₋)⁺ S₊ W
    W <- W - α f W₊

    S₊, S₋   sums of x xᵀ over the inputs of target and rest     `target`, `rest`
    f        ‖W₊‖/‖W‖ over the largest such ratio among the
             matrices, each without its bias; or 1               `strength`
    α        how much of it is taken out                         `scale`

With the *mean* moments C₊ of the n target inputs and C of all N, the paper's P = C⁺ C₊ W is N/n
times W₊: the n/N by which it scales P is in W₊ already, and no further factor on it.

For any partition of the data W = Σ_i W_i with W_i = (Σ_j S_j)⁺ S_i W: engrams add, so any subset is
erased by arithmetic, in any order [code]. The bias is the last row of W, convolutions go by
patches, and a table's S is its token counts.

Language models. The paper's engrams are of the answers' tokens alone. A curvature's A is over all
positions that are `valid`, whatever `mask` says, so give `estimate` batches in which only answers
are: `jedit.data.answers_only(batch)`. With `mask` alone S has the questions' tokens as well.

Differences. S is a curvature's A times its number of outputs, so that whatever `kfac` covers has
an engram; where positions and outputs are not as many, that weighs target against rest by outputs.
The exact minimiser is soft: X₋W₊ is not zero [derived]. The engram of a union and the sum of its
parts' agree to the digits that the pseudo-inverse leaves: on the digits network the logits to 4e-13
in float64 and to 3e-3 in float32 (tests/bench/claims/engrams.py).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.devices import on_auto_axes
from jedit.core.precision import HIGHEST
from jedit.edits import Edit
from jedit.methods._two_sets import Parts, input_sums
from jedit.methods.engrams._take_out import (
    EngramInfo,
    Strength,
    is_kept,
    take_out,
)


def solve(
    target: Float[Array, "d d"], whole: Float[Array, "d d"], weight: Float[Array, "d d_out"]
) -> Float[Array, "d d_out"]:
    """Solve for the method's W₊ = (S₊ + S₋)⁺ S₊ W by the eigenbasis of S₊ + S₋.

    Eigenvalues below d times float32's epsilon of the largest count as zero, in any dtype [code].
    """
    values, basis = jnp.linalg.eigh(whole)
    kept = is_kept(values)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    served = jnp.matmul(target, weight, precision=HIGHEST)
    rotated = jnp.matmul(basis.T, served, precision=HIGHEST)
    return jnp.matmul(basis, inverse[:, None] * rotated, precision=HIGHEST)


@on_auto_axes
def engram(
    params: PyTree,
    target: Parts,
    rest: Parts,
    *,
    strength: Strength = "adaptive",
    scale: float = 1.0,
) -> tuple[Edit, EngramInfo]:
    """Take out the part of the weights that serves the target's inputs.

    Args:
        params: the parameters W.
        target: curvature of what is to be forgotten, or of several disjoint parts of it. For a
            language model estimate it from `answers_only` batches, and `rest` too: see above.
        rest: curvature of all other data, or of several disjoint parts of it; every curvature is of
            the same sites. Only the factors A are read.
        strength: "adaptive" (paper; ahead of the other on TOFU, 0.817 against 0.706); "whole", 1
            (paper, as "count ratio"): the engrams of a partition add up to W.
        scale: α. Paper: 1.0 with "adaptive", 0.6 with "whole" on TOFU.

    Returns:
        The edit, and norms. Not to be traced: one eigendecomposition a matrix.

    Raises:
        ValueError: an unknown strength, curvatures of different sites, no Kronecker block, or a
            parameter used at several sites.
    """
    return take_out(params, target, rest, _piece, strength=strength, scale=scale)


def _piece(targets, rests, name, weight) -> Array:
    served, others = (
        functools.reduce(jnp.add, [input_sums(c, name) for c in group])
        for group in (targets, rests)
    )
    whole = served + others
    if served.ndim == 2:  # a table: token counts
        return (served / jnp.where(whole > 0, whole, 1))[:, :, None] * weight
    return jnp.stack([solve(s, w, m) for s, w, m in zip(served, whole, weight, strict=True)])

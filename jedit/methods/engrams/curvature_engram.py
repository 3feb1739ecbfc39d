"""Engrams in the metric of the output KL: the part of a weight that given *outputs* need. Ours.

    V = argmin ⟨V - W, S₊ (V - W) G₊⟩ + ⟨V, S₋ V G₋⟩
    S₊ V G₊ + S₋ V G₋ = S₊ W G₊                        a generalised Sylvester equation
    V = X (ω ∘ (X⁺ W Y⁺ᵀ)) Yᵀ                          its solution
    W <- W - α f V

    S₊, S₋   sums of inputs' moments, M A, over target and rest   `target`, `rest`
    G₊, G₋   moments of output gradients over them                `target`, `rest`
    X        joint basis: Xᵀ S₊ X = tr(S₊) diag(p) and
             Xᵀ S₋ X = tr(S₋) diag(1 - p); X⁺ its inverse
    Y, q     the same of G₊, G₋
    ω        c₊ p_i q_j / (c₊ p_i q_j + c₋ (1 - p_i)(1 - q_j)), c = tr(S) tr(G)
    λ        added to each G, in units of its mean eigenvalue     `damping`
    f, α     as in `engram`                                       `strength`, `scale`

Half of each term is the KL that K-FAC predicts, summed over a set's outputs: of the target, when V
stands in W's place, and of the rest, when V is added. AI Engram (arXiv 2606.14997) measures the
same two errors at the layer's own outputs, G = I; λ -> ∞ leads there but for the weights of the two
sets, tr G₊ and tr G₋, which stay. With G₊ = G₋ of full rank V is its W₊. Undamped, V can be many
times W, in directions that hardly change either set's outputs.

Additivity. The engrams of two sets that make up the data add up to W. Those of n sets would, if
each were solved with the sum over all sets of S_j ⊗ G_j; only for two such terms is there a joint
basis, so a group of parts is merged here into one S ⊗ G, as `kfac` of their union has it, and the
engrams of its parts do not add up to its own. Where neither set's outputs see a direction, V is
zero and the weight stays.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.checks import NOT_NEGATIVE, check_numbers
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


class JointBasis(NamedTuple):
    """The basis X in which two positive semi-definite matrices are diagonal at once.

    Of diagonal matrices, which are given as vectors, X and its inverse are vectors too.

    Attributes:
        basis: X, columns of zeros where neither matrix has anything.
        inverse: X⁺.
        share: p, in [0, 1].
    """

    basis: Float[Array, "d d"] | Float[Array, " d"]
    inverse: Float[Array, "d d"] | Float[Array, " d"]
    share: Float[Array, " d"]


def joint_basis(plus: Array, minus: Array) -> JointBasis:
    """Return the basis in which both are diagonal and add up to one, each at trace one.

    Eigenvalues of their sum below d times float32's epsilon of the largest count as zero, in any
    dtype.
    """
    # Each at trace one before they are added: what is cut off as rounding would else depend on how
    # many rows the two sets have. `solve` puts the traces back.
    plus, minus = (m / _positive(_trace(m)) for m in (plus, minus))
    whole = plus + minus
    if whole.ndim == 1:
        root = jnp.sqrt(whole)
        return JointBasis(
            jnp.where(root > 0, 1 / _positive(root), 0), root, plus / _positive(whole)
        )
    values, vectors = jnp.linalg.eigh(whole)
    kept = is_kept(values)
    root = jnp.sqrt(jnp.where(kept, values, 0))
    whitener = vectors * jnp.where(kept, 1 / _positive(root), 0)[None]
    # Whitened, the two add up to the identity: the eigenvectors of one are those of the other.
    share, turn = jnp.linalg.eigh(_product(whitener.T, _product(plus, whitener)))
    # X⁺ by its factors: X is not orthogonal, and inverting it would magnify what rounding left.
    inverse = _product(turn.T, root[:, None] * vectors.T)
    return JointBasis(_product(whitener, turn), inverse, jnp.clip(share, 0, 1))


def solve(
    target: tuple[Array, Array],
    rest: tuple[Array, Array],
    weight: Float[Array, "d d_out"],
    damping: float = 0.0,
) -> Float[Array, "d d_out"]:
    """Solve for the method's V, of (S₊, G₊), (S₋, G₋), W and λ."""
    (s, g), (s_rest, g_rest) = ((s, _damped(g, damping)) for s, g in (target, rest))
    x, y = joint_basis(s, s_rest), joint_basis(g, g_rest)
    served = _trace(s) * _trace(g) * x.share[:, None] * y.share[None]
    others = _trace(s_rest) * _trace(g_rest) * (1 - x.share)[:, None] * (1 - y.share)[None]
    rotated = _product(y.inverse, _product(x.inverse, weight).T).T
    kept = served / _positive(served + others) * rotated
    return _product(y.basis, _product(x.basis, kept).T).T


@on_auto_axes
def curvature_engram(
    params: PyTree,
    target: Parts,
    rest: Parts,
    *,
    damping: float = 1.0,
    strength: Strength = "adaptive",
    scale: float = 1.0,
) -> tuple[Edit, EngramInfo]:
    """Take out what the target's outputs need.

    Args:
        params: the parameters W.
        target: curvature of what is to be forgotten, or of several disjoint parts of it, which are
            merged. Estimated at `params`; corrected eigenvalues are not looked at.
        rest: curvature of all other data, or of several disjoint parts of it, which are merged;
            every curvature is of the same sites.
        damping: λ; 1, the best of a grid on the digits (tests/bench/claims/engrams.py); 0, the bare
            metric, was worse there than `engram`.
        strength: "adaptive" or "whole", as for `engram`; "adaptive" as there.
        scale: α; 1.0 is `engram`'s.

    Returns:
        The edit, and norms. Not to be traced: four eigendecompositions a matrix.

    Raises:
        ValueError: negative damping, an unknown strength, curvatures of different sites, no
            Kronecker block, or a parameter used at several sites.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)

    def piece(targets, rests, name, weight):
        (s, g), (s_rest, g_rest) = (_merged(group, name) for group in (targets, rests))
        layers = zip(s, g, s_rest, g_rest, weight, strict=True)
        return jnp.stack([solve((a, b), (c, d), w, damping) for a, b, c, d, w in layers])

    return take_out(params, target, rest, piece, strength=strength, scale=scale)


def _merged(group, name) -> tuple[Array, Array]:
    """Merge S and G of several parts as if they had been estimated as one set."""
    number = max(sum(int(c.num_outputs) for c in group), 1)
    inputs = [input_sums(c, name) for c in group]
    # S is a sum over outputs and G a mean over them: their product is then summed once.
    outputs = [
        c.factors[c.blocks[name].output].matrix * (int(c.num_outputs) / number) for c in group
    ]
    return functools.reduce(jnp.add, inputs), functools.reduce(jnp.add, outputs)


def _damped(g: Array, damping: float) -> Array:
    level = damping * _trace(g) / len(g)
    return g + (level if g.ndim == 1 else level * jnp.eye(len(g), dtype=g.dtype))


def _trace(m: Array) -> Array:
    return jnp.sum(m) if m.ndim == 1 else jnp.trace(m)


def _positive(x: Array) -> Array:
    """Return a divisor that is one where there is nothing to divide by."""
    return jnp.where(x > 0, x, 1)


def _product(m: Array, x: Array) -> Array:
    return m[:, None] * x if m.ndim == 1 else jnp.matmul(m, x, precision=HIGHEST)

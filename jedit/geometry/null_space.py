"""Projectors off the inputs that the retain set uses, from the eigenbasis of A.

    A = Q diag(a) Qᵀ        moment of a site's inputs over the retain set, a ascending
    P = Q diag(w) Qᵀ        w_i = 1 in the null space, and above it 0, or (c / a_i)^(1/ρ) relaxed
    ΔW <- P ΔW              so that a retained input x sees x ΔW = x P ΔW, nearly nothing

    τ   what the null space is, `threshold`: by "energy" the longest run of smallest a_i whose sum
        is within τ Σ a; by "rank" the τ smallest; by "eigenvalue" all a_i <= τ
    c   the largest a_i in the null space
    ρ   `relaxation`

Of a factor known by its k leading eigenvectors the d - k other directions are free together or not
at all, P = w_0 (1 - QQᵀ) + Q diag(w) Qᵀ; a threshold that falls among them is refused.

Sources. The hard projector by absolute eigenvalue is AlphaEdit's (ICLR 2025, its code: 2e-2)
[code]; relaxed weights are KUDA's idea (arXiv 2602.19275), the power law is ours [derived].
Differences: energy is the default, because an absolute eigenvalue has no scale: the same 2e-2 is
everything in one layer and nothing in the next. `Projector.report` says what came out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_word
from jedit.core.checks import COUNT_OR_ZERO, NOT_NEGATIVE, SHARE, Range, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import is_concrete, short_repr, text_table
from jedit.curvature.algebra import BlockMap, apply_blocks, spectral
from jedit.curvature.checks import check_counted, check_has, eigenbasis_of
from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.low_rank import join_axis, multiplicities, split_axis
from jedit.curvature.types import Curvature, Factor, Kronecker, Uncovered, pytree
from jedit.tracing.sites import Weight

Selection = Literal["energy", "rank", "eigenvalue"]
THRESHOLDS: dict[Selection, Range] = {
    "energy": SHARE,
    "rank": COUNT_OR_ZERO,
    "eigenvalue": NOT_NEGATIVE,
}


class NullSpaceReport(NamedTuple):
    """The share that a projector leaves free at one parameter; arrays (layers,).

    Attributes:
        rank: Σ w, the number of free directions (not whole when relaxed).
        dimension: the number of the inputs' directions, bias included.
        energy: Σ w a / Σ a, the share of the retained inputs' energy that is free.
        leakage: ‖A P‖ / ‖A‖ in Frobenius norms. Where A keeps leading eigenvectors alone, the
            others count at their mean, and with these free it is a lower bound.
    """

    rank: Array
    dimension: int
    energy: Array
    leakage: Array

    __repr__ = short_repr


@pytree("blocks")
@dataclasses.dataclass(frozen=True)
class Projector:
    """A map P of input directions: weights in the eigenbasis of each factor A.

    Sites that read one activation share a factor.

    Attributes:
        bases: by factor, eigenvectors in columns (layers, d, d); None for a diagonal factor; or
            the leading ones alone (layers, d, k).
        eigenvalues: by factor, the eigenvalues a (layers, d); of leading eigenvectors (layers,
            1 + k), the mean of the others first.
        weights: by factor, the weights w, as the eigenvalues.
        blocks: static; (name, parameter matrix, factor) of each block.
    """

    bases: Mapping[str, Array | None]
    eigenvalues: Mapping[str, Array]
    weights: Mapping[str, Array]
    blocks: tuple[tuple[str, Weight, str], ...]

    def report(self) -> dict[str, NullSpaceReport]:
        """Return what is free, by parameter path."""
        found = {}
        for name, weight, factor in self.blocks:
            a, w = self.eigenvalues[factor], self.weights[factor]
            n = multiplicities(self.bases[factor], a)
            most = jnp.max(a, axis=1, keepdims=True)
            a = a / jnp.where(most > 0, most, 1)  # squares of small ones leave the dtype
            total = jnp.sum(n * a, axis=1)
            norm = jnp.sqrt(jnp.sum(n * a * a, axis=1))
            is_dead = total == 0
            found[name] = NullSpaceReport(
                jnp.sum(n * w, axis=1),
                weight.rows,
                jnp.sum(n * w * a, axis=1) / jnp.where(is_dead, 1, total),
                jnp.sqrt(jnp.sum(n * (w * a) ** 2, axis=1)) / jnp.where(is_dead, 1, norm),
            )
        return found

    def __str__(self) -> str:
        if not all(map(is_concrete, jax.tree.leaves(self))):
            return short_repr(self)
        rows = [("parameter", "free of", "energy", "leakage")]
        for name, line in self.report().items():
            for k in range(len(line.rank)):
                layer = f"[{k}]" if len(line.rank) > 1 else ""
                rows.append(
                    (
                        name + layer,
                        f"{float(line.rank[k]):.4g} of {line.dimension}",
                        f"{float(line.energy[k]):.2e}",
                        f"{float(line.leakage[k]):.2e}",
                    )
                )
        return text_table(rows)

    def __repr__(self) -> str:
        return short_repr(self)


@on_auto_axes
def null_space(
    curvature: Curvature,
    *,
    threshold: float | int,
    by: Selection = "energy",
    relaxation: float = 0.0,
) -> Projector:
    """Return the projector onto the input directions that the retain set hardly uses.

    Args:
        curvature: the retain outputs' curvature; only the factors A of its Kronecker blocks are
            read.
        threshold: τ: a share of the energy (0 to 1), a number of directions, or an eigenvalue.
        by: "energy", "rank" or "eigenvalue".
        relaxation: ρ; 0 is a hard projector, larger ones let more of the used directions through.

    Returns:
        The projector; it is a pytree, so it passes through jit and stands in optimizer states.

    Raises:
        ValueError: an unknown `by`, a threshold out of its range, negative relaxation, no
            Kronecker block, or a threshold that falls among directions without eigenvector.
    """
    check_word(Selection, by=by)
    check_numbers(THRESHOLDS[by], threshold=threshold)
    check_numbers(NOT_NEGATIVE, relaxation=relaxation)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    blocks = tuple(
        (name, block.weight, block.input)
        for name, block in curvature.blocks.items()
        if isinstance(block, Kronecker)
    )
    if not blocks:
        raise ValueError("the curvature has no Kronecker block, so no moment of inputs")
    check_counted(curvature.num_outputs)
    bases, values, weights = {}, {}, {}
    for name, _, f in blocks:
        factor = curvature.factors[f]
        if factor.form == "leading":
            assert factor.eigenvalues is not None  # it has no other form
            bases[f], values[f] = factor.basis, factor.eigenvalues
            _check_parts(factor, threshold, by, name)
        else:
            bases[f], values[f] = eigenbasis_of(factor, name)
        number = multiplicities(bases[f], values[f])
        weights[f] = _weights(values[f], number, threshold, by, relaxation)
    return Projector(bases, values, weights, blocks)


def _check_parts(factor: Factor, threshold: float | int, by: Selection, name: str) -> None:
    """Refuse a threshold among directions of which the mean alone is known.

    Where the eigenvalues are traced nothing is refused: such directions are used, all of them.

    Raises:
        ValueError: it would free some of them and not others.
    """
    assert factor.basis is not None
    assert factor.eigenvalues is not None
    d, k = factor.basis.shape[1:]
    number = d - k
    if by == "rank":
        some, what = 0 < threshold < number, f"{number} directions or more, or none"
    elif not is_concrete(factor.eigenvalues):
        return
    else:
        a = np.asarray(factor.eigenvalues, np.float64)
        if by == "energy":
            share = number * a[:, 0] / np.maximum(number * a[:, 0] + a[:, 1:].sum(1), 1e-300)
            some = np.any((threshold > 0) & (threshold < share))
            what = f"a share of {share.max():.3g} or more, or none"
        else:
            # Those without eigenvector are below the least of the leading ones, and above zero.
            some = np.any((threshold > 0) & (threshold < a[:, 1:].min(1)) & (a[:, 0] > 0))
            what = f"an eigenvalue of {a[:, 1:].min(1).max():.3g} or more, or none"
    if some:
        raise ValueError(
            f"threshold={threshold} by {by} falls among the {number} directions of {name!r} that "
            f"have no eigenvector: the curvature keeps the {k} leading ones of {d}; give {what}, "
            "or a curvature of a larger rank"
        )


def _weights(
    a: Float[Array, "layers d"],
    number: Float[Array, "1 d"],
    threshold: float | int,
    by: Selection,
    relaxation: float,
) -> Float[Array, "layers d"]:
    # A diagonal factor's are in the order of its axis. The rest of leading eigenvectors is counted
    # first, also where a sketch has overrated its mean: each of them is below the leading ones.
    is_rest = jnp.broadcast_to(number > 1, a.shape)
    order = jnp.argsort(jnp.where(is_rest, -jnp.inf, a), axis=1)
    ascending = jnp.take_along_axis(a, order, axis=1)
    each = jnp.take_along_axis(jnp.broadcast_to(number, a.shape), order, axis=1)
    if by == "energy":
        energy = each * ascending
        is_free = jnp.cumsum(energy, axis=1) <= threshold * jnp.sum(energy, axis=1, keepdims=True)
    elif by == "rank":
        is_free = jnp.cumsum(each, axis=1) <= threshold
    else:
        # The rest is zero, or somewhere below the least of the leading ones.
        least = jnp.where(ascending[:, :1] > 0, ascending[:, 1:2], 0)
        is_free = jnp.where(each > 1, least, ascending) <= threshold
    w = jnp.where(is_free, 1.0, 0.0).astype(a.dtype)
    if relaxation > 0:
        # 1 stands in for the free ones: their share is not used, but must not divide by zero.
        cut = jnp.max(jnp.where(is_free, ascending, 0), axis=1, keepdims=True)
        share = cut / jnp.where(is_free, 1, ascending)
        # An overrated rest may stand above leading directions, of which none is enlarged.
        share = jnp.minimum(share, 1) ** jnp.asarray(1 / relaxation, a.dtype)
        w = jnp.where(is_free, w, share)
    # The argsort of a permutation is its inverse.
    return jnp.take_along_axis(w, jnp.argsort(order, axis=1), axis=1)


@on_auto_axes
def project(projector: Projector, tree: PyTree, *, uncovered: Uncovered = "zero") -> PyTree:
    """Return P T for every matrix of a tree shaped like params, bias included as its last row.

    Args:
        projector: P, as `null_space` returns it.
        tree: gradients, updates or a change of params.
        uncovered: parameters without a projector become "zero" (frozen) or pass by "identity".

    Returns:
        A tree like `tree`, in its dtypes. Costs 4 d_in² d_out flops a matrix.

    Raises:
        ValueError: the tree lacks a parameter of the projector, or has it in another shape;
            or an unknown `uncovered`.
    """
    check_word(Uncovered, uncovered=uncovered)
    check_kind(projector, Projector, "projector", "as `null_space` returns it")
    leaves = check_has((weight for _, weight, _ in projector.blocks), tree, "projector")

    def block_map(block: tuple[str, Weight, str]) -> BlockMap:
        _, weight, factor = block
        basis, w = projector.bases[factor], projector.weights[factor][:, :, None]
        if basis is None or basis.shape[-1] == basis.shape[-2]:
            turn = functools.partial(rotate_axis, basis, axis=1)
            return spectral(weight, w, weight.gather, turn)
        known = Factor(None, basis, projector.eigenvalues[factor])

        def split(matrix, *, back=False):
            return join_axis(known, matrix, 1) if back else split_axis(known, matrix, 1)

        return spectral(weight, (w[:, :1], w[:, 1:]), weight.gather, split)

    return apply_blocks(map(block_map, projector.blocks), tree, leaves, uncovered=uncovered)

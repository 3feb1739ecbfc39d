"""Memorised-subspace pruning: zero the weights that serve memorised prompts (arXiv 2406.18566).

    S = |W| ∘ (h 1ᵀ)                     Wanda's score of every weight (arXiv 2306.11695)
    M = [S₊ among the top ρ of its matrix] ∧ [S₊ > S₋]
    W <- W ∘ (1 - M)

    h₊, h₋   root mean square of what enters each row of W,
             on memorised prompts and on others               `memorised`, `rest`
    S₊, S₋   the two scores
    ρ        share of a matrix's weights                      `share`
    M        what is set to zero; of several sets of
             memorised prompts the union or the intersection  `agreement`

h is the root of the diagonal of a curvature's input moment A, which every `kfac` holds; one with
`max_dim=1` holds nothing else of A. Since both scores have the factor |W|, S₊ > S₋ says h₊ > h₋: a
row of W is spared altogether where its input is no stronger on the memorised prompts.

Which sets. In a diffusion model the paper takes the feed-forward blocks' weights, at early
denoising steps, with the empty prompt for the rest [notes]: `select=` of `kfac` is the first, and
`jedit.models.visited_inputs` makes the batches of the second. Nothing else in here knows of
diffusion: forget and retain rows of any model are two sets, and `jedit forget` prunes whatever is
selected, attention too.

Differences. The score, the comparison with the empty prompt, the top share and the aggregation over
small sets are the paper's [notes]. The root mean square in the place of the norm over a set's
inputs is ours: it is the same for sets of one size, and compares sets of two [derived]. That the
share is of each matrix, and that several sets are united unless told otherwise, is ours: how the
paper does either was not seen. Biases, norm gains and tables' rows that no `select` names stay.
"""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_word
from jedit.core.checks import SHARE, check_finite, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.curvature import Curvature
from jedit.curvature.checks import matrix_of
from jedit.curvature.types import Kronecker
from jedit.edits import Edit
from jedit.methods._two_sets import Parts, add_changes, comparable, input_sums

Agreement = Literal["any", "all"]


class SubspaceInfo(NamedTuple):
    """What was set to zero, by block.

    Attributes:
        pruned_share: share of the weights of every layer of a block that became zero, (layers,).
        overlap: of several memorised sets, the weights that all would set to zero over those that
            any would, (layers,): 1 where the sets share one subspace; 1 for a single set too.
    """

    pruned_share: dict[str, Array]
    overlap: dict[str, Array]

    __repr__ = short_repr


def solve(
    weight: Float[Array, "d d_out"],
    served: Float[Array, " d"],
    others: Float[Array, " d"],
    share: float,
) -> Bool[Array, "d d_out"]:
    """Solve for the method's M, of W, h₊, h₋ and ρ; of equal scores the first are taken."""
    size = jnp.abs(weight)
    score, other = size * served[:, None], size * others[:, None]
    order = jnp.argsort(-score.ravel())  # stable
    top = jnp.zeros(weight.size, bool).at[order[: round(share * weight.size)]].set(True)
    return top.reshape(weight.shape) & (score > other)


@on_auto_axes
def memorised_subspace(
    params: PyTree,
    memorised: Parts,
    rest: Parts,
    *,
    share: float = 0.01,
    agreement: Agreement = "any",
) -> tuple[Edit, SubspaceInfo]:
    """Set to zero the weights that serve memorised prompts most, and more than others.

    Args:
        params: the parameters W.
        memorised: curvature of memorised rows, or of several small sets of them, each of which
            finds weights of its own. Only the diagonals of the input factors A are read.
        rest: curvature of other rows, or of several sets, whose mean is taken: in a diffusion
            model of the empty prompt. Every curvature is of the same sites.
        share: ρ, of each matrix; 0.01 (ours: see tests/bench/claims/memorised.md).
        agreement: "any" of the memorised sets finds a weight (ours), or "all" of them must.

    Returns:
        The edit, whose scale 1 makes the weights exactly zero in exact arithmetic, and counts. Not
        to be traced: one sort of every matrix and set.

    Raises:
        ValueError: a share outside 0 to 1, another word, curvatures of different sites, no
            Kronecker block, or a parameter used at several sites.
        FloatingPointError: parameters or moments are not finite.
    """
    check_numbers(SHARE, share=share)
    check_word(Agreement, agreement=agreement)
    sets, rests, blocks, leaves = comparable(params, memorised, rest, "a pruning")
    # Beforehand: what is not finite compares as false, and would be spared without a word.
    check_finite("a parameter", params, "its scores cannot be compared")
    read = {
        f"{name} of curvature {i}": c.factors[block.input].matrix
        for i, c in enumerate((*sets, *rests))
        for name, block in blocks.items()
    }
    check_finite("a moment of the inputs", read, "the rows that it is of may hold NaN")
    changes: dict[str, Array] = {}
    pruned, overlap = {}, {}
    for name, block in blocks.items():
        kernel = block.weight.kernel
        dtype = matrix_of(sets[0].factors[block.input], name).dtype
        weight = kernel.gather({path: leaves[path].astype(dtype) for path in kernel.paths})
        others = jnp.sqrt(_mean_square(rests, name))
        masks = [
            jnp.stack([solve(*layer, share) for layer in zip(weight, served, others, strict=True)])
            for served in (jnp.sqrt(_mean_square([c], name)) for c in sets)
        ]
        any_of, all_of = (functools.reduce(f, masks) for f in (jnp.logical_or, jnp.logical_and))
        mask = any_of if agreement == "any" else all_of
        pruned[name] = jnp.mean(mask, axis=(1, 2), dtype=dtype)
        found, common = (jnp.sum(m, axis=(1, 2), dtype=dtype) for m in (any_of, all_of))
        overlap[name] = jnp.where(found > 0, common / jnp.where(found > 0, found, 1), 1)
        add_changes(changes, kernel.scatter(jnp.where(mask, -weight, 0)))
    return Edit(changes), SubspaceInfo(pruned, overlap)


def _mean_square(group: list[Curvature], name: str) -> Array:
    """Return the diagonal of A, (layers, d_in), without the bias; of several sets the mean."""
    block, sums = group[0].blocks[name], [input_sums(curvature, name) for curvature in group]
    assert isinstance(block, Kronecker)
    thin = [s if s.ndim == 2 else jnp.diagonal(s, axis1=1, axis2=2) for s in sums]
    whole = functools.reduce(jnp.add, thin)[:, : block.weight.d_in]
    counts = [curvature.num_outputs.astype(whole.dtype) for curvature in group]
    return whole / functools.reduce(jnp.add, counts)

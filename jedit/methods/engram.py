"""AI Engram: the part of a weight that serves given inputs (ICML 2026, arXiv 2606.14997).

    W₊ = argmin 2 ‖X₊(W₊ - W)‖² + 2 ‖X₋W₊‖² = (S₊ + S₋)⁺ S₊ W
    W <- W - α f W₊

    S₊, S₋   sums of x xᵀ over the inputs of target and rest     `target`, `rest`
    f        n₊/(n₊ + n₋); or ‖W₊‖/‖W‖ over the largest such
             ratio among the matrices; or 1                      `strength`
    α        how much of it is taken out                         `scale`

For any partition of the data W = Σ_i W_i with W_i = (Σ_j S_j)⁺ S_i W: engrams add, so any subset is
erased by arithmetic, in any order [code]. The bias is the last row of W, convolutions go by
patches, and a table's S is its token counts.

Differences. S is a curvature's A times its number of outputs, so that whatever `kfac` covers has
an engram; where positions and outputs are not as many, that weighs target against rest by outputs.
The exact minimiser is soft: X₋W₊ is not zero [derived].
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.curvature import Curvature
from jedit.curvature.structure import HIGHEST, Kronecker
from jedit.edits import Edit

STRENGTHS = ("count", "adaptive", "whole")


class EngramInfo(NamedTuple):
    """What was found, by block.

    Attributes:
        relative_norm: ‖W₊‖ / ‖W‖ of every layer of a block, (layers,).
        strength: f, (layers,).
    """

    relative_norm: dict[str, Array]
    strength: dict[str, Array]


def solve(
    target: Float[Array, "d d"], whole: Float[Array, "d d"], weight: Float[Array, "d d_out"]
) -> Float[Array, "d d_out"]:
    """The method's algebra: W₊ = (S₊ + S₋)⁺ S₊ W, by the eigenbasis of S₊ + S₋.

    Eigenvalues below d·eps of the largest count as zero.
    """
    values, basis = jnp.linalg.eigh(whole)
    is_kept = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(is_kept, 1 / jnp.where(is_kept, values, 1), 0)
    served = jnp.matmul(target, weight, precision=HIGHEST)
    rotated = jnp.matmul(basis.T, served, precision=HIGHEST)
    return jnp.matmul(basis, inverse[:, None] * rotated, precision=HIGHEST)


def engram(
    params: PyTree,
    target: Curvature | Sequence[Curvature],
    rest: Curvature | Sequence[Curvature],
    *,
    strength: str = "adaptive",
    scale: float = 1.0,
) -> tuple[Edit, EngramInfo]:
    """The edit that takes out what serves the target's inputs.

    Args:
        params: W.
        target: curvature of what is to be forgotten, or of several disjoint parts of it.
        rest: of all else, likewise; every one of the same sites. Their factors A are read alone.
        strength: "count", the target's share of the outputs (paper); "adaptive" (paper; ahead of
            it on TOFU, 0.817 against 0.706); "whole", 1: the engrams of a partition add up to W.
        scale: α. Paper: 1 with "adaptive", 0.6 with "count" on TOFU.

    Returns:
        The edit, and norms. Not to be traced: one eigendecomposition a matrix.

    Raises:
        ValueError: an unknown strength, curvatures of different sites, or no Kronecker block.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"strength must be one of {', '.join(STRENGTHS)}, got {strength!r}")
    targets = [target] if isinstance(target, Curvature) else list(target)
    everything = [*targets, *([rest] if isinstance(rest, Curvature) else rest)]
    names = [name for name, b in targets[0].blocks.items() if isinstance(b, Kronecker)]
    if not names or any(set(c.blocks) != set(targets[0].blocks) for c in everything):
        raise ValueError(
            "target and rest must be curvatures of the same sites, with a Kronecker block at least"
        )
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    found, relative = {}, {}
    for name in names:
        block = targets[0].blocks[name]
        assert isinstance(block, Kronecker)
        served, whole = (
            functools.reduce(jnp.add, [_sums(c, name) for c in group])
            for group in (targets, everything)
        )
        weight = block.weight.gather(
            {path: leaves[path].astype(served.dtype) for path in block.weight.paths}
        )
        if served.ndim == 2:  # a table: token counts
            share = served / jnp.where(whole > 0, whole, 1)
            found[name] = share[:, :, None] * weight
        else:
            found[name] = jnp.stack(
                [solve(s, w, m) for s, w, m in zip(served, whole, weight, strict=True)]
            )
        size = jnp.sqrt(jnp.sum(weight**2, axis=(1, 2)))
        kept = jnp.sqrt(jnp.sum(found[name] ** 2, axis=(1, 2)))
        relative[name] = kept / jnp.where(size > 0, size, 1)
    strengths = _strengths(strength, relative, targets, everything)
    blocks: dict[str, Array] = {}
    for name in names:
        taken = -scale * strengths[name][:, None, None] * found[name]
        for path, part in targets[0].blocks[name].weight.scatter(taken).items():
            blocks[path] = blocks[path] + part if path in blocks else part
    return Edit(blocks), EngramInfo(relative, strengths)


def _sums(curvature: Curvature, name: str) -> Array:
    """S of a block: its A times the number of outputs."""
    block = curvature.blocks[name]
    assert isinstance(block, Kronecker)
    matrix = curvature.factors[block.input].matrix
    return matrix * curvature.num_outputs.astype(matrix.dtype)


def _strengths(strength, relative, targets, everything) -> dict[str, Array]:
    if strength == "adaptive":
        largest = max(float(jnp.max(r)) for r in relative.values())
        return {
            name: r / max(largest, float(np.finfo(r.dtype).tiny)) for name, r in relative.items()
        }
    share = 1.0
    if strength == "count":
        counts = [sum(int(c.num_outputs) for c in group) for group in (targets, everything)]
        share = counts[0] / max(counts[1], 1)
    return {name: jnp.full_like(r, share) for name, r in relative.items()}

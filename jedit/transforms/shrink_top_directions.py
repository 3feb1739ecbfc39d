"""Shrink updates along the top directions of both factors: U <- C_A U C_G (RepSelect's collapse).

    C = λ_k max(M, λ_k)⁻¹ = I - P (I - λ_k S⁻¹) Pᵀ      for M = A and M = G

    M   one factor of a block: moment of inputs A, or of output gradients G
    λ_k its k-th largest eigenvalue; S the k largest, P their eigenvectors

so that a direction that holds more than λ_k is divided by how much more, and all others pass. On a
gradient Σ a gᵀ over tokens it is Σ (C_A a)(C_G g)ᵀ.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jedit.core.arguments import check_kind
from jedit.core.checks import COUNT, POSITIVE_SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.curvature import Curvature
from jedit.curvature.algebra import BlockMap, apply_blocks, gather, rotate, spectral
from jedit.curvature.checks import check_covers, eigenbasis_of
from jedit.curvature.mesh.rotation import sharded_products
from jedit.curvature.types import Kronecker, Uncovered
from jedit.transforms._arrays import owned, sharded_like, without_frozen


class ShrinkTopDirectionsState(NamedTuple):
    """The curvature: in the state, so that it is an argument of the jitted step, not a constant."""

    curvature: Curvature


def shrink_top_directions(
    curvature: Curvature,
    *,
    rank: int = 512,
    share: float = 0.125,
    uncovered: Uncovered = "zero",
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by C_A and C_G, each the floored inverse of a factor, at most 1.

    Stands first, before anything that scales by the gradient's size, as Adam does:

        optax.chain(shrink_top_directions(curvature), optax.sgd(0.2))

    Args:
        curvature: whose top directions are shrunk; of the forget rows, in RepSelect.
        rank: k, how many directions of a factor are shrunk, at most: 512, RepSelect's.
        share: k is at most this share of a factor's directions, rounded down, and at least 1: 0.125
            is what 512 is of 4096, the width of the models with eight billion parameters. Without
            it a narrower factor would be whitened whole.
        uncovered: updates of parameters without two factors become "zero" (they stay frozen; the
            default), or pass as they are by "identity".

    Returns:
        The transform; its state holds a copy of the curvature, and a call of `update` costs what
        `solve` does. Where fewer than k directions hold anything, λ_k is the least that holds
        something; a factor of zero shrinks nothing.

    Raises:
        ValueError: a rank below 1, a share outside of 0 to 1, or no block has two factors; at
            `update`, the updates are not shaped like the curvature's parameters.
    """
    check_numbers(COUNT, rank=rank)
    check_numbers(POSITIVE_SHARE, share=share)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    if not any(isinstance(block, Kronecker) for block in curvature.blocks.values()):
        raise ValueError("the curvature has no Kronecker block, so no factors with directions")

    def init(params) -> Any:
        del params
        return ShrinkTopDirectionsState(owned(curvature))

    def update(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        blocks = state.curvature.blocks
        names = [name for name, block in blocks.items() if isinstance(block, Kronecker)]
        shrunk = _shrunk(state.curvature, names, updates, rank, share, uncovered)
        like = updates
        if uncovered == "zero":
            covered = [path for name in names for path in blocks[name].weight.paths]
            like = without_frozen(updates, params, covered)
        return sharded_like(shrunk, like), state

    return optax.GradientTransformationExtraArgs(init, update)


@on_auto_axes
def _shrunk(
    curvature: Curvature,
    names: list[str],
    updates: Any,
    rank: int,
    share: float,
    uncovered: Uncovered,
) -> Any:
    leaves = check_covers(curvature, updates)

    def block_map(name: str) -> BlockMap:
        block = curvature.blocks[name]
        assert isinstance(block, Kronecker)
        a, g = (
            floored_inverse(eigenbasis_of(curvature.factors[factor], name)[1], rank, share)
            for factor in (block.input, block.output)
        )

        def turn(matrix: Array, *, back: bool = False) -> Array:
            return rotate(curvature, name, matrix, back=back)

        def gathered(leaves) -> Array:
            return gather(block, leaves)

        at = block.sharding
        values = a[:, :, None] * g[:, None, :] if at is None else sharded_products(a, g, at)
        return spectral(block.weight, values, gathered, turn)

    return apply_blocks(map(block_map, names), updates, leaves, uncovered=uncovered)


def floored_inverse(
    eigenvalues: Float[Array, "layers d"], rank: int, share: float
) -> Float[Array, "layers d"]:
    """Return λ_k / max(λ, λ_k) for each eigenvalue λ of each layer, in the order they came."""
    d = eigenvalues.shape[1]
    k = max(1, min(rank, int(share * d)))
    top = jnp.sort(eigenvalues, axis=1)[:, d - k :]
    most = top[:, -1:]
    # What rounding leaves of directions that no token has is no floor: all else would vanish.
    is_held = top > most * (d * float(jnp.finfo(top.dtype).eps))
    floor = jnp.min(jnp.where(is_held, top, most), axis=1, keepdims=True)
    is_dead = floor <= 0
    floor = jnp.where(is_dead, 1, floor)
    return jnp.where(is_dead, 1, floor / jnp.maximum(eigenvalues, floor))

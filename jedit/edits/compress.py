"""Edits of a smaller rank, and what that costs.

    Δ ≈ Q (Qᵀ Δ),   Q (d_in, rank) the leading directions of Δ's range

by subspace iteration with twice as many columns, then with as many as wanted on the small Gram
matrix that is left (Halko, Martinsson & Tropp 2011). The error is computed, not estimated:
‖Δ - QQᵀΔ‖² = ‖Δ‖² - ‖QᵀΔ‖². Nothing here calls LAPACK, so it may stand under jit and vmap in any
number.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import HIGHEST
from jedit.edits.edit import Edit
from jedit.edits.low_rank import Delta, LowRank
from jedit.tracing.sites import Weight

ITERATIONS = 2  # each is one product with the block and one with its transpose; arbitrary
SMALL_ITERATIONS = 20  # on the Gram matrix of twice the rank's columns; arbitrary
SEED = 0  # of the random matrix that the iteration starts from


class Truncation(NamedTuple):
    """A truncated product; further axes may lead each.

    Attributes:
        left: Q (..., d_in, rank), orthonormal columns, or zero ones beyond the true rank.
        right: Qᵀ Δ (..., rank, d_out).
        lost2: (...), the squared Frobenius norm of what was cut off.
    """

    left: Array
    right: Array
    lost2: Array


@on_auto_axes
def compress(edit: Edit, rank: int) -> tuple[Edit, dict[str, Array]]:
    """Cut every matrix of an edit down to a rank; vectors and smaller matrices stay as they are.

    Args:
        edit: dense or thin. A stack of edits goes through `jax.vmap`.
        rank: the largest rank that a matrix keeps.

    Returns:
        The edit, and by path of each block that was cut the relative Frobenius error, a scalar.

    Raises:
        ValueError: the rank is below one.
    """
    check_numbers(COUNT, rank=rank)
    blocks: dict[str, Delta] = {}
    errors = {}
    for path, block in edit.blocks.items():
        blocks[path] = block
        if isinstance(block, LowRank):
            if block.rank > rank:
                cut = truncate(block.left, block.right, rank)
                blocks[path] = LowRank(cut.left, cut.right, block.weight)
                errors[path] = _over_layers(cut, block.left, block.right)
        elif block.ndim >= 2 and rank * sum(_sides(block.shape)) < block.size:
            weight = Weight(path, block.shape, (), 1, False, *_sides(block.shape))
            matrix = block.reshape(1, weight.d_in, weight.d_out)
            cut = truncate(matrix, None, rank)
            blocks[path] = LowRank(cut.left, cut.right, weight)
            errors[path] = _over_layers(cut, matrix, None)
    return Edit(blocks), errors


def truncate(left: Array, right: Array | None, rank: int) -> Truncation:
    """Return the leading part of a product L R, whose product is never formed.

    Args:
        left: (..., d_in, k).
        right: (..., k, d_out); None: the matrix is `left` alone, (..., d_in, d_out).
        rank: the number of columns that the leading part has.

    Returns:
        The leading part; its cost is some six products of each matrix with 2 rank columns.
    """

    def times(x: Array) -> Array:
        x = x if right is None else jnp.matmul(right, x, precision=HIGHEST)
        return jnp.matmul(left, x, precision=HIGHEST)

    def transposed(x: Array) -> Array:
        x = jnp.matmul(jnp.swapaxes(left, -1, -2), x, precision=HIGHEST)
        if right is None:
            return x
        return jnp.matmul(jnp.swapaxes(right, -1, -2), x, precision=HIGHEST)

    check_numbers(COUNT, rank=rank)
    d_out = (left if right is None else right).shape[-1]
    # Twice the rank and two: how fast the leading directions come depends on the gap beyond.
    columns = min(2 * rank + 2, left.shape[-2], d_out)
    start = jax.random.normal(jax.random.key(SEED), (d_out, columns), left.dtype)
    basis = _orthonormal(times(jnp.broadcast_to(start, (*left.shape[:-2], d_out, columns))))
    for _ in range(ITERATIONS):
        basis = _orthonormal(times(_orthonormal(transposed(basis))))
    core = jnp.swapaxes(transposed(basis), -1, -2)
    gram = jnp.matmul(core, jnp.swapaxes(core, -1, -2), precision=HIGHEST)

    def turn(_: int | Array, x: Array) -> Array:
        return _orthonormal(jnp.matmul(gram, x, precision=HIGHEST))

    chosen = jax.lax.fori_loop(0, SMALL_ITERATIONS, turn, _orthonormal(gram[..., :rank]))
    basis = jnp.matmul(basis, chosen, precision=HIGHEST)
    cut = jnp.matmul(jnp.swapaxes(chosen, -1, -2), core, precision=HIGHEST)
    # Of the remainder itself: the whole norm less the kept one would leave of a small remainder
    # nothing but the rounding of the two.
    inside = jnp.matmul(jnp.swapaxes(basis, -1, -2), left, precision=HIGHEST)
    rest = left - jnp.matmul(basis, inside, precision=HIGHEST)
    return Truncation(basis, cut, jnp.maximum(_norm2(rest, right), 0))


def _norm2(left: Array, right: Array | None) -> Array:
    """Return ‖L R‖², from the two small Gram matrices."""
    if right is None:
        return jnp.sum(left * left, axis=(-1, -2))
    inner = jnp.matmul(jnp.swapaxes(left, -1, -2), left, precision=HIGHEST)
    outer = jnp.matmul(right, jnp.swapaxes(right, -1, -2), precision=HIGHEST)
    return jnp.sum(inner * outer, axis=(-1, -2))


def _over_layers(cut: Truncation, left: Array, right: Array | None) -> Array:
    """Return the one relative error of a block of several layers."""
    total = jnp.sum(_norm2(left, right))
    return jnp.sqrt(jnp.sum(cut.lost2) / jnp.where(total > 0, total, 1))


def _orthonormal(columns: Array) -> Array:
    """Orthonormalise by Gram-Schmidt, each column twice; one in the span of others becomes zero."""
    tiny = 10 * jnp.finfo(columns.dtype).eps

    def add(j: int | Array, basis: Array) -> Array:
        column = jax.lax.dynamic_slice_in_dim(columns, j, 1, axis=-1)
        length = jnp.linalg.norm(column, axis=-2, keepdims=True)
        for _ in range(2):  # the second time takes off what cancellation has left
            inner = jnp.matmul(jnp.swapaxes(basis, -1, -2), column, precision=HIGHEST)
            column = column - jnp.matmul(basis, inner, precision=HIGHEST)
        rest = jnp.linalg.norm(column, axis=-2, keepdims=True)
        is_new = rest > tiny * length
        unit = jnp.where(is_new, column / jnp.where(is_new, rest, 1), 0)
        return jax.lax.dynamic_update_slice_in_dim(basis, unit, j, axis=-1)

    return jax.lax.fori_loop(0, columns.shape[-1], add, jnp.zeros_like(columns))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]

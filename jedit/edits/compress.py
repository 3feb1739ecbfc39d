"""Edits of a smaller rank, and what that costs.

    Δ ≈ Q (Qᵀ Δ),   Q (d_in, rank) the leading directions of Δ's range

by subspace iteration with twice as many columns, then with as many as wanted on the small Gram
matrix that is left (Halko, Martinsson & Tropp 2011). Columns are orthonormalised by their Gram
matrix, Y T with Tᵀ (YᵀY) T = 1, as in Cholesky QR: all that is done one column after the other is
done on small matrices, which all blocks have alike, so that it is done for all of them at once. The
error is that of the remainder itself, ‖Δ - QQᵀΔ‖. Nothing here calls LAPACK, whose batched calls
can deadlock side by side: it may stand under jit and vmap in any number.

Directions whose singular values are below the root of the dtype's rounding times the largest, 3e-4
of it in float32, are lost in the squares, and some of them are cut off though the rank has room.
Squares of squares stand in it too: Δ is first brought to entries of about one, by powers of two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import HIGHEST, exponents, shifted, wide
from jedit.edits.edit import Edit
from jedit.edits.low_rank import Delta, LowRank
from jedit.tracing.sites import Weight

ITERATIONS = 1  # one product with the block and one with its transpose; arbitrary
SMALL_ITERATIONS = 8  # on the Gram matrix of twice the rank's columns; arbitrary
SEED = 0  # of the random matrix that the iteration starts from
LOWEST = -(2**12)  # an exponent below those of all numbers


# (L, R) stands for L R, and (Δ, None) for Δ.
Product = tuple[Array, Array | None]


class Truncation(NamedTuple):
    """A truncated product; further axes may lead each.

    Attributes:
        left: Q (..., d_in, rank), orthonormal columns, beyond the true rank any or zero ones.
        right: Qᵀ Δ (..., rank, d_out).
        lost2: (...), the squared Frobenius norm of what was cut off.
    """

    left: Array
    right: Array
    lost2: Array


class _Scaled(NamedTuple):
    """A product 2ⁿ L R of entries of about one, in float32 or wider; n is (...), int32."""

    left: Array
    right: Array | None
    n: Array


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
    blocks: dict[str, Delta] = dict(edit.blocks)
    weights: dict[str, Weight] = {}
    products: dict[str, Product] = {}
    for path, block in blocks.items():
        if isinstance(block, LowRank):
            if block.rank > rank:
                weights[path], products[path] = block.weight, (block.left, block.right)
        elif block.ndim >= 2 and rank * sum(_sides(block.shape)) < block.size:
            weight = Weight(path, block.shape, (), 1, False, *_sides(block.shape))
            weights[path] = weight
            products[path] = (block.reshape(1, weight.d_in, weight.d_out), None)
    errors = {}
    scaled = [_scaled(*product) for product in products.values()]
    for path, given, cut in zip(products, scaled, _truncate_scaled(scaled, rank), strict=True):
        dtype = products[path][0].dtype
        right = jnp.ldexp(cut.right, given.n[..., None, None])
        blocks[path] = LowRank(cut.left.astype(dtype), right.astype(dtype), weights[path])
        errors[path] = _over_layers(given, cut)
    return Edit(blocks), errors


def truncate(left: Array, right: Array | None, rank: int) -> Truncation:
    """Return the leading part of a product L R, whose product is never formed.

    Args:
        left: (..., d_in, k).
        right: (..., k, d_out); None: the matrix is `left` alone, (..., d_in, d_out).
        rank: the number of columns that the leading part has.

    Returns:
        The leading part; its cost is some five products of each matrix with 2 rank columns.
    """
    return truncate_all([(left, right)], rank)[0]


def truncate_all(products: Sequence[Product], rank: int) -> list[Truncation]:
    """Return the leading parts of several products, each as `truncate` does, in less time.

    What is done for one column after the other is done at once for all products that lie on the
    same devices.
    """
    check_numbers(COUNT, rank=rank)
    scaled = [_scaled(*product) for product in products]
    found = []
    cuts = _truncate_scaled(scaled, rank)
    for (left, _), given, cut in zip(products, scaled, cuts, strict=True):
        right = jnp.ldexp(cut.right, given.n[..., None, None])
        lost2 = jnp.ldexp(cut.lost2, 2 * given.n)
        found.append(Truncation(cut.left.astype(left.dtype), right.astype(left.dtype), lost2))
    return found


def _scaled(left: Array, right: Array | None) -> _Scaled:
    """Bring a product to entries of about one, by powers of two that round nothing.

    Each column of L and each row of R by itself: the largest of one may meet the least of the
    other.
    """
    left = wide(left)
    if right is None:
        n = jnp.vectorize(exponents, signature="(i,j)->()")(left)
        return _Scaled(shifted(left, -n[..., None, None]), None, n)
    right, of_last = wide(right), jnp.vectorize(exponents, signature="(i)->()")
    n, m = of_last(jnp.swapaxes(left, -1, -2)), of_last(right)
    is_there = jnp.any(left != 0, axis=-2) & jnp.any(right != 0, axis=-1)
    total = jnp.max(n + m, axis=-1, where=is_there, initial=LOWEST)
    less = jnp.minimum(n + m - total[..., None], 0)
    right = jnp.ldexp(shifted(right, -m[..., None]), less[..., None])
    return _Scaled(shifted(left, -n[..., None, :]), right, total)


def _truncate_scaled(products: Sequence[_Scaled], rank: int) -> list[Truncation]:
    """Return the leading parts of the products' L R, which are cut where they lie."""
    together: dict[tuple | None, list[int]] = {}
    for i, product in enumerate(products):
        together.setdefault(_devices(product.left), []).append(i)
    found: dict[int, Truncation] = {}
    for places in together.values():
        cuts = _truncate_together([products[i][:2] for i in places], rank)
        found.update(zip(places, cuts, strict=True))
    return [found[i] for i in range(len(products))]


def _devices(x: Array) -> tuple | None:
    """Return the devices that an array lies on, in order; under a trace all are of one program."""
    return None if isinstance(x, Tracer) else tuple(x.sharding.devices_indices_map(x.shape))


def _truncate_together(products: Sequence[Product], rank: int) -> list[Truncation]:
    """Return the leading parts of products that lie on the same devices."""
    bases = _orthonormal([_times(*p, _start(*p, rank)) for p in products], 2)
    for _ in range(ITERATIONS):
        around = [_transposed(*p, b) for p, b in zip(products, bases, strict=True)]
        bases = _orthonormal([_times(*p, x) for p, x in zip(products, around, strict=True)], 2)
    # Three times: of columns below the rounding each pass leaves some short: after one by up to 0.7
    # in two of eight edits, after two by up to 2e-4 (64 columns, float32).
    bases = _orthonormal(bases, 3)
    cores = [jnp.swapaxes(_transposed(*p, b), -1, -2) for p, b in zip(products, bases, strict=True)]
    grams = [jnp.matmul(c, jnp.swapaxes(c, -1, -2), precision=HIGHEST) for c in cores]

    def turn(_: int | Array, x: list[Array]) -> list[Array]:
        turned = [jnp.matmul(g, y, precision=HIGHEST) for g, y in zip(grams, x, strict=True)]
        return _orthonormal(turned, 1)

    chosen = _orthonormal([gram[..., :rank] for gram in grams], 1)
    chosen = jax.lax.fori_loop(0, SMALL_ITERATIONS, turn, chosen)
    chosen = _orthonormal(chosen, 3)
    found = []
    for (left, right), basis, core, choice in zip(products, bases, cores, chosen, strict=True):
        basis = jnp.matmul(basis, choice, precision=HIGHEST)
        cut = jnp.matmul(jnp.swapaxes(choice, -1, -2), core, precision=HIGHEST)
        # Of the remainder itself: the whole norm less the kept one would leave of a small remainder
        # nothing but the rounding of the two.
        inside = cut
        if right is not None:
            inside = jnp.matmul(jnp.swapaxes(basis, -1, -2), left, precision=HIGHEST)
        rest = left - jnp.matmul(basis, inside, precision=HIGHEST)
        lost2 = jnp.maximum(_norm2(rest, right), 0)
        found.append(Truncation(basis, cut, lost2))
    return found


def _start(left: Array, right: Array | None, rank: int) -> Array:
    """Return the random matrix that the iteration starts from, (..., d_out, columns)."""
    d_out = (left if right is None else right).shape[-1]
    # Twice the rank and two: how fast the leading directions come depends on the gap beyond.
    columns = min(2 * rank + 2, left.shape[-2], d_out)
    start = jax.random.normal(jax.random.key(SEED), (d_out, columns), left.dtype)
    return jnp.broadcast_to(start, (*left.shape[:-2], d_out, columns))


def _times(left: Array, right: Array | None, x: Array) -> Array:
    x = x if right is None else jnp.matmul(right, x, precision=HIGHEST)
    return jnp.matmul(left, x, precision=HIGHEST)


def _transposed(left: Array, right: Array | None, x: Array) -> Array:
    x = jnp.matmul(jnp.swapaxes(left, -1, -2), x, precision=HIGHEST)
    if right is None:
        return x
    return jnp.matmul(jnp.swapaxes(right, -1, -2), x, precision=HIGHEST)


def _norm2(left: Array, right: Array | None) -> Array:
    """Return ‖L R‖², from the two small Gram matrices."""
    if right is None:
        return jnp.sum(left * left, axis=(-1, -2))
    inner = jnp.matmul(jnp.swapaxes(left, -1, -2), left, precision=HIGHEST)
    outer = jnp.matmul(right, jnp.swapaxes(right, -1, -2), precision=HIGHEST)
    return jnp.sum(inner * outer, axis=(-1, -2))


def _over_layers(given: _Scaled, cut: Truncation) -> Array:
    """Return the one relative error of a block of several layers."""
    less = 2 * (given.n - jnp.max(given.n))
    total = jnp.sum(jnp.ldexp(_norm2(given.left, given.right), less))
    return jnp.sqrt(jnp.sum(jnp.ldexp(cut.lost2, less)) / jnp.where(total > 0, total, 1))


def _orthonormal(columns: list[Array], passes: int) -> list[Array]:
    """Orthonormalise the columns of each matrix, in one pass or in several.

    A Gram matrix holds squares: columns that are nearer to the span of others than the root of the
    dtype's rounding come out of a pass too short, and those in the span as rounding has them, which
    another pass makes whole. On the way of an iteration they need only be far from parallel.
    """
    for _ in range(passes):
        columns = _far_from_parallel(columns)
    return columns


def _far_from_parallel(columns: list[Array]) -> list[Array]:
    """Multiply the columns of each matrix by what makes them orthonormal but for rounding."""
    # Unit columns: those of a power of Δ have lengths of very different powers of ten.
    units = [_unit(x) for x in columns]
    grams = [jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=HIGHEST) for x in units]
    # One call for all matrices of as many columns.
    turns: list[Array] = list(grams)
    kinds = dict.fromkeys((g.shape[-1], g.dtype) for g in grams)
    for kind in kinds:
        places = [i for i, g in enumerate(grams) if (g.shape[-1], g.dtype) == kind]
        flat = [grams[i].reshape(-1, *grams[i].shape[-2:]) for i in places]
        found = _inverse_root(jnp.concatenate(flat))
        ends = np.cumsum([len(x) for x in flat])[:-1]
        for i, part in zip(places, jnp.split(found, ends), strict=True):
            turns[i] = part.reshape(grams[i].shape)
    return [jnp.matmul(x, t, precision=HIGHEST) for x, t in zip(units, turns, strict=True)]


def _unit(columns: Array) -> Array:
    """Bring columns to length one; but for those of zeros."""
    length = jnp.linalg.norm(columns, axis=-2, keepdims=True)
    return jnp.where(length > 0, columns / jnp.where(length > 0, length, 1), 0)


def _inverse_root(gram: Array) -> Array:
    """Return T, upper triangular, with Tᵀ G T = 1, for Gram matrices (n, c, c) of unit columns.

    Gram-Schmidt in the metric of G, whose rounding bounds the pivots from below.
    """
    least = 10 * gram.shape[-1] * jnp.finfo(gram.dtype).eps

    def add(j: int | Array, turn: Array) -> Array:
        column = jax.lax.dynamic_slice_in_dim(gram, j, 1, axis=-1)
        inner = jnp.matmul(jnp.swapaxes(turn, -1, -2), column, precision=HIGHEST)
        one = (jnp.arange(gram.shape[-1]) == j).astype(gram.dtype)[None, :, None]
        rest = one - jnp.matmul(turn, inner, precision=HIGHEST)
        pivot = 1 - jnp.sum(inner * inner, axis=-2, keepdims=True)
        rest = rest * jax.lax.rsqrt(jnp.maximum(pivot, least))
        return jax.lax.dynamic_update_slice_in_dim(turn, rest, j, axis=-1)

    return jax.lax.fori_loop(0, gram.shape[-1], add, jnp.zeros_like(gram))


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]

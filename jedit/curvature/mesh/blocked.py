"""Cholesky factors, inverses and products of matrices of which no device holds all.

A matrix (layers, d, d) is cut into K rows of blocks, (layers, K, b, D), D = K b, and the K are
split over the devices; what is added to d is put on the diagonal alone. Every loop below goes
over the K, with one row of blocks, (b, D), or one column of them on all devices at a time:

    L_kk L_kkᵀ = A_kk,   L_ik = A_ik L_kk⁻ᵀ,   A_ij -= L_ik L_jkᵀ   for i, j > k     right-looking
    x_k = L_kk⁻¹ (b_k - Σ_{j<k} L_kj x_j)                                     what L is solved with

The diagonal blocks of L are kept as L_kk⁻¹: they are used so alone, and a product is split over
devices where a triangular solve is not. What is solved for has its columns split, its rows whole.

A loop, which compiles once whatever the size, does not shrink as the matrix does. Of four loops,
one after the other, each leaves out the columns that are done, and Cholesky takes 5/4 D³ flops
where one loop took 2 D³ and the least is D³/3. Rows that are done stay: they lie on devices that
would have nothing else to do.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding
from jaxtyping import Array

from jedit.core.devices import MeshAxes, axes_of, spec_of
from jedit.core.precision import HIGHEST
from jedit.curvature.mesh.placement import num_pieces

# Longest side of a block: its Cholesky factor is computed on every device. Arbitrary.
LARGEST_BLOCK = 512
STRETCHES = 4  # loops of which Cholesky is made; arbitrary


def cut(matrix: Array, level: Array, sharding: NamedSharding) -> Array:
    """Return matrix + level, (layers, K, b, D), each device with some of the rows.

    Args:
        matrix: (layers, d, d).
        level: (layers,); what is added to the diagonal, and all there is on the rows beyond d.
        sharding: over which axes the rows are split: all that it has behind the layers' own, as
            `along` gives them.
    """
    d = matrix.shape[-1]
    number, block = _sizes(d, num_pieces(sharding))
    missing = number * block - d
    rows = jnp.pad(matrix, [(0, 0), (0, missing), (0, missing)])
    rows = rows.reshape(len(matrix), number, block, number * block)
    rows = _split(rows, sharding)
    damped = rows + level[:, None, None, None] * identity(rows)
    return _split(damped, sharding)


def joined(rows: Array, d: int) -> Array:
    """Return the matrix (layers, d, d) of its rows of blocks."""
    return rows.reshape(len(rows), -1, rows.shape[-1])[:, :d, :d]


def identity(rows: Array) -> Array:
    """Return the identity, shaped (1, K, b, D) as the rows are."""
    shape = rows.shape[1:]
    index = jnp.arange(shape[0] * shape[1]).reshape(1, *shape[:2], 1)
    return (index == jnp.arange(shape[2])[None, None, None]).astype(rows.dtype)


def cholesky(rows: Array, sharding: NamedSharding) -> Array:
    """Return L, whose diagonal blocks are inverted; NaN where the matrix is not positive."""
    number, block = rows.shape[1:3]
    below = jnp.arange(number)[None, :, None, None]
    stretches = min(STRETCHES, number)

    def eliminated(k, rows, first):
        """One step on the columns from the block `first` on: those before it are done."""
        at = (k - first) * block
        column = jax.lax.dynamic_slice_in_dim(rows, at, block, axis=-1)
        factor = jnp.linalg.cholesky(_row(column, k, sharding))
        one = jnp.broadcast_to(jnp.eye(block, dtype=rows.dtype)[None], factor.shape)
        inverse = jax.scipy.linalg.solve_triangular(factor, one, lower=True)
        column = jnp.einsum("lkij,lmj->lkim", column, inverse, precision=HIGHEST)
        column = _split(jnp.where(below > k, column, 0), sharding)
        everywhere = _whole(column.reshape(len(rows), -1, block), sharding)[:, first * block :]
        rows = rows - jnp.einsum("lkij,lmj->lkim", column, everywhere, precision=HIGHEST)
        column = jnp.where(below == k, inverse[:, None], column)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, column, at, axis=-1)
        return _split(rows, sharding)

    for stretch in range(stretches):
        first, last = (number * n // stretches for n in (stretch, stretch + 1))
        done, rest = jnp.split(rows, [first * block], axis=-1)
        rest = jax.lax.fori_loop(first, last, functools.partial(eliminated, first=first), rest)
        rows = _split(jnp.concatenate([done, rest], axis=-1), sharding)
    return rows


def cho_solve(factor: Array, x: Array, sharding: NamedSharding) -> Array:
    """Return (L Lᵀ)⁻¹ x for x (layers, D, n), whose columns are split."""
    number, block, size = factor.shape[1:]
    columns = jnp.arange(size)[None, None]

    def parts(k):
        row = _row(factor, k, sharding)
        own = jax.lax.dynamic_slice_in_dim(row, k * block, block, axis=-1)
        return jnp.where(columns < k * block, row, 0), own

    def forward(k, x):
        left, own = parts(k)
        mine = jax.lax.dynamic_slice_in_dim(x, k * block, block, axis=1)
        mine = _matmul(own, mine - _matmul(left, x))
        return jax.lax.dynamic_update_slice_in_dim(x, mine, k * block, axis=1)

    def backward(step, x):
        k = number - 1 - step
        left, own = parts(k)
        mine = jax.lax.dynamic_slice_in_dim(x, k * block, block, axis=1)
        mine = _matmul(jnp.swapaxes(own, 1, 2), mine)
        x = x - _matmul(jnp.swapaxes(left, 1, 2), mine)
        return jax.lax.dynamic_update_slice_in_dim(x, mine, k * block, axis=1)

    x = jax.lax.fori_loop(0, number, forward, x)
    return jax.lax.fori_loop(0, number, backward, x)


def times(rows: Array, x: Array, sharding: NamedSharding) -> Array:
    """Return the product of a matrix in rows of blocks and x (layers, D, n), columns split."""
    block = rows.shape[2]

    def multiplied(k, found):
        mine = _matmul(_row(rows, k, sharding), x)
        return jax.lax.dynamic_update_slice_in_dim(found, mine, k * block, axis=1)

    return jax.lax.fori_loop(0, rows.shape[1], multiplied, jnp.zeros_like(x))


def product(x: Array, y: Array, sharding: NamedSharding) -> Array:
    """Return the product of two matrices, all three in rows of blocks."""
    block = y.shape[2]

    def added(k, total):
        column = jax.lax.dynamic_slice_in_dim(x, k * block, block, axis=-1)
        part = jnp.einsum("lkij,ljm->lkim", column, _row(y, k, sharding), precision=HIGHEST)
        return _split(total + part, sharding)

    return jax.lax.fori_loop(0, y.shape[1], added, jnp.zeros_like(x))


def inverse(factor: Array, sharding: NamedSharding) -> Array:
    """Return (L Lᵀ)⁻¹ in rows of blocks: its columns, which are its rows, are solved for."""
    one = identity(factor).reshape(1, factor.shape[-1], factor.shape[-1])
    columns = jnp.broadcast_to(one, (len(factor), *one.shape[1:]))
    place = NamedSharding(sharding.mesh, spec_of(_layers(sharding), (), _axes(sharding)))
    found = cho_solve(factor, with_sharding_constraint(columns, place), sharding)
    return _split(jnp.swapaxes(found, 1, 2).reshape(factor.shape), sharding)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=HIGHEST)


def _row(rows: Array, k: Array, sharding: NamedSharding) -> Array:
    """Return the k-th row of blocks (layers, b, D), on every device."""
    # A sum with zeros, of which each device has its own part: an index into what is split over
    # the devices would fetch all of it.
    is_it = jnp.arange(rows.shape[1])[None, :, None, None] == k
    return _whole(jnp.sum(jnp.where(is_it, rows, 0), axis=1), sharding)


def _sizes(d: int, pieces: int) -> tuple[int, int]:
    """Return (K, b): K a multiple of the pieces, K b at least d, and d where that divides."""
    share = -(-d // pieces)
    least = -(-share // LARGEST_BLOCK)
    even = (n for n in range(least, 2 * least + 1) if share % n == 0)
    number = next(even, least)
    return pieces * number, -(-share // number)


def padded(d: int, sharding: NamedSharding) -> int:
    """Return D, the side with which a matrix of side d is cut into rows of blocks."""
    number, block = _sizes(d, num_pieces(sharding))
    return number * block


def _layers(sharding: NamedSharding) -> MeshAxes:
    return axes_of(sharding.spec[0])


def _axes(sharding: NamedSharding) -> MeshAxes:
    return tuple(a for entry in sharding.spec[1:] for a in axes_of(entry))


def place_of_rows(sharding: NamedSharding) -> NamedSharding:
    """Return where the rows of blocks (layers, K, b, D) lie that `cut` makes."""
    place = spec_of(_layers(sharding), _axes(sharding), (), ())
    return NamedSharding(sharding.mesh, place)


def _split(rows: Array, sharding: NamedSharding) -> Array:
    return with_sharding_constraint(rows, place_of_rows(sharding))


def _whole(x: Array, sharding: NamedSharding) -> Array:
    place = spec_of(_layers(sharding), *((),) * (x.ndim - 1))
    return with_sharding_constraint(x, NamedSharding(sharding.mesh, place))

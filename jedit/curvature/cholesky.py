"""Cholesky factors by products of matrices, for CPUs, where LAPACK's run far below their rate.

    A = [A₁ ·; A₂ A₃],   L = [L₁ 0; C L₃],   L₁ L₁ᵀ = A₁,   C = A₂ L₁⁻ᵀ,   L₃ L₃ᵀ = A₃ - C Cᵀ

by halves, and so is C; some 0.45 d³ flops, where the least is d³/3. The leaves, b long, are
LAPACK's, each with its inverse, so that C is divided by one in one product. jaxlib's `potrf` runs
at a fifth of the rate of products or less; here that is so of the leaves alone, 4/3 d b² flops.

A GPU's library does this itself: there, and where a matrix is short, JAX's routine is taken.

Under `jax.vmap` matrices still come one by one: with batched leaves a `solve` of two curvatures did
not return within a minute on CPUs of several threads, whose LAPACK calls waited for one another.
The derivative is the factor's own, Φ being the lower triangle with half the diagonal:

    dL = L Φ(L⁻¹ dA L⁻ᵀ)

In one jitted program, such as a jitted `solve`, each shape is compiled once: with 24 factors of 256
to 768 columns in three shapes that takes 4 s on one x86 core, where JAX's routine takes 0.7 s.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.core.precision import HIGHEST

SHORTEST = 256  # the side from which on it gains, measured on one x86 core
# The program grows by the number of leaves: with 16 it is compiled in one to two seconds, whatever
# the side; with 32 it takes twice as long, and is no faster up to d = 4,864.
SHORTEST_LEAF, MOST_LEAVES = 96, 16

_product = functools.partial(jnp.matmul, precision=HIGHEST)


class _Leaf(NamedTuple):
    root: Array  # L
    inverse: Array  # L⁻¹


class _Halves(NamedTuple):
    first: "_Leaf | _Halves"  # L₁
    below: Array  # C
    last: "_Leaf | _Halves"  # L₃


def cholesky(matrix: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """Return L with L Lᵀ = A, lower triangular, of symmetric matrices that lie on one device.

    Where a matrix is not positive definite in its dtype, its factor is NaN from the leaf on in
    which that was seen: below it and to the right, up to the diagonal.
    """
    if matrix.shape[-1] < SHORTEST:
        return jnp.linalg.cholesky(matrix)
    return _long(matrix)


@jax.custom_jvp
def _long(matrix: Array) -> Array:
    return _in_layers(matrix)


@jax.custom_batching.custom_vmap
def _in_layers(matrix: Array) -> Array:
    return jax.lax.platform_dependent(matrix, cpu=by_products, default=jnp.linalg.cholesky)


@_in_layers.def_vmap
def _more_layers(_size: int, _batched: list[bool], matrix: Array) -> tuple[Array, bool]:
    """Take what is batched as more layers, which follow one another."""
    return _in_layers(matrix.reshape(-1, *matrix.shape[-2:])).reshape(matrix.shape), True


@_long.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (dA,), L = tangents, _long(*primals)
    dA = (dA + jnp.swapaxes(dA, -1, -2)) / 2
    divide = functools.partial(jax.lax.linalg.triangular_solve, L, lower=True)
    inner = divide(divide(dA, transpose_a=True), left_side=True)
    one = jnp.eye(L.shape[-1], dtype=L.dtype)[None]
    return L, _product(L, jnp.tril(inner) / (1 + one))


def by_products(matrix: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """Return what `cholesky` does, by products; layers one by one, since side by side is slower."""
    d = matrix.shape[-1]
    leaf = max(SHORTEST_LEAF, -(-d // MOST_LEAVES))

    def one(matrix: Array) -> Array:
        return _joined(_factorized(matrix, leaf))

    if len(matrix) == 1:
        return one(matrix[0])[None]
    return jax.lax.map(one, matrix)


def _factorized(A: Array, leaf: int) -> _Leaf | _Halves:
    if len(A) <= leaf:
        root = jax.lax.linalg.cholesky(A, symmetrize_input=False)
        one = jnp.eye(len(A), dtype=A.dtype)
        return _Leaf(root, jax.scipy.linalg.solve_triangular(root, one, lower=True))
    h = _half(len(A), leaf)
    first = _factorized(A[:h, :h], leaf)
    C = _divided(A[h:, :h], first)
    return _Halves(first, C, _factorized(_less_square(A[h:, h:], C, leaf), leaf))


def _less_square(A: Array, C: Array, leaf: int) -> Array:
    """Return A - C Cᵀ, of which the lower triangle alone is right."""
    if len(A) <= leaf:
        return A - _product(C, C.T)
    # A quarter of the products is above the diagonal, where nobody looks.
    h = _half(len(A), leaf)
    above, below = C[:h], C[h:]
    return jnp.block(
        [
            [A[:h, :h] - _product(above, above.T), A[:h, h:]],
            [A[h:, :h] - _product(below, above.T), A[h:, h:] - _product(below, below.T)],
        ]
    )


def _divided(B: Array, L: _Leaf | _Halves) -> Array:
    """Return B L⁻ᵀ."""
    if isinstance(L, _Leaf):
        return _product(B, L.inverse.T)
    h = L.below.shape[1]
    first = _divided(B[:, :h], L.first)
    last = _divided(B[:, h:] - _product(first, L.below.T), L.last)
    return jnp.concatenate([first, last], axis=1)


def _joined(L: _Leaf | _Halves) -> Array:
    if isinstance(L, _Leaf):
        return L.root
    first, last = _joined(L.first), _joined(L.last)
    right = jnp.zeros((len(first), len(last)), first.dtype)
    return jnp.block([[first, right], [L.below, last]])


def _half(d: int, leaf: int) -> int:
    """Return where a side is cut: a number of whole leaves, about half of it."""
    return -(-d // leaf) // 2 * leaf

"""Factors known by their leading eigenvectors: A = Q diag(a) Qᵀ + ā (1 - Q Qᵀ), Q (d, k).

ā is the mean of the d - k eigenvalues that have no eigenvector, so the trace is right. Along such
an axis a matrix T has two parts, Qᵀ T, k long, and what is left of T, d long; a function of A ⊗ G
multiplies the first by its values at the leading eigenvalues, the second by that at ā:

    f(A ⊗ G) T = Σ over the parts of both axes,      each times its own values
"""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.types import Factor


def split_axis(factor: Factor, x: Array, axis: int) -> tuple[Array, ...]:
    """Return the parts of x (layers, d_in, d_out) along an axis: what is left, and Qᵀ x.

    A factor that knows all its directions has the second alone.
    """
    if factor.form != "leading":
        return (rotate_axis(factor.basis, x, axis),)
    lead = rotate_axis(factor.basis, x, axis)
    return x - rotate_axis(factor.basis, lead, axis, back=True), lead


def join_axis(factor: Factor, parts: tuple[Array, ...], axis: int) -> Array:
    """Return x out of its parts along an axis, the inverse of `split_axis`."""
    *rest, lead = parts
    return sum(rest, rotate_axis(factor.basis, lead, axis, back=True))


def split(factors: tuple[Factor, Factor], x: Any, *, back: bool = False) -> Any:
    """Return the parts of a matrix along both axes, or with `back` the matrix of such parts.

    The parts are orthogonal to one another: squares of a matrix are the sum of theirs.
    """
    a, g = factors
    if back:
        return join_axis(a, tuple(join_axis(g, row, 2) for row in x), 1)
    return tuple(split_axis(g, row, 2) for row in split_axis(a, x, 1))


def parts_of(values: Array, a: Factor, g: Factor) -> tuple[tuple[Array, ...], ...]:
    """Return eigenvalues of a product, cut as the parts of a matrix are."""
    return tuple(_cut(row, g, 2) for row in _cut(values, a, 1))


def mean_eigenvalue(values: Array, a: Factor, g: Factor) -> Array:
    """Return the mean over all rows and columns (layers, 1, 1), those without eigenvector too."""
    number = []
    for factor in (a, g):
        assert factor.eigenvalues is not None  # a block of an undecomposed one has no values
        number.append(multiplicities(factor.basis, factor.eigenvalues).astype(values.dtype))
    weights = number[0][:, :, None] * number[1][:, None]
    total = jnp.sum(values * weights, axis=(1, 2), keepdims=True)
    return total / (a.dimension * g.dimension)


def has_rest(basis: Array | jax.ShapeDtypeStruct | None) -> TypeGuard[Array]:
    """Say whether these eigenvectors, (layers, d, k), or shapes, are the leading ones alone.

    None stands for the standard basis.
    """
    return basis is not None and basis.shape[-1] < basis.shape[-2]


def num_values(basis: Array | jax.ShapeDtypeStruct | None, d: int) -> int:
    """Return how many eigenvalues there are along an axis of length d."""
    return 1 + basis.shape[-1] if has_rest(basis) else d


def multiplicities(
    basis: Array | None, eigenvalues: Float[Array, "layers n"]
) -> Float[Array, "1 n"]:
    """Return how many directions have each eigenvalue, one but for the rest of leading ones."""
    number = jnp.ones((1, eigenvalues.shape[1]), eigenvalues.dtype)
    if not has_rest(basis):
        return number
    return number.at[0, 0].set(basis.shape[-2] - basis.shape[-1])


def _cut(values: Array, factor: Factor, axis: int) -> tuple[Array, ...]:
    if factor.form != "leading":
        return (values,)
    return tuple(jnp.split(values, [1], axis=axis))

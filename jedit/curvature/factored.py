"""Damping of the two factors apart (Martens & Grosse 2015), which needs no eigenvectors.

    (A + λ_A) ⊗ (G + λ_G),   λ_A λ_G = λ,   λ_A / λ_G = mean(a) / mean(g)

stands for A ⊗ G + λ where a curvature's factors were not decomposed. In units of the block's mean
eigenvalue, which is mean(a) mean(g), λ_A is mean(a) √λ, whatever the other factor is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature.types import Curvature, Factor, Kronecker


def damped_factors(
    curvature: Curvature, block: Kronecker, damping: float | Array, absolute: bool
) -> tuple[Array, Array]:
    """Return (A + λ_A, G + λ_G) of a block, (layers, d, d), or (layers, d) of a diagonal one."""
    matrices = [matrix_of(curvature.factors[name]) for name in (block.input, block.output)]
    means = [mean_diagonal(m) for m in matrices]
    root = jnp.sqrt(jnp.asarray(damping, matrices[0].dtype))
    if absolute:
        a, g = (jnp.where(m > 0, m, 1) for m in means)
        levels = [root * jnp.sqrt(a / g), root * jnp.sqrt(g / a)]
    else:
        levels = [root.astype(m.dtype) * m for m in means]
    return tuple(add_diagonal(m, x) for m, x in zip(matrices, levels, strict=True))  # type: ignore[return-value]


def matrix_of(factor: Factor) -> Array:
    """Return a factor's matrix, from the host where it lies there."""
    assert factor.matrix is not None  # a "leading" factor is damped exactly
    return fetched(factor.matrix)


def mean_diagonal(matrix: Array) -> Array:
    """Return the mean eigenvalue of every layer, (layers,)."""
    return jnp.mean(matrix if matrix.ndim == 2 else jnp.diagonal(matrix, axis1=1, axis2=2), axis=1)


def add_diagonal(matrix: Array, level: Array) -> Array:
    """Return matrix + level, a level (layers,) for every layer."""
    if matrix.ndim == 2:
        return matrix + level[:, None]
    return matrix + level[:, None, None] * jnp.eye(matrix.shape[1], dtype=matrix.dtype)[None]


def solve_axis(damped: Array, x: Array, axis: int) -> Array:
    """Multiply x (layers, d_in, d_out) along an axis by the inverse of a damped factor."""
    x = jnp.moveaxis(x, axis, 1)
    if damped.ndim == 2:
        found = jnp.where(damped > 0, 1 / jnp.where(damped > 0, damped, 1), 0)[:, :, None] * x
    else:
        found = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), x)
    return jnp.moveaxis(found, 1, axis)


def multiply_axis(damped: Array, x: Array, axis: int) -> Array:
    """Multiply x (layers, d_in, d_out) along an axis by a damped factor."""
    x = jnp.moveaxis(x, axis, 1)
    if damped.ndim == 2:
        found = damped[:, :, None] * x
    else:
        found = jnp.einsum("lij,ljk->lik", damped, x, precision=HIGHEST)
    return jnp.moveaxis(found, 1, axis)

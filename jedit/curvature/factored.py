"""Damping of the two factors apart (Martens & Grosse 2015), which needs no eigenvectors.

    (A + λ_A) ⊗ (G + λ_G),   λ_A λ_G = λ,   λ_A / λ_G = mean(a) / mean(g)

stands for A ⊗ G + λ where a curvature's factors were not decomposed. In units of the block's mean
eigenvalue, which is mean(a) mean(g), λ_A is mean(a) √λ, whatever the other factor is: then blocks
that share a factor share its inverse too.

A damped factor is inverted once and serves many solves, either as a Cholesky factor or as the
inverse itself, made by products of matrices alone (`newton_schulz`). On a mesh no device holds all
of one (`mesh.blocked`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.core.display import short_repr
from jedit.core.precision import HIGHEST
from jedit.curvature import newton_schulz
from jedit.curvature.cholesky import cholesky
from jedit.curvature.mesh import blocked
from jedit.curvature.mesh.placement import along
from jedit.curvature.mesh.rotation import on_both_axes
from jedit.curvature.types import By, Curvature, Factor, Kronecker, pytree

Form = Literal["diagonal", "root", "matrix"]


@pytree("form")
@dataclasses.dataclass(frozen=True)
class Damped:
    """A damped factor, or its inverse, as something to multiply with.

    Attributes:
        values: (layers, d) of a "diagonal"; (layers, d, d) of a Cholesky factor, "root", whose
            inverse is multiplied with, or of a "matrix"; on a mesh in rows of blocks.
        weight: (layers,), zero for a layer that is zero, which has no inverse, else one.
        residual: (layers,), ‖1 - A X‖ / √d of the Newton-Schulz iteration; zero without one.
        form: static; which of the three it is.
    """

    values: Array
    weight: Array
    residual: Array
    form: Form

    __repr__ = short_repr


def damped_levels(
    curvature: Curvature, block: Kronecker, damping: float | Array, absolute: bool
) -> tuple[Array, Array]:
    """Return (λ_A, λ_G) of a block, (layers,) each."""
    means = [
        mean_diagonal(fetched_matrix(curvature.factors[name]))
        for name in (block.input, block.output)
    ]
    root = jnp.sqrt(jnp.asarray(damping, means[0].dtype))
    if not absolute:
        return tuple(root.astype(m.dtype) * m for m in means)  # type: ignore[return-value]
    a, g = (jnp.where(m > 0, m, 1) for m in means)
    return root * jnp.sqrt(a / g), root * jnp.sqrt(g / a)


def damped_pair(
    curvature: Curvature, block: Kronecker, damping: float | Array, absolute: bool
) -> tuple[Damped, Damped]:
    """Return A + λ_A and G + λ_G of a block, to multiply with."""
    levels = damped_levels(curvature, block, damping, absolute)
    found = []
    for dim, (name, level) in enumerate(zip((block.input, block.output), levels, strict=True), 1):
        matrix = fetched_matrix(curvature.factors[name])
        one = jnp.ones_like(level)
        form = "diagonal" if matrix.ndim == 2 else "matrix"
        found.append(Damped(_added(matrix, level, block.sharding, dim), one, 0 * one, form))
    return tuple(found)


def inverse(
    factor: Factor, level: Array, sharding: NamedSharding | None = None, dim: int = 1
) -> Damped:
    """Return (A + λ_A)⁻¹, by what the factor says: a Cholesky factor, or the matrix itself.

    Args:
        factor: A, which has a matrix.
        level: λ_A, (layers,).
        sharding: how the parameter's matrix lies on a mesh; None: on one device.
        dim: which side of that matrix the factor belongs to, 1 or 2.
    """
    side = 1 if sharding is None else dim  # on one device it says nothing
    return _inverse(fetched_matrix(factor), level, factor.by, sharding, side)


# Compiled once for all factors of one shape: its loops would be for each of them.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _inverse(
    matrix: Array, level: Array, by: By, sharding: NamedSharding | None, dim: int
) -> Damped:
    is_zero = (mean_diagonal(matrix) == 0) & (level == 0)
    # A layer of nothing but zeros has no inverse: it is solved as one, and then left out.
    level = jnp.where(is_zero, 1, level)
    weight = jnp.where(is_zero, 0, 1).astype(matrix.dtype)
    zero = jnp.zeros_like(weight)
    damped = _added(matrix, level, sharding, dim)
    if matrix.ndim == 2:
        return Damped(
            jnp.where(damped > 0, 1 / jnp.where(damped > 0, damped, 1), 0),
            *(weight, zero),
            "diagonal",
        )
    place = None if sharding is None else along(sharding, dim)
    if by != "inverse":
        return Damped(_root(damped, place), weight, zero, "root")
    invert = functools.partial(_newton_schulz, place=place)
    if place is not None and place.spec[0] is not None:
        # A loop over layers that are split would fetch each of them from one device.
        values, residual = invert((damped, level))
    else:
        each = (damped[:, None], level[:, None])
        values, residual = (x[:, 0] for x in jax.lax.map(invert, each))
    return Damped(values, weight, residual, "matrix")


def _root(damped: Array, place: NamedSharding | None) -> Array:
    if place is not None:
        return blocked.cholesky(damped, place)
    return cholesky(damped)


def _newton_schulz(given: tuple[Array, Array], place: NamedSharding | None) -> tuple[Array, Array]:
    """Return the inverses of damped matrices, by Cholesky where the residual does not suffice."""
    damped, level = given
    if place is None:
        one = jnp.eye(damped.shape[-1], dtype=damped.dtype)[None]
        product = functools.partial(jnp.matmul, precision=HIGHEST)
    else:
        one = blocked.identity(damped)
        product = functools.partial(blocked.product, sharding=place)
    found, info = newton_schulz.solve(damped, one, level, product)
    is_good = info.residual <= newton_schulz.tolerance(damped.dtype)

    def by_cholesky() -> Array:
        root = _root(damped, place)
        exact = _inverse_of_root(root) if place is None else blocked.inverse(root, place)
        return jnp.where(is_good.reshape(-1, *(1,) * (found.ndim - 1)), found, exact)

    return jax.lax.cond(jnp.all(is_good), lambda: found, by_cholesky), info.residual


def _inverse_of_root(root: Array) -> Array:
    one = jnp.broadcast_to(jnp.eye(root.shape[-1], dtype=root.dtype)[None], root.shape)
    return jax.scipy.linalg.cho_solve((root, True), one)


def dense(side: Damped) -> Array:
    """Return what a factor on one device multiplies with, (layers, d, d) or (layers, d)."""
    values = _inverse_of_root(side.values) if side.form == "root" else side.values
    weight = side.weight.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(weight > 0, values, 0)


def multiplied(pair: tuple[Damped, Damped], matrix: Array, sharding: NamedSharding | None) -> Array:
    """Multiply a matrix (layers, d_in, d_out) along both axes, by sides that may be on the host."""
    pair = jax.tree.map(fetched, pair)
    if sharding is not None:
        sides = [blocked.padded(n, sharding) for n in matrix.shape[1:]]
        return on_both_axes(_times, pair, matrix, (sides[0], sides[1]), sharding)
    for axis, side in enumerate(pair, 1):
        matrix = jnp.moveaxis(_times(side, jnp.moveaxis(matrix, axis, 1), None), 1, axis)
    return matrix


def _times(side: Damped, x: Array, place: NamedSharding | None) -> Array:
    """Multiply x (layers, d, n) with a side, on a mesh with one that is cut along `place`."""
    if side.form == "diagonal":
        missing = x.shape[1] - side.values.shape[1]  # filled up, on a mesh
        found = jnp.pad(side.values, [(0, 0), (0, missing)])[:, :, None] * x
    elif place is None:
        if side.form == "root":
            found = jax.scipy.linalg.cho_solve((side.values, True), x)
        else:
            found = jnp.einsum("lij,ljk->lik", side.values, x, precision=HIGHEST)
    else:
        function: Callable = blocked.cho_solve if side.form == "root" else blocked.times
        found = function(side.values, x, place)
    return jnp.where(side.weight[:, None, None] > 0, found, 0)


def _added(matrix: Array, level: Array, sharding: NamedSharding | None, dim: int) -> Array:
    """Return matrix + level, on a mesh in rows of blocks."""
    if matrix.ndim == 3 and sharding is not None:
        return blocked.cut(matrix, level, along(sharding, dim))
    return add_diagonal(matrix, level)


def fetched_matrix(factor: Factor) -> Array:
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

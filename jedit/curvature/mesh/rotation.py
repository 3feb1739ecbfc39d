"""Eigenvalues, products and gathered matrices of blocks that several devices share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.mesh.placement import along, best_split, num_pieces
from jedit.curvature.types import Factor
from jedit.tracing.sites import Weight


@functools.partial(jax.jit, static_argnums=2)
def sharded_products(a: Array, g: Array, sharding: NamedSharding) -> Array:
    """Return the eigenvalues a_i g_j (layers, rows, d_out), made where the matrix lies."""
    products = a[:, :, None] * g[:, None, :]
    return with_sharding_constraint(products, best_split(sharding, products.shape))


@functools.partial(jax.jit, static_argnums=(3, 4))
def sharded_rotation(
    a: Factor, g: Factor, matrix: Array, back: bool, sharding: NamedSharding
) -> Array:
    """Rotate each axis while the matrix is split along the other: no device holds all of it.

    Left to itself, a sharded contraction makes partial sums of the whole matrix on every device.
    Zeros make both axes even: XLA moves only even pieces from one device to another. Layers that
    are not split go one by one, so that one layer's bases are whole on a device at a time.
    """
    shape = matrix.shape
    missing = [(0, -n % num_pieces(sharding)) for n in shape[1:]]
    matrix = jnp.pad(matrix, [(0, 0), *missing])
    layers = PartitionSpec(sharding.spec[0])
    bases = tuple(
        None if f.basis is None else jnp.pad(fetched(f.basis), [(0, 0), pad, pad])
        for f, pad in zip((a, g), missing, strict=True)
    )

    def rotated(given):
        matrix, bases = given
        for basis, axis, other in zip(bases, (1, 2), (2, 1), strict=True):
            # Whole along the axis that is contracted: the product needs no sum over devices.
            matrix = with_sharding_constraint(matrix, along(sharding, other))
            if basis is not None:
                basis = with_sharding_constraint(basis, NamedSharding(sharding.mesh, layers))
                matrix = rotate_axis(basis, matrix, axis, back=back)
            # Said again of the result, or XLA may choose another split for the product; then home,
            # from where the other axis is one all-to-all away.
            matrix = with_sharding_constraint(matrix, along(sharding, other))
            matrix = with_sharding_constraint(matrix, sharding)
        return matrix

    if sharding.spec[0] is None and shape[0] > 1:
        one_by_one = jax.tree.map(lambda x: x[:, None], (matrix, bases))
        matrix = jax.lax.map(rotated, one_by_one)[:, 0]
    else:
        matrix = rotated((matrix, bases))
    return _without_padding(matrix, shape, sharding)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def on_both_axes(
    times: Callable[[Any, Array, NamedSharding], Array],
    pair: tuple[Any, Any],
    matrix: Array,
    sides: tuple[int, int],
    sharding: NamedSharding,
) -> Array:
    """Multiply each axis of a matrix while the other is split: no device holds all of it.

    Args:
        times: `times(side, x, place)`, the product with x (layers, side, n), n split; the side
            itself is split by rows as `place` says.
        pair: what the two axes are multiplied with.
        matrix: (layers, rows, d_out).
        sides: the lengths that the axes are filled up to with zeros.
        sharding: how the parameter's matrix lies.
    """
    shape = matrix.shape
    missing = [(0, side - n) for side, n in zip(sides, shape[1:], strict=True)]
    matrix = jnp.pad(matrix, [(0, 0), *missing])
    for side, axis, other in zip(pair, (1, 2), (2, 1), strict=True):
        matrix = with_sharding_constraint(matrix, along(sharding, other))
        found = times(side, jnp.moveaxis(matrix, axis, 1), along(sharding, axis))
        matrix = with_sharding_constraint(jnp.moveaxis(found, 1, axis), along(sharding, other))
        matrix = with_sharding_constraint(matrix, sharding)
    return _without_padding(matrix, shape, sharding)


def _without_padding(matrix: Array, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    place = best_split(sharding, shape)
    # Before the slice and after it, so that XLA cuts the zeros off where the pieces lie, and does
    # not gather the matrix to do it.
    matrix = with_sharding_constraint(matrix, place)[:, : shape[1], : shape[2]]
    return with_sharding_constraint(matrix, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sharded_gather(leaves: dict[str, Array], weight: Weight, sharding: NamedSharding) -> Array:
    """Return a parameter's matrix with the bias's row below it.

    Both are split by columns when they are joined: no row has to move.
    """
    parts = [
        with_sharding_constraint(part.gather(leaves), along(sharding, 2))
        for part in (weight.kernel, weight.bias_row)
    ]
    whole_matrix = jnp.concatenate(parts, axis=1)
    return with_sharding_constraint(whole_matrix, best_split(sharding, whole_matrix.shape))

"""The linear algebra of a curvature, on trees shaped like params.

In the eigenbasis of a block, with T the matrix of a tree's leaf (bias last),

    f(F) T = Q_A [ f(Λ) ∘ (Q_Aᵀ T Q_G) ] Q_Gᵀ,   Λ_ij = a_i g_j   or the corrected eigenvalues

so `matvec`, `power` and `inverted` are the same few lines with another f, and a projector has
weights in the place of f(Λ).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_word, nearest
from jedit.core.checks import FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.devices import fetched, on_auto_axes, sharding_of
from jedit.curvature import factored, low_rank
from jedit.curvature.checks import check_covers, check_has_powers, eigenbasis_of, matrix_of
from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.mesh.rotation import sharded_gather, sharded_products, sharded_rotation
from jedit.curvature.types import Curvature, Diagonal, Factor, Kronecker, Uncovered
from jedit.tracing.sites import Weight


def eigenvalues(curvature: Curvature, name: str) -> Float[Array, "layers rows d_out"]:
    """Return a block's eigenvalues (layers, rows, d_out), in the order of its eigenbasis.

    Along an axis whose leading eigenvectors alone are known there are 1 + k of them; the first
    stands for all the others.

    Raises:
        ValueError: a factor of the block was not decomposed.
    """
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return block.values
    if block.corrected is not None:
        return fetched(block.corrected)
    # All pairs a_i g_j, as large as the weight itself: made when needed, never stored.
    if is_leading(block, curvature):
        a, g = (factor.eigenvalues for factor in _pair(curvature, block))
        assert a is not None
        assert g is not None
    else:
        a, g = (eigenbasis_of(factor, name)[1] for factor in _pair(curvature, block))
    if block.sharding is not None:
        return sharded_products(a, g, block.sharding)
    return a[:, :, None] * g[:, None, :]


def is_leading(block: Kronecker | Diagonal, curvature: Curvature) -> TypeGuard[Kronecker]:
    """Say whether a block knows the leading eigenvectors of a factor alone."""
    if isinstance(block, Diagonal):
        return False
    return any(factor.form == "leading" for factor in _pair(curvature, block))


def is_undecomposed(block: Kronecker | Diagonal, curvature: Curvature) -> TypeGuard[Kronecker]:
    """Say whether a block has a factor without eigenvectors."""
    if isinstance(block, Diagonal):
        return False
    return any(factor.form == "undecomposed" for factor in _pair(curvature, block))


def _pair(curvature: Curvature, block: Kronecker) -> tuple[Factor, Factor]:
    return curvature.factors[block.input], curvature.factors[block.output]


def rotate(curvature: Curvature, name: str, matrix: Array, *, back: bool = False) -> Array:
    """Rotate a matrix (layers, rows, d_out) into a block's eigenbasis, or back.

    Raises:
        ValueError: a factor of the block has not all eigenvectors.
    """
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return matrix
    factors = _pair(curvature, block)
    bases = [eigenbasis_of(factor, name)[0] for factor in factors]
    if block.sharding is not None:
        return sharded_rotation(*factors, matrix, back, block.sharding)
    for axis, basis in enumerate(bases, 1):
        matrix = rotate_axis(basis, matrix, axis, back=back)
    return matrix


def gather(block: Kronecker | Diagonal, leaves: Mapping[str, Array]) -> Array:
    """Return a block's matrix (layers, rows, d_out) out of `{path: array}`, on a mesh in pieces."""
    sharding = block.sharding if isinstance(block, Kronecker) else None
    # A row added to a matrix split by rows would move every piece; `sharded_gather` avoids it.
    if sharding is None or block.weight.bias_path is None:
        return block.weight.gather(leaves)
    return sharded_gather(dict(leaves), block.weight, sharding)


class BlockMap(NamedTuple):
    """One block of a linear map on params.

    Attributes:
        weight: the parameters whose matrix T is.
        dtype: what T is taken in.
        gather: `gather({path: array}) -> T`.
        apply: `apply(T)`, the map's value (layers, rows, d_out).
    """

    weight: Weight
    dtype: DTypeLike
    gather: Callable[[Mapping[str, Array]], Array]
    apply: Callable[[Array], Array]


def spectral(
    weight: Weight,
    values: PyTree,
    gather: Callable[[Mapping[str, Array]], Array],
    rotate: Callable[..., Any],
) -> BlockMap:
    """Return the map T -> Q [values ∘ (Qᵀ T)].

    Args:
        weight: the parameters whose matrix T is.
        values: the map's eigenvalues, of a shape that broadcasts to (layers, rows, d_out); where
            `rotate` returns several parts, those of each.
        gather: `gather({path: array}) -> T`.
        rotate: `rotate(T, back=False) -> Qᵀ T`, an array or a tree of parts; with `back=True` it
            returns Q T.
    """

    def apply(matrix: Array) -> Array:
        return rotate(jax.tree.map(jnp.multiply, values, rotate(matrix)), back=True)

    return BlockMap(weight, jax.tree.leaves(values)[0].dtype, gather, apply)


def apply_spectral(
    curvature: Curvature,
    tree: PyTree,
    function: Callable[[Array], Array],
    *,
    damping: float | Array = 0.0,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """Return f(F + λ) T for a function of the eigenvalues; see `solve` for the arguments.

    Raises:
        ValueError: the arguments are refused as by `solve`.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    leaves = check_covers(curvature, tree)

    def block_map(name: str) -> BlockMap:
        values, turn = damped(curvature, name, damping, absolute)
        block = curvature.blocks[name]
        gathered = functools.partial(gather, block)
        return spectral(block.weight, jax.tree.map(function, values), gathered, turn)

    return apply_blocks(map(block_map, curvature.blocks), tree, leaves, uncovered=uncovered)


def factored_map(block: Kronecker, pair: tuple[factored.Damped, factored.Damped]) -> BlockMap:
    """Return the map T -> A T G of a block, with factors that are damped or inverted apart."""
    return BlockMap(
        block.weight,
        pair[0].values.dtype,
        functools.partial(gather, block),
        functools.partial(factored.multiplied, pair, sharding=block.sharding),
    )


def apply_blocks(
    maps: Iterable[BlockMap], tree: PyTree, leaves: Mapping[str, Array], *, uncovered: Uncovered
) -> PyTree:
    """Apply the linear map of these blocks to a tree; an iterator's blocks are made one by one.

    Args:
        maps: blocks of different parameters, or of disjoint slices of one.
        tree: T, a pytree shaped like params.
        leaves: the leaves of T by path, checked to hold all parameters of the blocks.
        uncovered: what becomes of parameters without a block: "zero" or "identity".

    Returns:
        A tree like T, in its dtypes and where it lies.

    Raises:
        ValueError: `uncovered` is another word.
    """
    check_word(Uncovered, uncovered=uncovered)
    total: dict[str, Array] = {}
    rest = dict(leaves)
    for weight, dtype, gathered, apply in maps:
        matrix = gathered({path: leaves[path].astype(dtype) for path in weight.paths})
        result = apply(matrix)
        del apply  # with what it multiplies by, before the next block's is made
        for path, part in weight.scatter(result).items():
            total[path] = total[path] + part if path in total else part
        # Blocks may cover slices of a leaf: what they read is taken off the rest, so that
        # "identity" passes exactly what no block has read.
        if uncovered == "identity":
            for path, part in weight.scatter(matrix).items():
                rest[path] = rest[path] - part.astype(rest[path].dtype)
    out = []
    for path, leaf in leaves.items():
        left = rest[path] if uncovered == "identity" else jnp.zeros_like(leaf)
        whole = left + total[path].astype(leaf.dtype) if path in total else left
        place = sharding_of(leaf)
        out.append(whole if place is None else jax.lax.with_sharding_constraint(whole, place))
    return jax.tree.unflatten(jax.tree.structure(tree), out)


def damped(
    curvature: Curvature, name: str, damping: float | Array, absolute: bool
) -> tuple[PyTree, Callable[..., Any]]:
    """Return a block's damped eigenvalues, and the rotation into its eigenbasis.

    Both are of parts where the leading eigenvectors of a factor alone are known.
    """
    block, values = curvature.blocks[name], eigenvalues(curvature, name)
    values = values + _mean_and_level(curvature, name, damping, absolute)[1]
    if not is_leading(block, curvature):
        return values, functools.partial(rotate, curvature, name)
    pair = _pair(curvature, block)
    return low_rank.parts_of(values, *pair), functools.partial(low_rank.split, pair)


def _mean_and_level(
    curvature: Curvature, name: str, damping: float | Array, absolute: bool
) -> tuple[Array, Array]:
    """Return a block's mean eigenvalue of every layer (layers, 1, 1), and λ.

    In units of the mean eigenvalue every layer of a stacked block has its own λ.
    """
    block, values = curvature.blocks[name], eigenvalues(curvature, name)
    if is_leading(block, curvature):
        mean = low_rank.mean_eigenvalue(values, *_pair(curvature, block))
    else:
        mean = jnp.mean(values, axis=(1, 2), keepdims=True)
    level = jnp.asarray(damping, values.dtype)
    return mean, level if absolute else level * mean


@on_auto_axes
def matvec(
    curvature: Curvature,
    tree: PyTree,
    *,
    damping: float | Array = 0.0,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """Return (F + λ) T; arguments and errors are as `solve`'s."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    leaves = check_covers(curvature, tree)

    def block_map(name: str) -> BlockMap:
        block = curvature.blocks[name]
        if is_undecomposed(block, curvature):
            return factored_map(block, factored.damped_pair(curvature, block, damping, absolute))
        values, turn = damped(curvature, name, damping, absolute)
        return spectral(block.weight, values, functools.partial(gather, block), turn)

    return apply_blocks(map(block_map, curvature.blocks), tree, leaves, uncovered=uncovered)


@on_auto_axes
def power(
    curvature: Curvature,
    tree: PyTree,
    exponent: float,
    *,
    damping: float | Array = 0.0,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """Return (F + λ)^exponent T; exponent -1/2 whitens a gradient.

    Arguments and errors are as `solve`'s; a curvature without eigenvectors is refused.
    """
    check_numbers(FINITE, exponent=exponent)
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    check_has_powers(curvature)

    def raised(values):
        is_zero = values == 0
        return jnp.where(is_zero, 0, jnp.where(is_zero, 1, values) ** exponent)

    return apply_spectral(
        curvature, tree, raised, damping=damping, absolute=absolute, uncovered=uncovered
    )


@on_auto_axes
def quadratic_form(
    curvature: Curvature, tree: PyTree, *, damping: float | Array = 0.0, absolute: bool = False
) -> Array:
    """Return Tᵀ (F + λ) T over the covered parameters; half of it predicts the KL of step T."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    leaves = check_covers(curvature, tree)
    parts = []
    for name, block in curvature.blocks.items():
        if is_undecomposed(block, curvature):
            pair = factored.damped_pair(curvature, block, damping, absolute)
            _, dtype, gathered, times = factored_map(block, pair)
            matrix = gathered({path: leaves[path].astype(dtype) for path in block.weight.paths})
            # A form that is zero may come out below by rounding, and has roots taken of it.
            parts.append(jnp.maximum(jnp.sum(matrix * times(matrix)), 0))
            continue
        values, turn = damped(curvature, name, damping, absolute)
        dtype = jax.tree.leaves(values)[0].dtype
        matrix = gather(block, {path: leaves[path].astype(dtype) for path in block.weight.paths})
        # Tᵀ Q Λ Qᵀ T is a weighted square of Qᵀ T: one rotation, and never negative by rounding.
        squares = jax.tree.map(lambda v, x: jnp.sum(v * x**2), values, turn(matrix))
        parts += jax.tree.leaves(squares)
    return _sum(parts)


@on_auto_axes
def trace(curvature: Curvature, *, damping: float | Array = 0.0, absolute: bool = False) -> Array:
    """Return the trace of F + λ over the covered parameters, a scalar."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    parts = []
    for name, block in curvature.blocks.items():
        size = block.weight.rows * block.weight.d_out
        if is_undecomposed(block, curvature):
            pair = (curvature.factors[block.input], curvature.factors[block.output])
            a, g = (factored.mean_diagonal(factored.fetched_matrix(x)) for x in pair)
            levels = factored.damped_levels(curvature, block, damping, absolute)
            mean = (a + levels[0]) * (g + levels[1])
        else:
            mean, level = _mean_and_level(curvature, name, damping, absolute)
            mean = mean + level
        parts.append(jnp.sum(mean) * size)
    return _sum(parts)


def _sum(parts: list[Array]) -> Array:
    """Return the sum of scalars in the widest of their dtypes; blocks of one model may differ."""
    dtype = jnp.float64 if any(p.dtype == jnp.float64 for p in parts) else jnp.float32
    return sum((p.astype(dtype) for p in parts), jnp.zeros((), dtype))


@on_auto_axes
def factors(curvature: Curvature, path: str) -> tuple[Array, Array]:
    """Return (A, G) of a parameter; A's last coordinate is the bias, where the site has one.

    A stacked parameter's factors have a leading layer axis; a diagonal factor is a vector.

    Raises:
        ValueError: there is no such block, it is diagonal, or its matrices were not kept.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    block = curvature.blocks.get(path)
    if not isinstance(block, Kronecker):
        known = [n for n, b in curvature.blocks.items() if isinstance(b, Kronecker)]
        raise ValueError(
            f"{path!r} has no Kronecker block; of those that have, {nearest(path, known)}"
        )
    a, g = (matrix_of(factor, path) for factor in _pair(curvature, block))
    return (a, g) if block.weight.is_stacked else (a[0], g[0])

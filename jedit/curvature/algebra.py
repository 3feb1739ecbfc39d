"""The linear algebra of a curvature, on trees shaped like params.

In the eigenbasis of a block, with T the matrix of a tree's leaf (bias last),

    f(F) T = Q_A [ f(Λ) ∘ (Q_Aᵀ T Q_G) ] Q_Gᵀ,   Λ_ij = a_i g_j   or the corrected eigenvalues

so `solve`, `matvec`, `power` are the same few lines with another f, and a projector has weights in
the place of f(Λ).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_word, nearest
from jedit.core.checks import FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.devices import fetched, on_auto_axes, sharding_of
from jedit.curvature.checks import check_covers
from jedit.curvature.eigenbases import rotate_axis
from jedit.curvature.mesh.rotation import sharded_gather, sharded_products, sharded_rotation
from jedit.curvature.types import Curvature, Diagonal, Kronecker, Uncovered
from jedit.tracing.sites import Weight


def eigenvalues(curvature: Curvature, name: str) -> Float[Array, "layers rows d_out"]:
    """Return a block's eigenvalues (layers, rows, d_out), in the order of its eigenbasis."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return block.values
    if block.corrected is not None:
        return fetched(block.corrected)
    # All pairs a_i g_j, as large as the weight itself: made when needed, never stored.
    a = curvature.factors[block.input].eigenvalues
    g = curvature.factors[block.output].eigenvalues
    if block.sharding is not None:
        return sharded_products(a, g, block.sharding)
    return a[:, :, None] * g[:, None, :]


def rotate(curvature: Curvature, name: str, matrix: Array, *, back: bool = False) -> Array:
    """Rotate a matrix (layers, rows, d_out) into a block's eigenbasis, or back."""
    block = curvature.blocks[name]
    if isinstance(block, Diagonal):
        return matrix
    factors = (curvature.factors[block.input], curvature.factors[block.output])
    if block.sharding is not None:
        return sharded_rotation(*factors, matrix, back, block.sharding)
    for axis, factor in enumerate(factors, 1):
        matrix = rotate_axis(factor.basis, matrix, axis, back=back)
    return matrix


def gather(block: Kronecker | Diagonal, leaves: Mapping[str, Array]) -> Array:
    """Return a block's matrix (layers, rows, d_out) out of `{path: array}`, on a mesh in pieces."""
    sharding = block.sharding if isinstance(block, Kronecker) else None
    # A row added to a matrix split by rows would move every piece; `sharded_gather` avoids it.
    if sharding is None or block.weight.bias_path is None:
        return block.weight.gather(leaves)
    return sharded_gather(dict(leaves), block.weight, sharding)


class Spectrum(NamedTuple):
    """One block of a linear map on params, T -> Q [values ∘ (Qᵀ T)].

    Attributes:
        weight: the parameters whose matrix T is.
        values: the map's eigenvalues, of a shape that broadcasts to (layers, rows, d_out).
        gather: `gather({path: array}) -> T`.
        rotate: `rotate(T, back=False) -> Qᵀ T`; with `back=True` it returns Q T.
    """

    weight: Weight
    values: Array
    gather: Callable[[Mapping[str, Array]], Array]
    rotate: Callable[..., Array]


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

    def spectrum(name: str) -> Spectrum:
        block, values = curvature.blocks[name], eigenvalues(curvature, name)
        values = function(values + _damping(values, damping, absolute))
        turn = functools.partial(rotate, curvature, name)
        return Spectrum(block.weight, values, functools.partial(gather, block), turn)

    return apply_spectra(map(spectrum, curvature.blocks), tree, leaves, uncovered=uncovered)


def apply_spectra(
    spectra: Iterable[Spectrum], tree: PyTree, leaves: Mapping[str, Array], *, uncovered: Uncovered
) -> PyTree:
    """Apply the linear map of these blocks to a tree; an iterator's blocks are made one by one.

    Args:
        spectra: blocks of different parameters, or of disjoint slices of one.
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
    for weight, values, gathered, turn in spectra:
        matrix = gathered({path: leaves[path].astype(values.dtype) for path in weight.paths})
        result = turn(values * turn(matrix), back=True)
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


def _damping(values: Array, damping, absolute: bool) -> Array:
    """Return λ: in units of the mean eigenvalue every layer of a stacked block has its own."""
    damping = jnp.asarray(damping, values.dtype)
    if absolute:
        return damping
    return damping * jnp.mean(values, axis=(1, 2), keepdims=True)


@on_auto_axes
def solve(
    curvature: Curvature,
    tree: PyTree,
    *,
    damping: float | Array,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """Return (F + λ)⁻¹ T, exact in the eigenbasis. Costs 4 d_in d_out (d_in + d_out) flops a block.

    Args:
        curvature: F, as `estimate` returns it.
        tree: a pytree shaped like params, e.g. a gradient.
        damping: λ, in units of each block's mean eigenvalue; directions of zero eigenvalue are left
            at zero when it is zero.
        absolute: λ is in units of the eigenvalues themselves, the same for every block.
        uncovered: parameters without a block become "zero" (frozen), or pass as by "identity".

    Returns:
        A pytree like `tree`, in its dtypes.

    Raises:
        ValueError: the tree lacks a covered parameter, or has it in another shape; or a damping
            that is negative or not finite.
    """

    # Guarded twice: in `where`, the branch not taken still makes the NaN of a gradient.
    def invert(values):
        is_zero = values == 0
        return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, values))

    return apply_spectral(
        curvature, tree, invert, damping=damping, absolute=absolute, uncovered=uncovered
    )


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
    return apply_spectral(
        curvature, tree, lambda v: v, damping=damping, absolute=absolute, uncovered=uncovered
    )


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

    Arguments and errors are as `solve`'s.
    """
    check_numbers(FINITE, exponent=exponent)

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
        values = eigenvalues(curvature, name)
        mine = {path: leaves[path].astype(values.dtype) for path in block.weight.paths}
        rotated = rotate(curvature, name, gather(block, mine))
        damped = values + _damping(values, damping, absolute)
        # Tᵀ Q Λ Qᵀ T is a weighted square of Qᵀ T: one rotation, and never negative by rounding.
        parts.append(jnp.sum(damped * rotated**2))
    return _sum(parts)


@on_auto_axes
def trace(curvature: Curvature, *, damping: float | Array = 0.0, absolute: bool = False) -> Array:
    """Return the trace of F + λ over the covered parameters, a scalar."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    parts = []
    for name in curvature.blocks:
        values = eigenvalues(curvature, name)
        parts.append(jnp.sum(values + _damping(values, damping, absolute)))
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
        ValueError: there is no such block, or it is diagonal.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    block = curvature.blocks.get(path)
    if not isinstance(block, Kronecker):
        known = [n for n, b in curvature.blocks.items() if isinstance(b, Kronecker)]
        raise ValueError(
            f"{path!r} has no Kronecker block; of those that have, {nearest(path, known)}"
        )
    a, g = curvature.factors[block.input].matrix, curvature.factors[block.output].matrix
    return (a, g) if block.weight.is_stacked else (a[0], g[0])

"""The linear algebra of a curvature, on trees shaped like params.

In the eigenbasis of a block, with T the matrix of a tree's leaf (bias last),

    f(F) T = Q_A [ f(Λ) ∘ (Q_Aᵀ T Q_G) ] Q_Gᵀ,   Λ_ij = a_i g_j   or the corrected eigenvalues

so `solve`, `matvec`, `power` are the same few lines with another f.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_kind, check_params, check_word, nearest
from jedit.core.checks import FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes, sharding_of
from jedit.core.paths import parameter_paths
from jedit.curvature.types import Curvature, Kronecker, Uncovered, eigenvalues, gather, rotate


def apply_spectral(
    curvature: Curvature,
    tree: PyTree,
    function: Callable[[Array], Array],
    *,
    damping: float | Array = 0.0,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """f(F + λ) T for a function of the eigenvalues; see `solve` for the arguments.

    Raises:
        ValueError: as `solve`.
    """
    check_word(Uncovered, uncovered=uncovered)
    check_numbers(NOT_NEGATIVE, damping=damping)
    leaves = check_covers(curvature, tree)
    total: dict[str, Array] = {}
    rest = dict(leaves)
    for name, block in curvature.blocks.items():
        values = eigenvalues(curvature, name)
        mine = {path: leaves[path].astype(values.dtype) for path in block.weight.paths}
        matrix = gather(block, mine)
        damped = values + _damping(values, damping, absolute)
        rotated = function(damped) * rotate(curvature, name, matrix)
        result = rotate(curvature, name, rotated, back=True)
        for path, part in block.weight.scatter(result).items():
            total[path] = total[path] + part if path in total else part
        if uncovered == "identity":
            for path, part in block.weight.scatter(matrix).items():
                rest[path] = rest[path] - part.astype(rest[path].dtype)
    out = []
    for path, leaf in leaves.items():
        left = rest[path] if uncovered == "identity" else jnp.zeros_like(leaf)
        whole = left + total[path].astype(leaf.dtype) if path in total else left
        place = sharding_of(leaf)
        out.append(whole if place is None else jax.lax.with_sharding_constraint(whole, place))
    return jax.tree.unflatten(jax.tree.structure(tree), out)


def _damping(values: Array, damping, absolute: bool) -> Array:
    """λ: in units of the mean eigenvalue, so that every layer of a stacked block has its own."""
    damping = jnp.asarray(damping, values.dtype)
    if absolute:
        return damping
    return damping * jnp.mean(values, axis=(1, 2), keepdims=True)


def check_covers(curvature: Curvature, tree: PyTree) -> dict[str, Array]:
    """Return a tree's leaves by path; every parameter of the curvature must be among them.

    Raises:
        TypeError: something else than a curvature, or than a tree of arrays.
        ValueError: the tree lacks a parameter, or has it in another shape.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    check_params(tree, "the tree")
    leaves = dict(parameter_paths(tree))
    for block in curvature.blocks.values():
        weight = block.weight
        shapes = {weight.path: weight.shape, weight.bias_path: weight.bias_shape}
        for path in weight.paths:
            if path not in leaves:
                raise ValueError(
                    f"the tree has no leaf {path!r}, which the curvature covers; it must be shaped "
                    f"like the params that the curvature was estimated at ({nearest(path, leaves)})"
                )
            if leaves[path].shape != shapes[path]:
                raise ValueError(
                    f"leaf {path!r} has shape {leaves[path].shape}, the curvature's parameter has "
                    f"{shapes[path]}"
                )
    return leaves


@on_auto_axes
def solve(
    curvature: Curvature,
    tree: PyTree,
    *,
    damping: float | Array,
    absolute: bool = False,
    uncovered: Uncovered = "zero",
) -> PyTree:
    """(F + λ)⁻¹ T, exact in the eigenbasis. Costs 4 d_in d_out (d_in + d_out) flops a block.

    Args:
        curvature: the blocks.
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
    """(F + λ) T; arguments and errors as `solve`."""
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
    """(F + λ)^exponent T; arguments and errors as `solve`. Exponent -1/2 whitens a gradient."""
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
    """Tᵀ (F + λ) T over the covered parameters, a scalar; half of it predicts the KL of step T."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    leaves = check_covers(curvature, tree)
    parts = []
    for name, block in curvature.blocks.items():
        values = eigenvalues(curvature, name)
        mine = {path: leaves[path].astype(values.dtype) for path in block.weight.paths}
        rotated = rotate(curvature, name, gather(block, mine))
        damped = values + _damping(values, damping, absolute)
        parts.append(jnp.sum(damped * rotated**2))
    return _sum(parts)


@on_auto_axes
def trace(curvature: Curvature, *, damping: float | Array = 0.0, absolute: bool = False) -> Array:
    """The trace of F + λ over the covered parameters, a scalar."""
    check_numbers(NOT_NEGATIVE, damping=damping)
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    parts = []
    for name in curvature.blocks:
        values = eigenvalues(curvature, name)
        parts.append(jnp.sum(values + _damping(values, damping, absolute)))
    return _sum(parts)


def _sum(parts: list[Array]) -> Array:
    """The sum of scalars in the widest of their dtypes; blocks of one model may differ."""
    dtype = jnp.float64 if any(p.dtype == jnp.float64 for p in parts) else jnp.float32
    return sum((p.astype(dtype) for p in parts), jnp.zeros((), dtype))


@on_auto_axes
def factors(curvature: Curvature, path: str) -> tuple[Array, Array]:
    """(A, G) of a parameter; A's last coordinate is the bias, where the site has one.

    A stacked parameter's factors have a leading layer axis; a diagonal factor is a vector.

    Raises:
        ValueError: no such block, or one that is diagonal.
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

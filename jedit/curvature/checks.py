"""Checks of a curvature: what it covers, what it was counted over, whether it is finite."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_kind, check_params, nearest
from jedit.core.checks import is_known
from jedit.core.devices import sharding_of
from jedit.core.paths import parameter_paths
from jedit.curvature.mesh.placement import whole
from jedit.curvature.types import Curvature, Factor, Kronecker
from jedit.tracing.sites import Weight


def check_covers(curvature: Curvature, tree: PyTree) -> dict[str, Array]:
    """Return a tree's leaves by path; every parameter of the curvature must be among them.

    Raises:
        TypeError: the curvature is something else, or the tree is no tree of arrays.
        ValueError: the tree lacks a parameter, or has it in another shape.
    """
    check_kind(curvature, Curvature, "curvature", "as `estimate` returns it")
    return check_has((block.weight for block in curvature.blocks.values()), tree, "curvature")


def check_has(weights: Iterable[Weight], tree: PyTree, owner: str) -> dict[str, Array]:
    """Return a tree's leaves by path; the parameters that something covers must be among them.

    Args:
        weights: the matrices of the parameters that the owner covers.
        tree: a pytree of arrays.
        owner: what a message calls that which covers them.

    Returns:
        The tree's leaves by path.

    Raises:
        TypeError: the tree is no tree of arrays.
        ValueError: the tree lacks a parameter, or has it in another shape.
    """
    check_params(tree, "the tree")
    leaves = dict(parameter_paths(tree))
    for weight in weights:
        shapes = {weight.path: weight.shape, weight.bias_path: weight.bias_shape}
        for path in weight.paths:
            if path not in leaves:
                raise ValueError(
                    f"the tree has no leaf {path!r}, which the {owner} covers; it must be shaped "
                    f"like the params that the {owner} was estimated at ({nearest(path, leaves)})"
                )
            if leaves[path].shape != shapes[path]:
                raise ValueError(
                    f"leaf {path!r} has shape {leaves[path].shape}, the {owner}'s parameter has "
                    f"{shapes[path]}"
                )
    return leaves


def check_has_powers(curvature: Curvature) -> None:
    """Refuse a curvature that has no eigenvectors, of which powers such as a root are made.

    Raises:
        ValueError: a factor was kept without them; its block is named.
    """
    for name, block in curvature.blocks.items():
        if isinstance(block, Kronecker):
            for end in (block.input, block.output):
                if curvature.factors[end].form == "undecomposed":
                    eigenbasis_of(curvature.factors[end], name)


def eigenbasis_of(factor: Factor, name: str) -> tuple[Array | None, Array]:
    """Return a factor's eigenvectors, None of a diagonal one, and all of its eigenvalues.

    Raises:
        ValueError: it was kept without them, or with the leading ones alone.
    """
    if factor.form == "undecomposed":
        raise ValueError(
            f"the curvature of {name!r} has no eigenvectors: its factors were kept by "
            f'factorize="{factor.by}", which serves `solve`, `matvec`, `quadratic_form`, `trace` '
            'and what is made of them; estimate it by factorize="eigh"'
        )
    if factor.form == "leading":
        raise ValueError(
            f"the curvature of {name!r} has the leading eigenvectors alone, and all are needed "
            'here: estimate it by factorize="eigh"'
        )
    assert factor.eigenvalues is not None
    return factor.basis, factor.eigenvalues


def check_decomposed(curvature: Curvature) -> None:
    """Refuse a curvature of which a factor has not all its eigenvectors, by its block's name.

    Raises:
        ValueError: a factor was kept without them, or with the leading ones alone.
    """
    for name, block in curvature.blocks.items():
        if isinstance(block, Kronecker):
            for end in (block.input, block.output):
                eigenbasis_of(curvature.factors[end], name)


def matrix_of(factor: Factor, name: str) -> Array:
    """Return a factor's matrix (layers, d, d), or (layers, d) of a diagonal one.

    Raises:
        ValueError: it was kept by its leading eigenvectors alone.
    """
    if factor.matrix is None:
        raise ValueError(
            f"the curvature of {name!r} has the leading eigenvectors alone, and its matrices are "
            'needed here: estimate it by factorize="eigh" or "cholesky"'
        )
    return factor.matrix


def check_has_matrices(curvature: Curvature) -> None:
    """Refuse a curvature of which a factor keeps no matrix, by its block's name.

    Raises:
        ValueError: a factor was kept by its leading eigenvectors alone.
    """
    for name, block in curvature.blocks.items():
        if isinstance(block, Kronecker):
            for end in (block.input, block.output):
                if curvature.factors[end].matrix is None:  # which may be a shape
                    matrix_of(curvature.factors[end], name)


def check_counted(num_outputs: Array, name: str = "the curvature") -> None:
    """Refuse a mean over no output: it protects nothing, and names nothing to be forgotten.

    Raises:
        ValueError: no output was counted.
    """
    if is_known(num_outputs) and not np.all(np.asarray(num_outputs) > 0):
        raise ValueError(
            f"{name} is of no outputs: its batches have no rows, or mask and valid leave out all"
        )


def check_layers_finite(
    values: Float[Array, "layers ..."], name: str, hint: str = "", what: str = "curvature"
) -> None:
    """Refuse what is not finite, by name; `what` is what a message calls it.

    Raises:
        FloatingPointError: it holds NaN or infinity.
    """
    found, sharding = _are_finite(values), sharding_of(values)
    # Layers may lie on devices that this process does not see.
    is_finite = np.asarray(found if sharding is None else jax.device_put(found, whole(sharding)))
    if not is_finite.all():
        layers = np.flatnonzero(~is_finite).tolist()
        where = f" (layers {layers})" if len(is_finite) > 1 else ""
        raise FloatingPointError(
            f"the {what} of {name!r}{where} is not finite: "
            + (hint or "the model's activations or gradients overflowed on some batch")
        )


@jax.jit
def _are_finite(values: Array) -> Array:
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))

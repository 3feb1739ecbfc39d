"""Eigendecompositions of factors: one matrix a call, after a look whether it is finite.

In jaxlib 0.10.2 on CPU several batched `eigh` in one jitted function can deadlock, and LAPACK may
never return on a matrix with a NaN; hence no batch, no jit, and the check in front.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jedit.core.devices import fetched
from jedit.core.precision import HIGHEST
from jedit.curvature.checks import check_layers_finite
from jedit.curvature.factorization import Factorize
from jedit.curvature.types import Factor


class Moment(NamedTuple):
    """A factor A or G before its decomposition.

    Attributes:
        matrix: (layers, d, d), or (layers, d) for a diagonal one.
        block: the name of the block that it belongs to, for error messages.
        hint: what to say when it is not finite.
    """

    matrix: Array
    block: str
    hint: str


def factorize(
    matrix: Float[Array, "layers d d"] | Float[Array, "layers d"],
    name: str,
    *,
    dtype: DTypeLike | None = None,
    hint: str = "",
    how: Factorize = Factorize(),  # noqa: B008 - frozen and hashable
) -> Factor:
    """Return every layer's matrix as a factor, with the eigenbasis that is asked for.

    Args:
        matrix: symmetric positive semi-definite, or a diagonal.
        name: the name of its block, for the error message.
        dtype: the dtype to decompose in; None: the matrix's own.
        hint: what to say when it is not finite.
        how: which eigenvectors are wanted; a diagonal factor needs none.

    Returns:
        The factor, in the matrix's dtype; eigenvalues that rounding made negative are zero.

    Raises:
        FloatingPointError: the matrix is not finite.
    """
    check_layers_finite(matrix, name, hint)
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    if how.by in ("cholesky", "inverse"):
        return Factor(matrix, None, None, how.by)
    if how.rank is not None and how.rank < matrix.shape[-1]:
        return leading(matrix, how.rank)
    # Waited for one by one: dispatched side by side, they are the batch that may deadlock.
    pairs = [jax.block_until_ready(eigh(layer, dtype or matrix.dtype)) for layer in matrix]
    values, bases = (
        jnp.stack([jnp.asarray(x, matrix.dtype) for x in side]) for side in zip(*pairs, strict=True)
    )
    # A sum of outer products has no negative eigenvalue: those of rounding would make a power NaN.
    return Factor(matrix, bases, jnp.maximum(values, 0))


def leading(matrix: Float[Array, "layers d d"], rank: int) -> Factor:
    """Return the factor's leading eigenvectors, by the dense decomposition.

    Each layer's matrix is decomposed by itself.
    """
    d = matrix.shape[-1]
    values, bases = [], []
    for layer in matrix:
        a, q = jax.block_until_ready(jnp.linalg.eigh(layer))
        a = jnp.maximum(a, 0)
        rest = jnp.maximum((jnp.trace(layer) - jnp.sum(a[d - rank :])) / (d - rank), 0)
        values.append(jnp.concatenate([rest[None], a[d - rank :]]))
        bases.append(q[:, d - rank :])
    return Factor(None, jnp.stack(bases), jnp.stack(values))


def eigh(
    matrix: Float[Array, "d d"], dtype: DTypeLike
) -> tuple[Float[ArrayLike, " d"], Float[ArrayLike, "d d"]]:
    """Return eigenvalues and eigenvectors.

    In a dtype that JAX has disabled NumPy computes them, on the host.
    """
    # float64 without x64: JAX would silently take float32.
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        return np.linalg.eigh(np.asarray(matrix, dtype))
    return jnp.linalg.eigh(matrix.astype(dtype))


def rotate_axis(basis: Array | None, x: Array, axis: int, *, back: bool = False) -> Array:
    """Multiply x by Qᵀ along an axis of (layers, d_in, d_out), or by Q, back; None: by nothing."""
    if basis is None:
        return x
    # Contracted as it lies: a transposed basis would be a copy of it.
    q = "lai" if back else "lia"
    spec = f"{q},lij->laj" if axis == 1 else f"{q},lji->lja"
    return jnp.einsum(spec, fetched(basis), x, precision=HIGHEST)


def shape_of(matrix: Array, how: Factorize) -> Factor:
    """Return a factor of the shapes that `factorize` makes, under `jax.eval_shape`."""
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    if how.by in ("cholesky", "inverse"):
        return Factor(matrix, None, None, how.by)
    if how.rank is not None and how.rank < matrix.shape[-1]:
        return Factor(None, matrix[..., : how.rank], matrix[:, 0, : how.rank + 1])
    return Factor(matrix, matrix, matrix[..., 0])

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
) -> Factor:
    """Return the eigenbasis of every layer's matrix; a diagonal factor needs none.

    Args:
        matrix: symmetric positive semi-definite, or a diagonal.
        name: the name of its block, for the error message.
        dtype: the dtype to decompose in; None: the matrix's own.
        hint: what to say when it is not finite.

    Returns:
        The factor, in the matrix's dtype; eigenvalues that rounding made negative are zero.

    Raises:
        FloatingPointError: the matrix is not finite.
    """
    check_layers_finite(matrix, name, hint)
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    # Waited for one by one: dispatched side by side, they are the batch that may deadlock.
    pairs = [jax.block_until_ready(eigh(layer, dtype or matrix.dtype)) for layer in matrix]
    values, bases = (
        jnp.stack([jnp.asarray(x, matrix.dtype) for x in side]) for side in zip(*pairs, strict=True)
    )
    # A sum of outer products has no negative eigenvalue: those of rounding would make a power NaN.
    return Factor(matrix, bases, jnp.maximum(values, 0))


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

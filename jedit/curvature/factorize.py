"""Eigendecompositions of factors: one matrix a call, after a look whether it is finite.

In jaxlib 0.10.2 on CPU several batched `eigh` in one jitted function can deadlock, and LAPACK may
never return on a matrix with a NaN; hence no batch, no jit, and the check in front.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jedit.curvature.structure import Factor


def check_finite(values: Float[Array, "layers ..."], name: str, hint: str = "") -> None:
    """Refuse what is not finite, by name.

    Raises:
        FloatingPointError: it holds NaN or infinity.
    """
    is_finite = np.asarray(_are_finite(values))
    if not is_finite.all():
        layers = np.flatnonzero(~is_finite).tolist()
        where = f" (layers {layers})" if len(is_finite) > 1 else ""
        raise FloatingPointError(
            f"the curvature of {name!r}{where} is not finite: "
            + (hint or "the model's activations or gradients overflowed on some batch")
        )


@jax.jit
def _are_finite(values: Array) -> Array:
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def factorize(
    matrix: Float[Array, "layers d d"] | Float[Array, "layers d"],
    name: str,
    *,
    dtype: DTypeLike | None = None,
    hint: str = "",
) -> Factor:
    """The eigenbasis of every layer's matrix; a diagonal factor is its own.

    Args:
        matrix: symmetric positive semi-definite, or a diagonal.
        name: of the block, for the error.
        dtype: to decompose in; None: the matrix's own.
        hint: what to say when it is not finite.

    Returns:
        The factor, in the matrix's dtype; eigenvalues that rounding made negative are zero.

    Raises:
        FloatingPointError: it is not finite.
    """
    check_finite(matrix, name, hint)
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    pairs = [_eigh(layer, dtype or matrix.dtype) for layer in matrix]
    values, bases = (
        jnp.stack([jnp.asarray(x, matrix.dtype) for x in side]) for side in zip(*pairs, strict=True)
    )
    return Factor(matrix, bases, jnp.maximum(values, 0))


def _eigh(matrix: Float[Array, "d d"], dtype: DTypeLike):
    """Eigenvalues and eigenvectors; by NumPy, on the host, in a dtype that JAX has disabled."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        return np.linalg.eigh(np.asarray(matrix, dtype))
    return jax.block_until_ready(jnp.linalg.eigh(matrix.astype(dtype)))

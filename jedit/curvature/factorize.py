"""Eigendecompositions of factors: one matrix a call, after a look whether it is finite.

In jaxlib 0.10.2 on CPU several batched `eigh` in one jitted function can deadlock, and LAPACK may
never return on a matrix with a NaN; hence no batch, no jit, and the check in front.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jedit.curvature.blocks import Factor


def check_finite(matrix: Array, name: str, hint: str = "") -> None:
    """Refuse a matrix that is not finite, by name.

    Raises:
        FloatingPointError: it holds NaN or infinity.
    """
    finite = np.asarray(jnp.all(jnp.isfinite(matrix), axis=tuple(range(1, matrix.ndim))))
    if not finite.all():
        layers = np.flatnonzero(~finite)
        where = f" (layers {layers.tolist()})" if len(finite) > 1 else ""
        raise FloatingPointError(
            f"the curvature of {name!r}{where} is not finite: "
            + (hint or "the model's activations or gradients overflowed on some batch")
        )


def factorize(
    matrix: Float[Array, "layers d d"] | Float[Array, "layers d"],
    name: str,
    *,
    dtype: jnp.dtype | None = None,
    hint: str = "",
) -> Factor:
    """The eigenbasis of every layer's matrix; a diagonal factor is its own.

    Args:
        matrix: symmetric positive semi-definite, or a diagonal.
        name: of the block, for the error.
        dtype: to decompose in; None: the matrix's own.
        hint: what to say when it is not finite.

    Returns:
        The factor, in the matrix's dtype.

    Raises:
        FloatingPointError: it is not finite.
    """
    check_finite(matrix, name, hint)
    if matrix.ndim == 2:
        return Factor(matrix, None, matrix)
    bases, values = [], []
    for layer in matrix:
        w, q = jax.block_until_ready(jnp.linalg.eigh(layer if dtype is None else layer.astype(dtype)))
        bases.append(q.astype(matrix.dtype))
        values.append(jnp.maximum(w, 0).astype(matrix.dtype))
    return Factor(matrix, jnp.stack(bases), jnp.stack(values))

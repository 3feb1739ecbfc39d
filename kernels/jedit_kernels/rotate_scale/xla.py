"""The damped inverse as XLA's products; those around the division are the kernel's too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate_scale_xla(
    matrix: Float[Array, "layers d_in d_out"],
    basis_in: Float[Array, "layers d_in d_in"],
    basis_out: Float[Array, "layers d_out d_out"],
    eigenvalues: Float[Array, "layers d_in d_out"],
    damping: Float[Array, "layers"],
) -> Float[Array, "layers d_in d_out"]:
    """Return Q_A [ (Q_Aᵀ T Q_G) / (λ_ij + λ) ] Q_Gᵀ at full precision of the operands."""
    right = product("lij,ljo->lio", matrix, basis_out, eigenvalues.dtype).astype(matrix.dtype)
    rotated = product("lia,lio->lao", basis_in, right, eigenvalues.dtype)
    return rotate_back(divide(rotated, eigenvalues, damping[:, None, None]), basis_in, basis_out)


def divide(rotated: Array, eigenvalues: Array, damping: Array) -> Array:
    """Divide by λ_ij + λ; the result is zero where that is zero."""
    damped = eigenvalues + damping
    is_zero = damped == 0
    one, zero = jnp.ones_like(damped), jnp.zeros_like(rotated)
    return jnp.where(is_zero, zero, rotated / jnp.where(is_zero, one, damped))


def rotate_back(scaled: Array, basis_in: Array, basis_out: Array) -> Array:
    """Return Q_A P Q_Gᵀ in `scaled`'s dtype, with operands in the bases'."""
    dtype = scaled.dtype
    left = product("lia,lao->lio", basis_in, scaled.astype(basis_in.dtype), dtype)
    return product("lij,loj->lio", left.astype(basis_out.dtype), basis_out, dtype)


def product(spec: str, left: Array, right: Array, dtype) -> Array:
    """Return an einsum summed in `dtype`, at full precision."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, left, right, precision=highest, preferred_element_type=dtype)

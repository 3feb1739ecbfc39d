"""The damped inverse in plain JAX: four products and a division, nothing rounded between them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate_scale_reference(
    matrix: Float[Array, "layers d_in d_out"],
    basis_in: Float[Array, "layers d_in d_in"],
    basis_out: Float[Array, "layers d_out d_out"],
    eigenvalues: Float[Array, "layers d_in d_out"],
    damping: Float[Array, "layers"],
) -> Float[Array, "layers d_in d_out"]:
    """Return Q_A [ (Q_Aᵀ T Q_G) / (λ_ij + λ) ] Q_Gᵀ in the eigenvalues' dtype."""
    t, q, r = (x.astype(eigenvalues.dtype) for x in (matrix, basis_in, basis_out))
    damped = eigenvalues + damping[:, None, None]
    with jax.default_matmul_precision("highest"):
        rotated = jnp.swapaxes(q, 1, 2) @ t @ r
        scaled = jnp.where(damped == 0, 0, rotated / jnp.where(damped == 0, 1, damped))
        return q @ scaled @ jnp.swapaxes(r, 1, 2)

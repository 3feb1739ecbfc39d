"""The sum of squared gradients in plain JAX: every example's gradient at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_gradient_sum_reference(
    total: Float[Array, "layers d_in d_out"],
    a: Float[Array, "layers n s d_in"],
    g: Float[Array, "layers n s d_out"],
) -> Float[Array, "layers d_in d_out"]:
    """Return total + Σ_n (a_nᵀ g_n)²; needs memory for n gradients."""
    a, g = a.astype(total.dtype), g.astype(total.dtype)
    gradients = jnp.einsum("lnsi,lnso->lnio", a, g, precision=jax.lax.Precision.HIGHEST)
    return total + jnp.sum(gradients**2, axis=1)

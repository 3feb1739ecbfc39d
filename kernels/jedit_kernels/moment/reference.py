"""The moment in plain JAX: the whole product, at full precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def moment_reference(
    total: Float[Array, "layers d d"],
    rows: Float[Array, "layers n d"],
    mask: Bool[Array, "layers n"] | None = None,
) -> Float[Array, "layers d d"]:
    """Return total + Σ_n a aᵀ over unmasked rows, both triangles."""
    rows = rows.astype(total.dtype)
    if mask is not None:
        rows = jnp.where(mask[..., None], rows, 0)
    return total + jnp.einsum("lni,lnj->lij", rows, rows, precision=jax.lax.Precision.HIGHEST)

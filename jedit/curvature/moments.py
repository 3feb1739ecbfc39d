"""The second moment aᵀa of many rows: the arithmetic that an estimation pass spends its time on.

The moment is symmetric, so only blocks on and below the diagonal are computed; `symmetrize` mirrors
them once at the end. Sums are at full precision whatever the default of the device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 128  # wider panels compute more above the diagonal, narrower ones multiply at a worse rate


def add_moment(
    total: Float[Array, "layers d d"], rows: Float[Array, "layers n d"]
) -> Float[Array, "layers d d"]:
    """Add Σ_n a aᵀ to the lower block triangle of a running sum; what is above stays as it is."""
    d = rows.shape[-1]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        panel = jnp.einsum(
            "lni,lnj->lij",
            rows[:, :, start:stop],
            rows[:, :, :stop],
            precision=jax.lax.Precision.HIGHEST,
        )
        total = total.at[:, start:stop, :stop].add(panel)
    return total


def symmetrize(total: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """The whole matrix from its lower triangle."""
    lower = jnp.tril(total, -1)
    diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
    eye = jnp.eye(total.shape[-1], dtype=total.dtype)
    return lower + jnp.swapaxes(lower, -1, -2) + diagonal[..., None] * eye[None]

"""The second moment aᵀa of many rows: the arithmetic that an estimation pass spends its time on.

The moment is symmetric, so little more than its lower triangle is computed; `symmetrize` mirrors it
once at the end. Sums are at full precision whatever the default of the device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NARROWEST = 128  # narrower products lose their rate
MOST_BLOCKS = 8  # 36 of 64 products; twice as many save little more, and compile for long


def add_moment(
    total: Float[Array, "layers d d"], rows: Float[Array, "layers n d"]
) -> Float[Array, "layers d d"]:
    """Add the lower block triangle of Σ_n a aᵀ to a running sum; what is above means nothing."""
    d = rows.shape[-1]
    number = min(MOST_BLOCKS, max(1, round(d / NARROWEST)))
    # Each column block is cut out once: copying it costs as much as a tenth of a product.
    blocks = jnp.split(rows, [d * i // number for i in range(1, number)], axis=-1)
    panels = []
    for i, left in enumerate(blocks):
        row = [
            jnp.einsum("lni,lnj->lij", left, right, precision=jax.lax.Precision.HIGHEST)
            for right in blocks[: i + 1]
        ]
        panel = jnp.concatenate(row, axis=-1)
        panels.append(jnp.pad(panel, ((0, 0), (0, 0), (0, d - panel.shape[-1]))))
    return total + jnp.concatenate(panels, axis=1)


def symmetrize(total: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """The whole matrix from its lower triangle."""
    lower = jnp.tril(total, -1)
    diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
    eye = jnp.eye(total.shape[-1], dtype=total.dtype)
    return lower + jnp.swapaxes(lower, -1, -2) + diagonal[..., None] * eye[None]

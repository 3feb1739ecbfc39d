"""The moment as an XLA program: a block-triangular product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NARROWEST = 128  # narrower products lose their rate
MOST_BLOCKS = 8  # 36 of 64 products; twice as many save little more, and compile for long


def moment_xla(
    total: Float[Array, "layers d d"], rows: Float[Array, "layers n d"]
) -> Float[Array, "layers d d"]:
    """Add the lower block triangle of Σ_n a aᵀ; sums in `total`'s dtype, at full precision."""
    d = rows.shape[-1]
    number = min(MOST_BLOCKS, max(1, round(d / NARROWEST)))
    # Each column block is cut out once: copying it costs as much as a tenth of a product.
    blocks = jnp.split(rows, [d * i // number for i in range(1, number)], axis=-1)
    panels = []
    for i, left in enumerate(blocks):
        row = [
            jnp.einsum(
                "lni,lnj->lij",
                left,
                right,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=total.dtype,
            )
            for right in blocks[: i + 1]
        ]
        panel = jnp.concatenate(row, axis=-1)
        panels.append(jnp.pad(panel, ((0, 0), (0, 0), (0, d - panel.shape[-1]))))
    return total + jnp.concatenate(panels, axis=1)

"""The moment as an XLA program: a block-triangular product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# By size, from what was measured on a CPU (`kernels/README.md`): products of a strip of columns
# with all columns before it, four strips, up to 1,536 columns; there smaller products lose more of
# their rate than they save. Above it cutting a strip's columns out again costs more than that, and
# so each of eight blocks is cut out once: 36 of 64 products.
NARROWEST = 64
STRIPS = 4
WIDEST_IN_STRIPS = 1536
BLOCKS = 8


def divided(d: int) -> tuple[int, bool]:
    """Return into how many parts the columns are divided, and whether the parts are strips."""
    if d < NARROWEST:
        return 1, True
    return (STRIPS, True) if d <= WIDEST_IN_STRIPS else (BLOCKS, False)


def moment_xla(
    total: Float[Array, "layers d d"], rows: Float[Array, "layers n d"]
) -> Float[Array, "layers d d"]:
    """Add the lower block triangle of Σ_n a aᵀ; sums in `total`'s dtype, at full precision."""
    d = rows.shape[-1]
    number, is_in_strips = divided(d)
    ends = [d * i // number for i in range(1, number + 1)]
    blocks = jnp.split(rows, ends[:-1], axis=-1)
    panels = []
    for i, (left, end) in enumerate(zip(blocks, ends, strict=True)):
        others = [rows[..., :end]] if is_in_strips else blocks[: i + 1]
        row = [
            jnp.einsum(
                "lni,lnj->lij",
                left,
                right,
                precision=jax.lax.Precision.HIGHEST,
                preferred_element_type=total.dtype,
            )
            for right in others
        ]
        panel = jnp.concatenate(row, axis=-1)
        panels.append(jnp.pad(panel, ((0, 0), (0, 0), (0, d - end))))
    return total + jnp.concatenate(panels, axis=1)

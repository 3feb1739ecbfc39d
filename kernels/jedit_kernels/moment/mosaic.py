"""The moment on Hopper: the shared kernel over the lower tiles, both operands the same rows."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jedit_kernels.choice import check_mosaic
from jedit_kernels.tiles import best_width, lower_tiles


def moment_mosaic(
    total: Float[Array, "layers d d"],
    rows: Float[Array, "layers n d"],
    mask: Bool[Array, "layers n"] | None = None,
    *,
    width: int | None = None,
) -> Float[Array, "layers d d"]:
    """Add the lower tiles of Σ_n a aᵀ; what is above the diagonal means nothing.

    Args:
        total: the running sum, in float32.
        rows: the rows a, in bfloat16 or float16.
        mask: False for rows that are left out.
        width: the columns of a tile, 128, 192 or 256; None for `best_width`.

    Returns:
        The new total.

    Raises:
        ValueError: another dtype, or an old JAX.
    """
    check_mosaic("moment", rows=rows)
    from jedit_kernels.contraction import TILE_HEIGHT, contract

    layers, _, d = rows.shape
    width = width or best_width(lambda w: len(lower_tiles(d, (TILE_HEIGHT, w))), layers)
    grouped = rows[:, None]
    return contract(
        grouped,
        grouped,
        total.astype(jnp.float32),
        tiles=lower_tiles(d, (TILE_HEIGHT, width)),
        width=width,
        keep=mask,
    ).astype(total.dtype)

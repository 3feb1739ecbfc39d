"""The sum of squared gradients on Hopper: the shared kernel, one group an example."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit_kernels.choice import check_mosaic
from jedit_kernels.tiles import all_tiles

WIDTH = 128  # two sums of 64 x 128 a warpgroup are 128 registers a thread


def squared_gradient_sum_mosaic(
    total: Float[Array, "layers d_in d_out"],
    a: Float[Array, "layers n s d_in"],
    g: Float[Array, "layers n s d_out"],
) -> Float[Array, "layers d_in d_out"]:
    """Add Σ_n (a_nᵀ g_n)²; a gradient is squared in the registers that it was summed in.

    Raises:
        ValueError: operands neither both bfloat16 nor both float16, or an old JAX.
    """
    check_mosaic("squared_gradient_sum", a=a, g=g)
    from jedit_kernels.contraction import TILE_HEIGHT, contract

    _, d_in, d_out = total.shape
    return contract(
        a,
        g,
        total.astype(jnp.float32),
        tiles=all_tiles(d_in, d_out, (TILE_HEIGHT, WIDTH)),
        width=WIDTH,
        is_squared=True,
    ).astype(total.dtype)

"""The damped inverse on Hopper: the division fused into the end of the second product.

T Q_G, and the two products after the division, are XLA's; Q_Aᵀ (T Q_G) is the shared kernel, which
divides each tile by its eigenvalues while it is in registers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit_kernels.choice import check_mosaic
from jedit_kernels.rotate_scale.xla import divide, product, rotate_back
from jedit_kernels.tiles import all_tiles, best_width


def rotate_scale_mosaic(
    matrix: Float[Array, "layers d_in d_out"],
    basis_in: Float[Array, "layers d_in d_in"],
    basis_out: Float[Array, "layers d_out d_out"],
    eigenvalues: Float[Array, "layers d_in d_out"],
    damping: Float[Array, "layers"],
) -> Float[Array, "layers d_in d_out"]:
    """Return Q_A [ (Q_Aᵀ T Q_G) / (λ_ij + λ) ] Q_Gᵀ, sums in float32.

    Raises:
        ValueError: operands not all bfloat16 or all float16, or an old JAX.
    """
    check_mosaic("rotate_scale", matrix=matrix, basis_in=basis_in, basis_out=basis_out)
    from jedit_kernels.contraction import TILE_HEIGHT, contract

    layers, d_in, d_out = matrix.shape
    width = best_width(lambda w: len(all_tiles(d_in, d_out, (TILE_HEIGHT, w))), layers)
    right = product("lij,ljo->lio", matrix, basis_out, jnp.float32).astype(matrix.dtype)
    scaled = contract(
        basis_in[:, None],
        right[:, None],
        eigenvalues.astype(jnp.float32),
        divide,
        tiles=all_tiles(d_in, d_out, (TILE_HEIGHT, width)),
        width=width,
        scalars=damping,
    )
    return rotate_back(scaled, basis_in, basis_out).astype(eigenvalues.dtype)

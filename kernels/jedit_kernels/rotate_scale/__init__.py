"""A damped inverse in an eigenbasis: what `solve` does to one matrix.

Q_A [ (Q_Aᵀ T Q_G) / (λ_ij + λ) ] Q_Gᵀ
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jedit_kernels.choice import choose
from jedit_kernels.rotate_scale.mosaic import rotate_scale_mosaic
from jedit_kernels.rotate_scale.xla import rotate_scale_xla

# Compute capabilities of the GPUs where the kernel has been measured faster than XLA: none yet.
FASTER_ON: frozenset[str] = frozenset()


def rotate_scale(
    matrix: Float[Array, "layers d_in d_out"],
    basis_in: Float[Array, "layers d_in d_in"],
    basis_out: Float[Array, "layers d_out d_out"],
    eigenvalues: Float[Array, "layers d_in d_out"],
    damping: float | Float[Array, ""] | Float[Array, "layers"],
    *,
    implementation: str | None = None,
) -> Float[Array, "layers d_in d_out"]:
    """Return (F + λ)⁻¹ T for a block of F with these eigenvalues in these bases.

    Costs 4 d_in d_out (d_in + d_out) flops a layer. Between the products the matrix has the dtype
    of `matrix`; sums are in `eigenvalues`'s, float32 or wider.

    Args:
        matrix: T. It and both bases in one dtype; "mosaic" takes bfloat16 or float16.
        basis_in: Q_A, eigenvectors in columns.
        basis_out: Q_G, eigenvectors in columns.
        eigenvalues: λ_ij.
        damping: λ, one number or one a layer, in their units. Where λ_ij + λ is zero the result's
            component is zero.
        implementation: "xla", "mosaic" (NVIDIA Hopper), or None: "mosaic" on GPUs where it has been
            measured faster, else "xla".

    Returns:
        A matrix like T in `eigenvalues`'s dtype.

    Raises:
        ValueError: an unknown `implementation`; or "mosaic" with other dtypes or an old JAX.
    """
    damping = jnp.broadcast_to(jnp.asarray(damping, eigenvalues.dtype), matrix.shape[:1])
    is_mosaic = choose(implementation, FASTER_ON, matrix, basis_in, basis_out) == "mosaic"
    run = rotate_scale_mosaic if is_mosaic else rotate_scale_xla
    return run(matrix, basis_in, basis_out, eigenvalues, damping)


__all__ = ["rotate_scale"]

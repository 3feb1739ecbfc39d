"""The second moment aᵀa of many rows as a whole matrix.

It is summed with little more than its lower triangle (`kernels.moment`) and mirrored once, here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def symmetrize(total: Float[Array, "layers d d"]) -> Float[Array, "layers d d"]:
    """The whole matrix from its lower triangle."""
    lower = jnp.tril(total, -1)
    diagonal = jnp.diagonal(total, axis1=-2, axis2=-1)
    eye = jnp.eye(total.shape[-1], dtype=total.dtype)
    return lower + jnp.swapaxes(lower, -1, -2) + diagonal[..., None] * eye[None]

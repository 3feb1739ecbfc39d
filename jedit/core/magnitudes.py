"""The magnitude up to which entries are kept when the largest are left out."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def bound_below_top(magnitudes: Float[Array, " n"], fraction: float) -> Float[Array, ""]:
    """Return the largest magnitude outside the top fraction, rounded to a whole number of entries.

    Everything up to the bound is kept, so entries equal to the smallest that is left out are kept
    too; it is -1 where nothing is. Costs one sort.
    """
    size = magnitudes.shape[0]
    kept = size - round(fraction * size)
    return jnp.sort(magnitudes)[kept - 1] if kept else -jnp.ones((), magnitudes.dtype)

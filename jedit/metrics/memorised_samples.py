"""Which generated images are copies of a training image.

    x is a copy of a   when   ‖x - a‖ < c ‖x - b‖ for the nearest other training image b

c = 1/3 is the threshold of the literature on memorisation in diffusion models (Yoon et al. 2023)
[from memory, not read again].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jedit.core.checks import POSITIVE, check_numbers

THRESHOLD = 1 / 3


def memorised_samples(
    samples: Float[Array, "n pixels"],
    own: Float[Array, "n pixels"],
    others: Float[Array, "m pixels"],
    *,
    threshold: float = THRESHOLD,
) -> Bool[Array, " n"]:
    """Say of each sample whether it is a copy of the training image that it may be a copy of.

    Args:
        samples: the generated images x.
        own: the image a of each sample's prompt.
        others: all other training images b; rows that equal a sample's own do not count.
        threshold: c, 1/3.

    Returns:
        One yes or no per sample. The samples are gone through one by one, m x pixels at a time.

    Raises:
        ValueError: a threshold that is not positive, or no other image.
    """
    check_numbers(POSITIVE, threshold=threshold)
    if not len(others):
        raise ValueError("others holds no image: a copy is told by its distance to another one")

    def is_copy(pair: tuple[Array, Array]) -> Array:
        sample, its_own = pair
        distance = jnp.sum((sample[None] - others) ** 2, axis=1)
        is_own = jnp.all(its_own[None] == others, axis=1)
        nearest = jnp.min(jnp.where(is_own, jnp.inf, distance))
        return jnp.sum((sample - its_own) ** 2) < threshold**2 * nearest

    return jax.lax.map(is_copy, (samples, own))

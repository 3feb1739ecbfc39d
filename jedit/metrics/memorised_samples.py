"""Which generated images are copies of a training image.

    x is a copy of a   when   ‖x - a‖ < c ‖x - b‖ for the nearest other training image b

c = 1/3 is the threshold of the literature on memorisation in diffusion models (Yoon et al. 2023)
[from memory, not read again].
"""

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
        One yes or no per sample. Needs n x m distances.

    Raises:
        ValueError: a threshold that is not positive, or no other image.
    """
    check_numbers(POSITIVE, threshold=threshold)
    if not len(others):
        raise ValueError("others holds no image: a copy is told by its distance to another one")
    away = jnp.sum((samples - own) ** 2, axis=1)
    distance = jnp.sum((samples[:, None] - others[None]) ** 2, axis=2)
    is_own = jnp.all(own[:, None] == others[None], axis=2)
    nearest = jnp.min(jnp.where(is_own, jnp.inf, distance), axis=1)
    return away < threshold**2 * nearest

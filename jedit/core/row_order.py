"""Rows in the order of permutations, one round after the other, cut where one likes."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key


@partial(jax.jit, static_argnums=(0, 1))
def piece_of_rounds(
    count: int,
    length: int,
    place: Int[Array, "2"],
    key: Key[Array, ""],
) -> Int[Array, " length"]:
    """Return a piece of the endless stream of permutations of 0 ... count - 1.

    Args:
        count: the length of a round.
        length: the length of the piece.
        place: the round that it begins in, and where in it.
        key: round e is permuted by `fold_in(key, e)`.
    """
    numbers = jnp.arange(count, dtype=jnp.int32)
    # A piece reaches into one round more than would hold it.
    rounds = place[0] + jnp.arange(-(-length // count) + 1, dtype=jnp.int32)

    def permutation(number: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, number), numbers)

    stream = jax.vmap(permutation)(rounds).reshape(-1)
    return lax.dynamic_slice(stream, (place[1],), (length,))

"""Directions among hidden states: RMU's target, and the lean of the representation deviation's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.checks import COUNT, check_numbers

Hidden = Callable[[Callable, PyTree, PyTree], Float[Array, "batch *lead width"]]
"""`(apply, params, inputs) -> states`, hashable; `jedit.tracing.Entering(site)` is one."""


def random_direction(width: int, *, key: Key[Array, ""]) -> Float[Array, " width"]:
    """Return u: uniform in [0, 1) in every coordinate, then of norm one, as in RMU's code."""
    check_numbers(COUNT, width=width)
    u = jax.random.uniform(key, (width,))
    return u / jnp.linalg.norm(u)


def direction_like(states: Float[Array, "*lead width"], seed: int) -> Float[Array, "*lead width"]:
    """Return the direction of a seed at every position of the states, in their dtype."""
    u = random_direction(states.shape[-1], key=jax.random.key(seed)).astype(states.dtype)
    return jax.lax.broadcast_in_dim(u, states.shape, (states.ndim - 1,))

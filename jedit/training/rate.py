"""The learning rate in an optimizer's state, where `optax.inject_hyperparams` keeps it."""

import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def with_learning_rate(state: PyTree, learning_rate: float) -> PyTree:
    """Return an optimizer's state with this rate in it, at every place where it holds one.

    A method of two optimizers holds two; what brings a schedule of its own holds none.
    """
    found = optax.tree_utils.tree_get_all_with_path(state, "learning_rate")
    if not found:
        return state
    # As the state has it: another dtype or sharding would compile the steps once more.
    return optax.tree_utils.tree_set(state, learning_rate=jnp.full_like(found[0][1], learning_rate))

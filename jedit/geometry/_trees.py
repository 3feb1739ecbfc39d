"""Sums over the leaves of a tree, and dtypes put back: what the files beside this one share."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def total(scalars: PyTree) -> Array:
    """Return the sum of a tree's leaves, which have one shape."""
    return functools.reduce(jnp.add, jax.tree.leaves(scalars))


def everywhere(scalars: PyTree) -> PyTree:
    """Return the tree with the sum of its leaves at every leaf."""
    whole = total(scalars)
    return jax.tree.map(lambda _: whole, scalars)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return the tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)

"""States that own their arrays, and updates that lie on the devices as they came."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.devices import fetched
from jedit.core.paths import parameter_paths
from jedit.geometry.parts import part_of, with_part


def owned(tree: PyTree) -> PyTree:
    """Copy each array for an optimizer's state: a loop that donates it would delete others'.

    Two transforms of a chain may hold the same curvature, and no array can be donated twice. What
    lies in the host's memory comes to the device's, where a compiled update leaves it.
    """
    return jax.tree.map(lambda x: jnp.copy(fetched(x)), tree)


def sharded_like(tree: PyTree, reference: PyTree) -> PyTree:
    """Return the tree, each leaf sharded as the leaf of the reference, whose NaNs it takes over.

    Reading the reference entry by entry is what lets its sharding reach the result in any JAX.
    """
    return jax.tree.map(lambda x, y: jnp.where(jnp.isnan(y), y.astype(x.dtype), x), tree, reference)


def without_frozen(updates: PyTree, params: PyTree | None, covered: Iterable[str]) -> PyTree:
    """Return what an update whose other parameters are frozen is to be sharded like.

    Frozen ones are read off the params, if they are given: an update of zero that reads its
    gradient makes XLA compute that.
    """
    frozen = dict(parameter_paths(updates)).keys() - set(covered)
    return with_part(updates, part_of(params, frozen))

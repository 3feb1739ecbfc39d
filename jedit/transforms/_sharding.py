"""Updates that lie on the devices as they came."""

import jax
from jax.experimental.shard_alike import shard_alike
from jaxtyping import PyTree


def sharded_like(tree: PyTree, reference: PyTree) -> PyTree:
    """The tree, each leaf sharded as the leaf of the reference; zeros have no sharding to keep."""
    return jax.tree.map(lambda x, y: shard_alike(x, y)[0], tree, reference)

"""Stacks of edits: every leaf of an `Edit` leads with an axis of requests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.edits.edit import Edit
from jedit.edits.low_rank import HIGHEST, Block, LowRank, as_parameter


def sum_edits(edits: Edit, mask: Array | None = None) -> Edit:
    """Add up some of a stack of edits, or all, each as often as its weight says.

    Args:
        edits: a stack of R edits, as `batch_unlearn` returns it.
        mask: (R,), booleans or weights; None: all of them once.

    Returns:
        One dense edit. The products of thin blocks are summed in one contraction each.

    Raises:
        ValueError: a mask of another length than the stack.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(edits)}
    if len(lengths) != 1 or (mask is not None and mask.shape != (next(iter(lengths)),)):
        shape = None if mask is None else mask.shape
        raise ValueError(f"the edits' leading axes are {sorted(lengths)}, the mask is {shape}")

    def total(block: Block) -> Array:
        weights = jnp.ones(next(iter(lengths)), block.dtype)
        weights = weights if mask is None else mask.astype(block.dtype)
        if not isinstance(block, LowRank):
            return jnp.einsum("r,r...->...", weights, block, precision=HIGHEST)
        left = block.left * weights[:, None, None, None]
        matrix = jnp.einsum("rlik,rlko->lio", left, block.right, precision=HIGHEST)
        return as_parameter(block.weight, matrix)

    return Edit({path: total(block) for path, block in edits.blocks.items()})

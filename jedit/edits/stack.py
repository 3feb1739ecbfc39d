"""Stacks of edits: every leaf of an `Edit` leads with an axis of requests."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jedit.core.checks import FINITE, check_numbers
from jedit.core.devices import RowSharding, axes_of, on_auto_axes, row_sharding, spec_of
from jedit.core.precision import HIGHEST
from jedit.curvature.mesh.placement import even, leaf_shardings, matrix_sharding
from jedit.edits.edit import Edit
from jedit.edits.low_rank import Delta, LowRank, as_parameter


@on_auto_axes
def sum_edits(edits: Edit, mask: Array | None = None, *, like: PyTree | None = None) -> Edit:
    """Add up some of a stack of edits, or all, each as often as its weight says.

    Args:
        edits: a stack of R edits, as `batch_unlearn` returns it.
        mask: (R,), booleans or weights; None: all of them once.
        like: the parameters, if they lie on a mesh: every block is summed up where its parameter
            is, and no device holds a whole one.

    Returns:
        One dense edit. The products of thin blocks are summed in one contraction each.

    Raises:
        ValueError: the mask has another length than the stack.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(edits)}
    if len(lengths) != 1 or (mask is not None and mask.shape != (next(iter(lengths)),)):
        shape = None if mask is None else mask.shape
        raise ValueError(f"the edits' leading axes are {sorted(lengths)}, the mask is {shape}")

    check_numbers(FINITE, mask=mask)
    weights = jnp.ones(next(iter(lengths))) if mask is None else mask
    if like is None:
        return Edit({path: _total(block, weights) for path, block in edits.blocks.items()})
    places, over = leaf_shardings(like), row_sharding(edits)
    blocks = {}
    for path, block in edits.blocks.items():
        place = places.get(path)
        total = (
            _total if place is None else functools.partial(_sharded_total, place=place, over=over)
        )
        blocks[path] = total(block, weights)
    return Edit(blocks)


def _total(block: Delta, weights: Array) -> Array:
    weights = weights.astype(block.dtype)
    if not isinstance(block, LowRank):
        return jnp.einsum("r,r...->...", weights, block, precision=HIGHEST)
    left = block.left * weights[:, None, None, None]
    matrix = jnp.einsum("rlik,rlko->lio", left, block.right, precision=HIGHEST)
    return as_parameter(block.weight, matrix)


@functools.partial(jax.jit, static_argnames=("place", "over"))
def _sharded_total(
    block: Delta, weights: Array, place: NamedSharding, over: RowSharding | None
) -> Array:
    """Move what is summed to where its rows and columns are wanted, then sum it.

    A sum over requests that lie on several devices would make partial sums of a whole matrix.
    """

    def moved(x: Array, wanted: NamedSharding) -> Array:
        if over is not None and over.mesh == place.mesh:
            # First cut it where the requests' own devices allow: the rest is an all-to-all then.
            split = [tuple(a for a in axes_of(e) if a not in over.axes) for e in wanted.spec]
            between = NamedSharding(place.mesh, spec_of(over.axes, *split[1:]))
            x = jax.lax.with_sharding_constraint(x, between)
        return jax.lax.with_sharding_constraint(x, wanted)

    if isinstance(block, LowRank):
        matrix = matrix_sharding(block.weight, {block.weight.path: place})
        assert matrix is not None  # there is a place
        left = moved(block.left, even(matrix, block.left.shape, None, 0, 1, None))
        right = moved(block.right, even(matrix, block.right.shape, None, 0, None, 2))
        block = LowRank(left, right, block.weight)
    else:
        block = moved(block, NamedSharding(place.mesh, PartitionSpec(None, *place.spec)))
    return jax.lax.with_sharding_constraint(_total(block, weights), place)

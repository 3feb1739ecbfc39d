"""Parameters kept wider than they are computed with, so that small steps add up.

A weight in bfloat16 has eight bits: a step of less than a 500th of it is lost, and natural steps
are mostly smaller. The masters of the edited ones alone cost four bytes each beside the model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply
from jedit.core.precision import wide_dtype


@dataclasses.dataclass(frozen=True)
class _Narrowed:
    """A function of masters: each leaf is cast to the dtype it had; equal by value."""

    apply: Apply
    dtypes: tuple[Any, ...]

    def __call__(self, params: PyTree, inputs: Any) -> Array:
        leaves, structure = jax.tree.flatten(params)
        narrow = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
        return self.apply(jax.tree.unflatten(structure, narrow), inputs)


def with_masters(
    apply: Apply, params: PyTree, is_trained: tuple[bool, ...]
) -> tuple[Apply, PyTree]:
    """Keep what is trained in float32 or wider, and compute as before.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: its parameters.
        is_trained: leaf by leaf, as `which_are_trained` says it.

    Returns:
        A function that computes, bit by bit, what `apply` does with the masters rounded, and the
        masters among the other parameters; the same two where nothing trained is narrower.
    """
    leaves, structure = jax.tree.flatten(params)
    dtypes = tuple(jnp.result_type(leaf) for leaf in leaves)
    wide = [
        wide_dtype(dtype) if chosen else dtype
        for dtype, chosen in zip(dtypes, is_trained, strict=True)
    ]
    if all(before == after for before, after in zip(dtypes, wide, strict=True)):
        return apply, params
    masters = [jnp.asarray(leaf, dtype) for leaf, dtype in zip(leaves, wide, strict=True)]
    return _Narrowed(apply, dtypes), jax.tree.unflatten(structure, masters)

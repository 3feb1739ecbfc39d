"""Quantisation: does rounding the weights bring back what a small edit took away?

An edit that moves each weight by less than half a quantisation step is rounded away, and the
model as it is deployed knows what the model as it was audited had forgotten (Zhang et al., arXiv
2410.16454).  Weights alone are rounded, to the nearest of 2^bits levels with one scale for each
output channel (absolute maximum), by qwix; the result is dequantised, so that `apply` runs on it
as on any params.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

BITS = {4: jnp.int4, 8: jnp.int8}


def quantize(
    params: PyTree,
    *,
    bits: int,
    select: str | None = None,
    channel_axes: Callable[[str, Array], tuple[int, ...]] | None = None,
) -> PyTree:
    """Round the weights, and give them back in their own dtype.

    Args:
        params: arrays of two or more axes are rounded, others (biases, gains) are left.
        bits: 4 or 8.
        select: regular expression on parameter paths; None: all matrices. Embeddings are often
            left in full precision when a model is deployed.
        channel_axes: of a path and an array, the axes along which each index has a scale of its
            own; None: the last, which is the output axis of `x @ W`.

    Returns:
        The params, rounded. A second call with the same arguments changes nothing more but by
        rounding of the scale.

    Raises:
        ValueError: another number of bits, or `select` finds no matrix.
        ImportError: the package qwix is not installed.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    qwix, found = _qwix(), 0

    def rounded(path: tuple, leaf: Array) -> Array:
        nonlocal found
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim < 2 or (select is not None and not re.search(select, name)):
            return leaf
        found += 1
        axes = (leaf.ndim - 1,) if channel_axes is None else channel_axes(name, leaf)
        wide = leaf.astype(jnp.float32)
        levels = qwix.quantize(wide, BITS[bits], channelwise_axes=axes)
        # A channel of zeros has no scale to divide by.
        back = jnp.where(wide == 0, 0, qwix.dequantize(levels))
        return back.astype(leaf.dtype)

    made = jax.tree_util.tree_map_with_path(rounded, params)
    if not found:
        raise ValueError(f"select {select!r} finds no array of two or more axes")
    return made


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("jedit.attacks.quantize needs qwix: pip install 'jedit[demo]'") from None
    return qwix

"""Quantisation: does rounding the weights bring back what a small edit took away?

An edit that moves each weight by less than half a quantisation step is rounded away, and the
model as it is deployed knows what the model as it was audited had forgotten (Zhang et al., arXiv
2410.16454).  Weights alone are rounded, to the nearest of 2^bits levels with one scale for each
output channel (absolute maximum), by qwix; the result is dequantised, so that `apply` runs on it
as on any params.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_params
from jedit.core.devices import on_auto_axes
from jedit.core.paths import matcher, parameter_paths

BITS = {4: jnp.int4, 8: jnp.int8}


@on_auto_axes
def quantize(
    params: PyTree,
    *,
    bits: int,
    select: str | None = None,
    channel_axes: Callable[[str, Array], tuple[int, ...]] | None = None,
) -> PyTree:
    """Round the weights to few bits, and give them back in their own dtype.

    Args:
        params: arrays of two or more axes are rounded, others (biases, gains) are left.
        bits: number of bits of an integer, 4 or 8.
        select: regular expression on parameter paths; None: all matrices. Embeddings are often
            left in full precision when a model is deployed.
        channel_axes: a function of a path and an array that returns the axes along which each index
            has a scale of its own; None: the last, which is the output axis of `x @ W`.

    Returns:
        The params, rounded. A second call with the same arguments changes nothing more but by
        rounding of the scale.

    Raises:
        ValueError: another number of bits, or `select` finds no matrix.
        ImportError: the package qwix is not installed.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    check_params(params)
    is_selected = matcher("" if select is None else select, "select")
    qwix = _qwix()

    def is_rounded(name: str, leaf: Array) -> bool:
        return leaf.ndim >= 2 and is_selected(name)

    def axes_of(name: str, leaf: Array) -> tuple[int, ...]:
        return (leaf.ndim - 1,) if channel_axes is None else channel_axes(name, leaf)

    named = parameter_paths(params)
    if not any(is_rounded(*item) for item in named):
        raise ValueError(f"select {select!r} finds no array of two or more axes")
    made = [
        _rounded(leaf, qwix.quantize, qwix.dequantize, bits, tuple(axes_of(name, leaf)))
        if is_rounded(name, leaf)
        else leaf
        for name, leaf in named
    ]
    return jax.tree.unflatten(jax.tree.structure(params), made)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _rounded(
    leaf: Array, quantized: Callable, dequantized: Callable, bits: int, axes: tuple[int, ...]
) -> Array:
    wide = leaf.astype(jnp.float32)
    levels = quantized(wide, BITS[bits], channelwise_axes=axes)
    # A channel of zeros has no scale to divide by.
    return jnp.where(wide == 0, 0, dequantized(levels)).astype(leaf.dtype)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("jedit.attacks.quantize needs qwix: pip install 'jedit[demo]'") from None
    return qwix

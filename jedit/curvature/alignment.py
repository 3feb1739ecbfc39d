"""How a site's positions correspond to the outputs that a batch's masks speak of.

`mask` and `valid` have the outputs' leading shape, (examples,) or (examples, positions, ...). The
positions of a site match it when they begin with that shape, or with its flattening; what follows
(the pixels of a convolution) belongs to the same output. Shapes are all there is to go by: a site
whose axes come in another order, but have these very lengths, is taken for one that matches.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jedit.capture import Site

Alignment = Literal["outputs", "flat", "examples", "none"]


def align(positions: tuple[int, ...], lead: tuple[int, ...]) -> Alignment:
    """What a site's positions begin with: the outputs' leading shape, its flattening, the examples.

    "examples" tells whose gradient is whose, but not padding from data; "none" tells neither.
    """
    if positions[: len(lead)] == lead:
        return "outputs"
    if positions[:1] == (math.prod(lead),):
        return "flat"
    return "examples" if positions[:1] == lead[:1] else "none"


def align_site(site: Site, lead: tuple[int, ...]) -> Alignment:
    """The alignment of a site's positions."""
    output = jax.ShapeDtypeStruct(site.output_shape, site.output_dtype)
    return align(jax.eval_shape(site.canonical_gradients, output).shape[1:-1], lead)


def is_maskable(site: Site, lead: tuple[int, ...]) -> bool:
    """Whether padding in this site can be told from data, or does not matter.

    It does not matter to a site of kind "bias", which has no input: its gradient is the output's,
    and that is zero at a padded position already.
    """
    return site.kind == "bias" or align_site(site, lead) in ("outputs", "flat")


def by_example(x: Array, positions: tuple[int, ...], lead: tuple[int, ...]) -> Array:
    """(layers, positions..., rest...) as (layers, examples, positions, rest...).

    Where examples cannot be told apart, all is one example.
    """
    examples = 1 if align(positions, lead) == "none" else lead[0]
    return x.reshape(x.shape[0], examples, -1, *x.shape[1 + len(positions) :])


def spread(valid: Array, positions: tuple[int, ...]) -> Array | None:
    """`valid` of a site's positions, (1, examples, positions); None where that is unknown."""
    lead = valid.shape
    kind = align(positions, lead)
    if kind not in ("outputs", "flat"):
        return None
    num_leading = len(lead) if kind == "outputs" else 1
    repeats = math.prod(positions[num_leading:])
    each = jnp.broadcast_to(valid.reshape(*lead, 1), (*lead, repeats))
    return each.reshape(1, lead[0], -1)

"""What a batch counts of a model's outputs, and how near two distributions are, digits kept.

A leaf: every folder may use it, and it knows of nothing but `Batch`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from jedit.typing import Batch, PackedTokens, wide_dtype


def counted_outputs(batch: Batch, lead_shape: tuple[int, ...]) -> Bool[Array, "*lead"]:
    """Return which outputs count: those in `mask` that are also `valid`.

    Raises:
        ValueError: if one of the two does not have the outputs' leading shape.
    """
    counted = jnp.ones(lead_shape, bool)
    for name, given in (("mask", batch.mask), ("valid", batch.valid)):
        if given is None:
            continue
        if given.shape != lead_shape:
            raise ValueError(
                f"batch.{name} has shape {given.shape}, but the outputs' leading shape is "
                f"{lead_shape}; give one entry per output"
            )
        counted &= given.astype(bool)
    return counted


def by_example(batch: Batch, values: Array) -> Array:
    """Return the outputs' values with each example's on one axis, (batch, outputs of an example).

    Raises:
        ValueError: if the batch is packed, so that what leads are not examples.
    """
    if isinstance(batch.inputs, PackedTokens):
        raise ValueError(
            "this looks at each example by itself, and a packed batch has several in one sequence; "
            "give it the padded rows that were packed"
        )
    return values.reshape(values.shape[0], -1)


def wide(x: Array) -> Array:
    """Return `x` in float32, or in its own dtype if that is wider."""
    return x.astype(wide_dtype(x.dtype))


def kl_terms(log_p: Array, log_q: Array) -> Array:
    """Return terms that sum to KL(p || q) over a whole distribution, none of them negative.

    For p close to q, p log(p / q) sums to something tiny out of large terms of both signs.  Since p
    and q both sum to one, q - p may be added to each term, which then is of second order itself.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # A class that p excludes contributes the q it holds; a class that q excludes, infinity.
    d = jnp.where(p > 0, log_p - log_q, 0)
    is_near = jnp.abs(d) < 0.5
    d_near = jnp.where(is_near, d, 0)
    near = p * (jnp.expm1(-d_near) + d_near)
    far = (q - p) + p * d
    return jnp.where(is_near & (p > 0), near, far)

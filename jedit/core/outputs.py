"""What a batch counts of a model's outputs, and how near two distributions are, digits kept.

A leaf: every folder may use it, and it knows of nothing but `Batch` and how to check.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jedit.core.batch import Batch, PackedTokens
from jedit.core.checks import example, is_known

Limits = tuple[float | int, float | int]  # the lowest label and the highest


def counted_outputs(batch: Batch, lead_shape: tuple[int, ...]) -> Bool[Array, "*lead"]:
    """Return which outputs count: those in `mask` that are also `valid`.

    Raises:
        ValueError: `mask` or `valid` does not have the outputs' leading shape.
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


def check_contents(
    batch: Batch,
    name: str,
    *,
    limits: Limits | None = None,
    must_count: bool = True,
) -> bool:
    """Refuse a batch that means nothing, as far as it is known: what is traced passes.

    For the functions that users enter by; a `Batch` itself is built under transformations too.

    Args:
        batch: a batch of rows, or of several sets of rows stacked.
        name: what the message calls the batch.
        limits: the lowest and the highest label; None: labels are not looked at. Those of outputs
            that do not count may be anything.
        must_count: a batch that counts no output, or has no rows, is refused.

    Returns:
        Whether an output counts, or may, where that is not known.

    Raises:
        ValueError: a mask holds something but 0 and 1, a label is out of its limits, or nothing
            is counted.
    """
    counted: np.ndarray | bool = True
    for field in ("mask", "valid"):
        given = getattr(batch, field)
        if given is None:
            continue
        if not is_known(given):
            return True
        values = np.asarray(given)
        is_flag = (values == 0) | (values == 1)
        if not is_flag.all():
            raise ValueError(
                f"{name}: {field} must hold 0 and 1, where an output counts or not; got "
                f"{example(values, is_flag)}"
            )
        counted = counted & (values != 0)
    sizes = [np.shape(leaf)[:1] for leaf in jax.tree.leaves((batch.inputs, batch.targets))]
    is_something = bool(np.any(counted)) and (0,) not in sizes
    if must_count and not is_something:
        raise ValueError(
            f"{name} counts no output: it has no rows, or mask and valid leave out all. There is "
            "nothing to be computed from it"
        )
    if limits is None or not is_known(batch.targets):
        return is_something
    labels = np.asarray(batch.targets)
    where = np.asarray(counted)
    if labels.shape[: where.ndim] != where.shape:
        return is_something  # refused where the outputs' shape is known
    where = where.reshape(*where.shape, *(1,) * (labels.ndim - where.ndim))
    is_label = ((labels >= limits[0]) & (labels <= limits[1])) | ~where
    if not is_label.all():
        most = f"to {limits[1]:g}" if limits[1] < np.inf else "on"
        raise ValueError(
            f"{name}: labels that count must be from {limits[0]:g} {most}; got "
            f"{example(labels, is_label)}. What is no label stands where mask is 0"
        )
    return is_something


def check_sets(sets: Mapping[str, Any]) -> None:
    """Refuse sets of rows that count no output, with masks that are none, or labels below zero.

    Args:
        sets: by name; batches, trees of batches, or of other arrays, which are not looked at.

    Raises:
        ValueError: a set is refused as a batch is by `check_contents`.
    """
    for name, rows in sets.items():
        for batch in jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, Batch)):
            if not isinstance(batch, Batch):
                continue
            labels = batch.targets
            is_class = labels is not None and jnp.issubdtype(jnp.result_type(labels), jnp.integer)
            check_contents(batch, name, limits=(0, math.inf) if is_class else None)


def by_example(batch: Batch, values: Array) -> Array:
    """Return the outputs' values with each example's on one axis, (batch, outputs of an example).

    Raises:
        ValueError: the batch is packed, so that what leads are not examples.
    """
    if isinstance(batch.inputs, PackedTokens):
        raise ValueError(
            "this looks at each example by itself, and a packed batch has several in one sequence; "
            "give it the padded rows that were packed"
        )
    return values.reshape(values.shape[0], -1)


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

"""Curvatures whose matrices are kept in the host's memory."""

import dataclasses

import jax
from jaxtyping import Array

from jedit.core.devices import fetched
from jedit.curvature.types import Curvature, Factor, Kronecker


def to_host(curvature: Curvature) -> Curvature:
    """The curvature with its matrices in the host's pinned memory, each split as before.

    `solve`, `matvec`, `power`, `quadratic_form`, `trace` and `ekfac` fetch what they need, block by
    block; `batch_unlearn` fetches all of it; anything else needs `to_device` first.
    """

    def move(x: Array) -> Array:
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    return _moved(curvature, move)


def to_device(curvature: Curvature) -> Curvature:
    """The reverse."""
    return _moved(curvature, fetched)


def _moved(curvature: Curvature, move) -> Curvature:
    factors = {
        name: f if f.basis is None else Factor(move(f.matrix), move(f.basis), f.eigenvalues)
        for name, f in curvature.factors.items()
    }
    blocks = {
        name: dataclasses.replace(b, corrected=move(b.corrected))
        if isinstance(b, Kronecker) and b.corrected is not None
        else b
        for name, b in curvature.blocks.items()
    }
    return Curvature(blocks, factors, curvature.num_outputs)

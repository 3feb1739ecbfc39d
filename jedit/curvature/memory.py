"""What to do where memory is short: parameters in groups, matrices in the host's memory.

A group's sums fit on a device, and it has a pass over the batches of its own. What shares a sum
stays together: sites that read one input, and blocks of one parameter.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree

from jedit.core.checks import COUNT, check_numbers
from jedit.core.devices import fetched
from jedit.curvature.types import Curvature, Factor, Kronecker


class Footprint(NamedTuple):
    """What one block takes of a device.

    Attributes:
        paths: its parameters.
        sums: bytes on a device of each sum it adds to; blocks may share one, under one name.
    """

    paths: tuple[str, ...]
    sums: Mapping[str, int]


def device_bytes(shapes: PyTree, places: PyTree | None) -> PyTree:
    """Bytes of every array on one of the devices that share it."""
    if places is None:
        return jax.tree.map(lambda x: math.prod(x.shape) * x.dtype.itemsize, shapes)
    return jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, shapes, places
    )


def group_paths(needs: Iterable[Footprint], group_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Parameters of each group, in order; what cannot be parted may be larger than the limit.

    Raises:
        ValueError: a limit below one.
    """
    check_numbers(COUNT, group_bytes=group_bytes)
    units: list[Footprint] = []
    for need in needs:
        mine = [u for u in units if set(u.paths) & set(need.paths) or set(u.sums) & set(need.sums)]
        paths = dict.fromkeys(p for u in (*mine, need) for p in u.paths)
        sums = {k: size for u in (*mine, need) for k, size in u.sums.items()}
        joined = Footprint(tuple(paths), sums)
        where = units.index(mine[0]) if mine else len(units)
        units = [u for u in units if u not in mine]
        units.insert(where, joined)
    groups: list[list[str]] = []
    filled = 0
    for unit in units:
        size = sum(unit.sums.values())
        if not groups or filled + size > group_bytes:
            groups.append([])
            filled = 0
        groups[-1] += unit.paths
        filled += size
    return tuple(map(tuple, groups))


def to_host(curvature: Curvature) -> Curvature:
    """The curvature with its matrices in the host's pinned memory, each split as before.

    `solve`, `matvec`, `power`, `quadratic_form`, `trace` and `ekfac` fetch what they need, block by
    block; `batch_unlearn` fetches all of it; anything else needs `to_device` first.
    """

    def move(x: Array) -> Array:
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    return _moved(curvature, move)


def to_device(curvature: Curvature) -> Curvature:
    """The curvature with its matrices back in the memory of the devices, as `to_host` took them."""
    return _moved(curvature, fetched)


def _moved(curvature: Curvature, move: Callable[[Array], Array]) -> Curvature:
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

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
from jedit.core.devices import fetched, offloaded
from jedit.curvature.types import Curvature, Factor, Kronecker


class Footprint(NamedTuple):
    """The memory of a device that the sums of one block take.

    Attributes:
        paths: the block's parameters.
        sums: bytes on a device of each sum it adds to; blocks may share one, under one name.
    """

    paths: tuple[str, ...]
    sums: Mapping[str, int]


def device_bytes(shapes: PyTree, places: PyTree | None) -> PyTree:
    """Return the bytes of every array on one of the devices that share it."""
    if places is None:
        return jax.tree.map(lambda x: math.prod(x.shape) * x.dtype.itemsize, shapes)
    return jax.tree.map(
        lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, shapes, places
    )


def group_paths(needs: Iterable[Footprint], group_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Return the parameters of each group, in order.

    A group that cannot be parted may be larger than the limit.

    Raises:
        ValueError: the limit is below one.
    """
    check_numbers(COUNT, group_bytes=group_bytes)
    units: list[Footprint] = []
    for need in needs:
        # What shares a sum or a parameter with this block is joined to it, and with one another.
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
    """Return the curvature with its matrices in the host's pinned memory, each split as before.

    `solve`, `matvec`, `power`, `quadratic_form`, `trace` and `ekfac` fetch what they need, block by
    block. `inverted`, and with it `kfade`, inverts factors without eigenvectors one by one, and
    keeps the inverses in the host's memory too. `batch_unlearn` and an optimizer's state
    (`scale_by_curvature`, `natural_steps`) fetch all of it; anything else needs `to_device` first.
    """
    return _moved(curvature, offloaded)


def to_device(curvature: Curvature) -> Curvature:
    """Return the curvature with its matrices back in the devices' memory, undoing `to_host`."""
    return _moved(curvature, fetched)


def _moved(curvature: Curvature, move: Callable[[Array], Array]) -> Curvature:
    factors = {
        name: f if f.form == "diagonal" else _factor_moved(f, move)
        for name, f in curvature.factors.items()
    }
    blocks = {
        name: dataclasses.replace(b, corrected=move(b.corrected))
        if isinstance(b, Kronecker) and b.corrected is not None
        else b
        for name, b in curvature.blocks.items()
    }
    return Curvature(blocks, factors, curvature.num_outputs)


def _factor_moved(factor: Factor, move: Callable[[Array], Array]) -> Factor:
    large = {
        field: move(value)
        for field in ("matrix", "basis")
        if (value := getattr(factor, field)) is not None
    }
    return dataclasses.replace(factor, **large)

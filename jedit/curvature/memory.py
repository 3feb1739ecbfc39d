"""Parameters in groups whose sums fit on a device, one pass over the batches for each.

What shares a sum stays together: sites that read one input, and blocks of one parameter.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from jedit.core.checks import COUNT, check_numbers


class Need(NamedTuple):
    """What one block needs.

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


def group_paths(needs: Iterable[Need], group_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Parameters of each group, in order; what cannot be parted may be larger than the limit.

    Raises:
        ValueError: a limit below one.
    """
    check_numbers(COUNT, group_bytes=group_bytes)
    units: list[Need] = []
    for need in needs:
        mine = [u for u in units if set(u.paths) & set(need.paths) or set(u.sums) & set(need.sums)]
        paths = dict.fromkeys(p for u in (*mine, need) for p in u.paths)
        sums = {k: size for u in (*mine, need) for k, size in u.sums.items()}
        joined = Need(tuple(paths), sums)
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


def exactly(paths: Iterable[str]) -> list[str]:
    """The `select` that names these parameters and no others."""
    return [f"^{re.escape(path)}$" for path in paths]

"""On which devices arrays lie: read off the arrays, and held to.

Everything jedit computes is one program for one device or for a mesh: XLA splits the work after
the shardings of what it is given. What is read here is handed to jitted functions as static
arguments, so that what comes out lies as what went in.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

Axes = tuple[str, ...]  # mesh axes that one dimension is split over


def axes_of(entry: Any) -> Axes:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(*split: Axes) -> PartitionSpec:
    """The reverse, for all dimensions."""
    return PartitionSpec(*(axes or None for axes in split))


def sharding_of(x: Any) -> NamedSharding | None:
    """An array's sharding over several devices.

    None when it is traced, or on one device, or on a mesh of explicit axes, where JAX itself says
    what lies where.
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    return None if _is_explicit(sharding) else sharding


def refuse_explicit(tree: PyTree) -> None:
    """Refuse parameters on a mesh whose axes are explicit.

    Raises:
        ValueError: they are.
    """
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and _is_explicit(sharding):
            raise ValueError(
                "jedit computes on meshes whose axes are Auto, so that XLA places what is in "
                f"between; got {sharding.mesh}. Make it by jax.make_mesh(shape, names, "
                "axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
            )


def _is_explicit(sharding: NamedSharding) -> bool:
    return any(kind != AxisType.Auto for kind in sharding.mesh.axis_types)


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """Rows of data that several devices share; hashable.

    Attributes:
        mesh: of the devices.
        axes: that the rows are split over.
    """

    mesh: Mesh | AbstractMesh
    axes: Axes

    @property
    def num_devices_along(self) -> int:
        """Into how many pieces the rows are cut."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    def at(self, axis: int) -> NamedSharding:
        """Of an array whose rows are this axis."""
        return NamedSharding(self.mesh, spec_of(*((),) * axis, self.axes))


def row_sharding(rows: PyTree) -> RowSharding | None:
    """How the leading axis of all leaves lies; None when it is not split, or not alike."""
    found = set()
    for leaf in jax.tree.leaves(rows):
        sharding = sharding_of(leaf)
        axes = axes_of(sharding.spec[0]) if sharding is not None and len(sharding.spec) else ()
        found.add(RowSharding(sharding.mesh, axes) if sharding is not None and axes else None)
    return found.pop() if len(found) == 1 else None


def split_rows(rows: PyTree, over: RowSharding | None) -> PyTree:
    """Rows of such a set, split as it is; under jit."""
    if over is None:
        return rows
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, over.at(0)), rows)


def places_of(tree: PyTree) -> tuple[NamedSharding | None, ...] | None:
    """The shardings of a tree's leaves, hashable; None when no leaf is on several devices."""
    found = tuple(sharding_of(x) for x in jax.tree.leaves(tree))
    return found if any(found) else None


def kept(tree: PyTree, places: tuple[NamedSharding | None, ...] | None) -> PyTree:
    """The tree with its leaves held to these places, under jit."""
    if places is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    held = [
        x if place is None else jax.lax.with_sharding_constraint(x, place)
        for x, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, held)


def fetched(x: Array) -> Array:
    """The array in the device's memory, if it is in the host's."""
    space = getattr(jax.typeof(x), "memory_space", None)
    if space != jax.memory.Space.Host:
        return x
    return jax.device_put(x, jax.memory.Space.Device)

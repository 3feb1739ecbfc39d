"""On which devices arrays lie: read off the arrays, and held to.

Everything jedit computes is one program for one device or for a mesh: XLA splits the work after
the shardings of what it is given. What is read here is handed to jitted functions as static
arguments, so that what comes out lies as what went in.

Inside jedit a mesh's axes are of the type Auto: XLA places what is in between. Arrays on a mesh
with explicit axes, whose types say how they lie, come in as the same buffers on the same mesh with
Auto axes, and what goes out is on theirs again (`on_auto_axes`).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

Function = TypeVar("Function", bound=Callable)
MeshAxes = tuple[str, ...]  # mesh axes that one dimension is split over


def axes_of(entry: Any) -> MeshAxes:
    """Return the mesh axes in one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(*split: MeshAxes) -> PartitionSpec:
    """Return the `PartitionSpec` that splits each dimension over these mesh axes."""
    return PartitionSpec(*(axes or None for axes in split))


def sharding_of(x: Any) -> NamedSharding | None:
    """Return the sharding over several devices of an array, or of a shape that says where it lies.

    It is None when the array is traced, or on one device.
    """
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct) or isinstance(x, Tracer):
        return None
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        return None
    return sharding


def on_auto_axes(function: Function) -> Function:
    """Let a function take arguments on a mesh with explicit axes too, or run in their context.

    Its body sees arrays and the context with Auto axes. What it returns lies on the explicit mesh
    again: as it came out, and under a trace as the argument that is shaped like it, or whole. What
    the callback in a keyword argument `watch` is given lies there too. Where the caller works with
    Auto axes himself, results stay on Auto axes.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        context = jax.sharding.get_abstract_mesh()
        mesh = _explicit_mesh((args, kwargs), context)
        if mesh is None:
            return function(*args, **kwargs)
        watch = kwargs.get("watch")
        if watch is not None and watch.callback is not None:
            callback = _called_outside(watch.callback, mesh, context)
            kwargs["watch"] = watch._replace(callback=callback)
        # A traced array's type names its mesh, and the context must name the same one; concrete
        # arrays need no context, and computing on one device inside one would be refused.
        is_traced = any(isinstance(x, Tracer) for x in _leaves((args, kwargs)))
        inside_args, inside_kwargs = on_auto((args, kwargs))
        with _within(_auto(mesh) if is_traced or context.axis_names else None):
            found = function(*inside_args, **inside_kwargs)
        if _is_inside((args, kwargs), context):
            return found
        return _on_explicit(found, mesh, [*args, args[:2]])

    return run  # type: ignore[return-value]


def on_auto(tree: PyTree) -> PyTree:
    """Return the tree with arrays on explicit meshes put on the same meshes with Auto axes."""

    def moved(x: Any) -> Any:
        sharding = _typed_sharding(x)
        if sharding is None or not _is_explicit(sharding.mesh):
            return x
        auto = _auto(sharding.mesh)
        # Under a trace there are no buffers to rename, so the type is changed by a reshard; Auto
        # axes have no place in a type, so that its spec is all None.
        if isinstance(x, Tracer):
            return _retyped(x, NamedSharding(auto, PartitionSpec(*(None,) * x.ndim)))
        return _renamed(x, auto)

    return jax.tree.map(moved, tree, is_leaf=_is_iterator)


def typed_like(x: Any, like: Any) -> Any:
    """Return a traced array with the explicit axes of another of its shape; without such, as it is.

    A model inside `jax.sharding.explicit_axes` is a stretch of explicit axes in jedit's programs.
    """
    sharding = _typed_sharding(like)
    if not isinstance(like, Tracer) or sharding is None or not _is_explicit(sharding.mesh):
        return x
    return jax.sharding.reshard(x, sharding)


def no_mesh() -> contextlib.AbstractContextManager:
    """Return a context of no mesh, for what is computed on one of its devices alone."""
    if not jax.sharding.get_abstract_mesh().axis_names:
        return contextlib.nullcontext()
    # A mesh of no axes: JAX has no context manager that takes a mesh away.
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def _called_outside(callback: Callable, mesh: Any, context: AbstractMesh) -> Callable:
    """Return the callback as one that runs in the caller's context and sees its mesh."""

    def called(*given):
        with _within(context if context.axis_names else None):
            return callback(*_on_explicit(given, mesh, []))

    return called


def _on_explicit(tree: PyTree, mesh: Any, references: list) -> PyTree:
    """Put what was computed with Auto axes on the mesh with explicit axes that it came from."""

    def shapes(tree):
        structure = jax.tree.structure(tree, is_leaf=_is_iterator)
        return structure, [getattr(x, "shape", None) for x in _leaves(tree)]

    # A traced result has lost its explicit spec; an argument of the same shapes tells it. Without
    # one the result is typed like itself, which is whole.
    like = next((other for other in references if shapes(other) == shapes(tree)), tree)

    def moved(x: Any, y: Any) -> Any:
        if isinstance(x, Tracer):
            given = _typed_sharding(y)
            is_known = given is not None and _is_explicit(given.mesh)
            spec = given.spec if given is not None and is_known else PartitionSpec()
            return _retyped(x, NamedSharding(mesh.abstract_mesh, spec))
        sharding = _typed_sharding(x)
        if sharding is None or sharding.mesh.axis_names != mesh.axis_names:
            return x
        return _renamed(x, sharding.mesh.update(axis_types=mesh.axis_types))

    return jax.tree.map(moved, tree, like)


def _retyped(x: Tracer, sharding: NamedSharding) -> Any:
    with _within(sharding.mesh.abstract_mesh):
        return jax.sharding.reshard(x, sharding)


def _renamed(x: Any, mesh: Any) -> Any:
    """Return an array of the same buffers on a mesh of the same devices; nothing is copied."""
    old = x.sharding
    new = NamedSharding(mesh, old.spec, memory_kind=old.memory_kind)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=new)
    # Keys cannot be assembled from shards: their raw words can.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _renamed(jax.random.key_data(x), mesh)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, new, shards)


def _typed_sharding(x: Any) -> NamedSharding | None:
    """Return the sharding of an array, traced or not, or of a shape."""
    if not isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def _explicit_mesh(tree: PyTree, context: AbstractMesh) -> Mesh | AbstractMesh | None:
    """Return the first mesh with explicit axes that something lies on, or that of the context."""
    for x in _leaves(tree):
        sharding = _typed_sharding(x)
        if sharding is not None and _is_explicit(sharding.mesh):
            return sharding.mesh
    return context if _is_explicit(context) else None


def _is_iterator(x: Any) -> bool:
    """Say whether this is an iterator (of batches, say), which JAX must not look into."""
    return isinstance(x, Iterator)


def _leaves(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_iterator)


def _is_inside(tree: PyTree, context: AbstractMesh) -> bool:
    """Say whether the caller itself works with Auto axes, beside arrays on explicit ones."""
    shardings = [_typed_sharding(x) for x in _leaves(tree)]
    meshes = [context, *(s.mesh for s in shardings if s is not None)]
    return any(mesh.axis_names and not _is_explicit(mesh) for mesh in meshes)


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def _auto(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _within(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager:
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """A split of rows of data over several devices, as a hashable value.

    Attributes:
        mesh: the mesh of the devices that share the rows.
        axes: the mesh axes that the rows are split over.
    """

    mesh: Mesh | AbstractMesh
    axes: MeshAxes

    @property
    def num_devices_along(self) -> int:
        """Return the number of pieces that the rows are cut into."""
        return math.prod(self.mesh.shape[a] for a in self.axes)

    def at(self, axis: int) -> NamedSharding:
        """Return the sharding of an array whose rows lie along this axis."""
        return NamedSharding(self.mesh, spec_of(*((),) * axis, self.axes))


def row_sharding(rows: PyTree) -> RowSharding | None:
    """Return how the leading axis of all leaves lies; None when it is not split, or not alike."""
    found = set()
    for leaf in jax.tree.leaves(rows):
        sharding = sharding_of(leaf)
        axes = axes_of(sharding.spec[0]) if sharding is not None and len(sharding.spec) else ()
        found.add(RowSharding(sharding.mesh, axes) if sharding is not None and axes else None)
    return found.pop() if len(found) == 1 else None


def split_rows(rows: PyTree, over: RowSharding | None) -> PyTree:
    """Hold the rows to the split of the set that they were taken from, under jit."""
    if over is None:
        return rows
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, over.at(0)), rows)


def places_of(tree: PyTree) -> tuple[NamedSharding | None, ...] | None:
    """Return the shardings of a tree's leaves, hashable.

    It returns None when no leaf is on several devices.
    """
    found = tuple(sharding_of(x) for x in jax.tree.leaves(tree))
    return found if any(found) else None


def kept(tree: PyTree, places: tuple[NamedSharding | None, ...] | None) -> PyTree:
    """Return the tree with its leaves held to these places, under jit."""
    if places is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    held = [
        x if place is None else jax.lax.with_sharding_constraint(x, place)
        for x, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(treedef, held)


def is_on_host(x: Array) -> bool:
    """Say whether an array, traced or not, lies in the host's pinned memory."""
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host


def fetched(x: Array) -> Array:
    """Return the array in the device's memory, if it is in the host's."""
    return jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x


def offloaded(x: Array) -> Array:
    """Return the array in the host's pinned memory, split over the devices as before."""
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

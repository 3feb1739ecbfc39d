"""Where sums, factors and eigenbases lie when the parameters lie on a mesh.

A parameter's matrix (layers, d_in, d_out) keeps the mesh axes that its leaf is split over; A
and G are split over all of them, each along one side:

    W  P(l, i, o)   =>   A, Q_A  P(l, (i, o), None)   G, Q_G  P(l, (o, i), None)   Λ  P(l, i, o)

An axis that the devices do not divide evenly (d_in and one for the bias, say) is not split. Meshes
are read off the arrays themselves; on one device nothing here does anything.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jedit.core.devices import MeshAxes, axes_of, no_mesh, sharding_of, spec_of
from jedit.core.paths import parameter_paths
from jedit.curvature.types import Curvature, Kronecker
from jedit.tracing.sites import Weight


def leaf_shardings(params: PyTree) -> dict[str, NamedSharding]:
    """Return, by path, the sharding of every parameter that lies on a mesh of several devices."""
    found = {path: sharding_of(leaf) for path, leaf in parameter_paths(params)}
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def matrix_sharding(
    weight: Weight, leaves: Mapping[str, NamedSharding], *, is_flipped: bool = False
) -> NamedSharding | None:
    """Return how a parameter's matrix (layers, d_in, d_out), or its transpose, lies on its mesh.

    Axes of the leaf are followed through its relayouts; one that is cut, or whose devices do not
    divide what it becomes, is lost: the matrix is whole along it. None says that it lies on one
    device.
    """
    sharding = leaves.get(weight.path)
    if sharding is None:
        return None
    spec = [axes_of(entry) for entry in sharding.spec]
    spec += [()] * (len(weight.shape) - len(spec))
    dims = list(zip(weight.shape, spec, strict=True))
    num_layers = 0
    for name, *arguments in weight.ops:
        # A scan's slice puts a layer axis in front; the later relayouts see only what is behind it.
        rest = dims[num_layers:]
        if name == "layer":
            num_layers += 1
            continue
        if name == "transpose":
            rest = [rest[i] for i in arguments[0]]
        elif name == "reshape":
            rest = _reshaped(rest, arguments[0], sharding.mesh)
        else:
            starts, limits, strides = (arguments[k] for k in range(3))
            rest = [
                (n, axes)
                if (start, limit, step or 1) == (0, n, 1)
                else (-(-(limit - start) // (step or 1)), ())
                for (n, axes), start, limit, step in zip(
                    rest, starts, limits, strides or (1,) * len(rest), strict=True
                )
            ]
        dims = dims[:num_layers] + rest
    shape = (weight.layers, weight.d_in, weight.d_out)
    layers, rows, columns = (axes for _, axes in _reshaped(dims, shape, sharding.mesh))
    split = (layers, columns, rows) if is_flipped else (layers, rows, columns)
    return NamedSharding(sharding.mesh, spec_of(*split)) if any(split) else None


def _reshaped(
    dims: list[tuple[int, MeshAxes]], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> list[tuple[int, MeshAxes]]:
    """Follow axes through a reshape: a run's first dimension gives its axes to the first made."""
    found: list[tuple[int, MeshAxes]] = []
    # Dimensions are matched in runs of equal product, row-major; only the first of a run can stay
    # split, as the pieces of a later one do not lie together in memory.
    queue = [d for d in dims if d[0] != 1]
    new = 0
    while new < len(shape):
        if shape[new] == 1:
            found.append((1, ()))
            new += 1
            continue
        size, axes = queue.pop(0)
        made = [shape[new]]
        new += 1
        while size != math.prod(made):
            if size < math.prod(made):
                size *= queue.pop(0)[0]
            else:
                made.append(shape[new])
                new += 1
        parts = math.prod(mesh.shape[a] for a in axes)
        found.append((made[0], axes if made[0] % parts == 0 else ()))
        found += [(n, ()) for n in made[1:]]
    return found


def even(sharding: NamedSharding, shape: tuple[int, ...], *dims: int | None) -> NamedSharding:
    """Return the sharding for an array whose dimensions are those `dims` of it; None: a whole one.

    A dimension that the devices do not divide is whole too, and so is one whose axes came before.
    """
    spec = [axes_of(entry) for entry in sharding.spec] + [()] * 3
    split: list[MeshAxes] = []
    for size, dim in zip(shape, dims, strict=True):
        axes = () if dim is None else spec[dim]
        axes = tuple(a for a in axes if not any(a in before for before in split))
        parts = math.prod(sharding.mesh.shape[a] for a in axes)
        split.append(axes if size % parts == 0 else ())
    return NamedSharding(sharding.mesh, spec_of(*split))


def along(sharding: NamedSharding, dim: int) -> NamedSharding:
    """Return all the axes that rows and columns are split over, on one of the two: 1 or 2.

    Its own come first: getting there from `sharding`, and back, is one all-to-all.
    """
    layers, *sides = ([axes_of(e) for e in sharding.spec] + [()] * 3)[:3]
    split = [layers, (), ()]
    split[dim] = sides[dim - 1] + sides[2 - dim]
    return NamedSharding(sharding.mesh, spec_of(*split))


def best_split(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return how to split an array like the matrix whose rows a bias makes odd: the smaller pieces.

    It is split as the matrix is, or by columns: arrays between programs have pieces of equal size.
    """
    by_columns = along(sharding, 2)
    found = [even(place, shape, 0, 1, 2) for place in (sharding, by_columns)]
    return min(found, key=lambda place: math.prod(place.shard_shape(shape)))


def factor_place(sharding: NamedSharding, shape: tuple[int, ...], dim: int) -> NamedSharding:
    """Return where A (dim 1) or G (dim 2) of such a matrix lies, (layers, d, d) or (layers, d)."""
    dims = (0, dim, None)[: len(shape)]
    # Over all axes if the devices divide the side, else over its own; the smaller piece wins.
    found = [even(place, shape, *dims) for place in (along(sharding, dim), sharding)]
    return min(found, key=lambda place: math.prod(place.shard_shape(shape)))


def num_pieces(sharding: NamedSharding) -> int:
    """Return into how many pieces a matrix is cut along `along`."""
    axes = [a for e in sharding.spec[1:] for a in axes_of(e)]
    return math.prod(sharding.mesh.shape[a] for a in axes)


def without(sharding: NamedSharding, axes: MeshAxes) -> NamedSharding | None:
    """Return the sharding without some axes; None when nothing is left."""
    split = [tuple(a for a in axes_of(e) if a not in axes) for e in sharding.spec]
    return NamedSharding(sharding.mesh, spec_of(*split)) if any(split) else None


def off_axes(curvature: Curvature, axes: tuple[str, ...]) -> Curvature:
    """Return the curvature for use where something else is split over these axes of its mesh."""
    placed = block_shardings(curvature)
    return with_shardings(curvature, {name: without(x, axes) for name, x in placed.items()})


def block_shardings(curvature: Curvature) -> dict[str, NamedSharding]:
    """Return how the blocks' matrices lie, of those that are on a mesh."""
    found = {n: b.sharding for n, b in curvature.blocks.items() if isinstance(b, Kronecker)}
    return {name: sharding for name, sharding in found.items() if sharding is not None}


def with_shardings(
    curvature: Curvature, shardings: Mapping[str, NamedSharding | None]
) -> Curvature:
    """Return the curvature with other statements of how its blocks' matrices lie.

    Blocks that `shardings` does not name get None, one device.
    """
    blocks = {
        name: dataclasses.replace(b, sharding=shardings.get(name))
        if isinstance(b, Kronecker)
        else b
        for name, b in curvature.blocks.items()
    }
    return Curvature(blocks, curvature.factors, curvature.num_outputs)


def whole(sharding: NamedSharding) -> NamedSharding:
    """Return the sharding of which every device holds a whole copy."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def undivided(tree: PyTree, leaves: Mapping[str, NamedSharding]) -> PyTree:
    """Return a tree of shardings, all of them whole copies on the parameters' mesh."""
    everywhere = whole(next(iter(leaves.values())))
    return jax.tree.map(lambda _: everywhere, tree)


def placed(shapes: PyTree, places: PyTree | None) -> PyTree:
    """Return shapes that say where they lie; None: as they are, on one device."""
    if places is None:
        return shapes
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def placed_curvature(curvature: Curvature) -> Curvature:
    """Return the shapes of a curvature, each with where `estimate` puts it."""
    sides = {}
    for block in curvature.blocks.values():
        if isinstance(block, Kronecker) and block.sharding is not None:
            sides |= {block.input: (block.sharding, 1), block.output: (block.sharding, 2)}
    if not sides:
        return curvature
    places = jax.tree.map(lambda _: whole(next(iter(sides.values()))[0]), curvature)
    factors = dict(places.factors)
    for name, (sharding, dim) in sides.items():
        factor = curvature.factors[name]
        # A basis lies as its matrix does; one of leading eigenvectors alone is split as far as
        # its rows go.
        changes = {
            field: factor_place(sharding, value.shape, dim)
            for field in ("matrix", "basis")
            if (value := getattr(factor, field)) is not None
        }
        factors[name] = dataclasses.replace(factors[name], **changes)
    places = Curvature(places.blocks, factors, places.num_outputs)
    return placed(curvature, places)


def zeros(shapes: PyTree, places: PyTree | None) -> PyTree:
    """Return zeros of given shapes, made where they belong.

    Where `places` is None they lie on the default device.
    """
    if places is None:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    specs, treedef = jax.tree.flatten(shapes)
    given = tuple((x.shape, jnp.dtype(x.dtype)) for x in specs)
    return jax.tree.unflatten(treedef, _zeros(given, tuple(jax.tree.leaves(places))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(specs: tuple, places: tuple[NamedSharding, ...]) -> list[Array]:
    keep = jax.lax.with_sharding_constraint
    return [keep(jnp.zeros(*spec), place) for spec, place in zip(specs, places, strict=True)]


def devices_of(sharding: NamedSharding) -> list[Any]:
    """Return all devices of an array's mesh, in the mesh's order."""
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)  # an array's is never abstract
    return list(np.asarray(mesh.devices).flat)


def from_owner(
    x: Array | None, like: jax.ShapeDtypeStruct, owner: Any, place: NamedSharding
) -> Array:
    """Give all of a mesh what one of its devices holds; None where another process holds it.

    It travels as a sum over the devices, of zeros but for the owner's: exact, and a collective for
    which nobody needs to see the others' memory.
    """
    devices = devices_of(place)
    # A flat mesh of one axis, whatever the parameters' mesh is: one row of the sum for a device.
    by_device = NamedSharding(Mesh(np.asarray(devices), ("device",)), PartitionSpec("device"))
    with no_mesh():
        own = [device for device in devices if device.process_index == jax.process_index()]
        shards = [
            jax.device_put(
                jnp.zeros((1, *like.shape), like.dtype)
                if x is None or device != owner
                else jnp.asarray(x)[None],
                device,
            )
            for device in own
        ]
        full = (len(devices), *like.shape)
        one = jax.make_array_from_single_device_arrays(full, by_device, shards)
        # Waited for: what follows may call LAPACK on a CPU that is one of the devices.
        return jax.block_until_ready(_sum_devices(one, place))


@functools.partial(jax.jit, static_argnums=1)
def _sum_devices(x: Array, place: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), place)

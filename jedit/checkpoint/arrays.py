"""Arrays in a folder: the bytes of each in a file of its own, `arrays/0`, `arrays/1`, ...

A file is the array's memory, row by row, and nothing else: no header, so that there is nothing in
it to be parsed or to be believed. Dtype and shape stand in the manifest of the sealed folder
around it (see `sealed`), whose hash covers the bytes. An array without elements has no file.
"""

import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jedit.checkpoint.sealed import DamagedError, shown, walk
from jedit.core.devices import axes_of, is_on_host, no_mesh, on_auto

ARRAYS = "arrays"
BLOCK_BYTES = 2**26  # of an array on devices, at a time: what is written, or hashed by several
DTYPES = {
    str(jnp.dtype(x))
    for x in (
        *(jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.int64),
        *(jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64),
        *(jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128),
    )
}


def write_parts(folder: Path, arrays: Sequence[Array | np.ndarray]) -> list[int]:
    """Write the parts of arrays that are this process's to write to `folder/arrays`.

    They are written bit by bit as they are, each part once: of what lies on several devices of
    several processes the parts on its own devices, and in the first process also what each process
    has for itself.

    Returns:
        How many elements of each array were written, and are on the disk.

    Raises:
        OSError: the disk is full, or refuses for another reason.
    """
    counts = []
    for i, array in enumerate(arrays):
        counts.append(0)
        if not array.size:
            continue
        path, handle = folder / ARRAYS / str(i), None
        try:
            # One after the other: of a large state some of one array is on the host.
            for index, part in _own_parts(array):
                if handle is None:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                    handle = os.open(path, flags, 0o600)
                _write_part(handle, index, part, array.shape)
                counts[-1] += part.size
            if handle is not None:
                os.fsync(handle)
        except OSError as error:
            sentence = f"{error.strerror}, so that nothing was saved"
            raise OSError(error.errno, sentence, str(path)) from None
        finally:
            if handle is not None:
                os.close(handle)
    return counts


def _own_parts(array: Array | np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Give what is this process's to write.

    Yields:
        Where it lies in the array, and what it is.
    """
    is_first = jax.process_index() == 0
    if not isinstance(array, jax.Array):
        if is_first:
            yield (slice(None),) * array.ndim, array
        return
    parts = _parts(array) if is_first or not array.is_fully_addressable else []
    for axis, run in _runs(parts, array.shape):
        begins, first = run[0]
        held = [(place, part, _in_host_memory(part)) for place, part in run]
        if len(run) == 1 and held[0][2] is not None:
            yield _index(begins, first.shape), held[0][2]
            continue
        shape = list(first.shape)
        shape[axis] *= len(run)
        for starts, sizes in _blocks(tuple(shape), first.dtype.itemsize):
            block = np.empty(sizes, first.dtype)
            place = tuple(b + x for b, x in zip(begins, starts, strict=True))
            _fill(block, place, held)
            yield _index(place, sizes), block


def _parts(array: Array) -> list[tuple[tuple[int, ...], Array]]:
    """Return where each part begins that this process holds for all, and the part."""
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            places = zip(shard.index, array.shape, strict=True)
            found.append((tuple(x.indices(n)[0] for x, n in places), shard.data))
    return found


def _in_host_memory(part: Array) -> np.ndarray | None:
    """Return a part as NumPy's: a view on a CPU; None of a large one in a device's memory."""
    is_cpu = all(device.platform == "cpu" for device in part.devices())
    if part.nbytes > BLOCK_BYTES and not is_cpu and not is_on_host(part):
        return None
    # An array of its own: where this is a copy, JAX keeps it as long as the array.
    return np.asarray(jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part]))


def _fill(
    block: np.ndarray,
    begins: tuple[int, ...],
    parts: Sequence[tuple[tuple[int, ...], Array, np.ndarray | None]],
) -> None:
    """Write to a block, which begins there in the array, what parts have of it."""
    for starts, part, known in parts:
        lows = [max(b, s) for b, s in zip(begins, starts, strict=True)]
        ends = zip(begins, block.shape, starts, part.shape, strict=True)
        sizes = [min(b + m, s + n) - x for (b, m, s, n), x in zip(ends, lows, strict=True)]
        if min(sizes, default=1) <= 0:
            continue
        own = [x - s for x, s in zip(lows, starts, strict=True)]  # in the part's own coordinates
        piece = _piece(part, own, sizes) if known is None else known[_index(own, sizes)]
        block[_index([x - b for x, b in zip(lows, begins, strict=True)], sizes)] = piece


def _runs(
    parts: Sequence[tuple[tuple[int, ...], Array]], shape: tuple[int, ...]
) -> Iterator[tuple[int, list[tuple[tuple[int, ...], Array]]]]:
    """Give the parts that lie side by side along the last axis that is cut, together.

    A row of theirs is one stretch of the file, where each alone is a piece of every row.

    Yields:
        The axis, and parts with where they begin.
    """
    axis, run = 0, []
    # Those that differ along the axis alone one after the other.
    if parts:
        axis = max((i for i, n in enumerate(shape) if parts[0][1].shape[i] != n), default=0)
    for begins, part in sorted(
        parts, key=lambda x: (x[0][:axis], x[0][axis + 1 :], x[0][axis : axis + 1])
    ):
        follows = bool(run) and all(
            b == last + (n if i == axis else 0)
            for i, (b, last, n) in enumerate(zip(begins, run[-1][0], part.shape, strict=True))
        )
        if run and not follows:
            yield axis, run
            run = []
        run.append((begins, part))
    if run:
        yield axis, run


def _piece(part: Array, begins: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Bring some of what is in a device's memory to the host, which never has the whole."""
    with no_mesh():
        bits = _sliced_bits(part, np.array(begins, np.int32), tuple(sizes))
    return np.frombuffer(byte_view(bits), part.dtype).reshape(sizes)


def _index(begins: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(b, b + n) for b, n in zip(begins, sizes, strict=True))


def _write_part(
    handle: int, index: tuple[slice, ...], part: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Write a part of an array to its places in the array's file."""
    begins = [s.indices(n)[0] for s, n in zip(index, shape, strict=True)]
    # The last axis that is cut: from there on the part's memory lies in the file as it is.
    cut = [i for i, n in enumerate(shape) if part.shape[i] != n]
    axis = cut[-1] if cut else 0
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(begin * stride for begin, stride in zip(begins, strides, strict=True))
    for outer in np.ndindex(part.shape[:axis]):
        offset = first + sum(i * stride for i, stride in zip(outer, strides, strict=False))
        rest = byte_view(np.asarray(part[outer]))
        offset *= part.itemsize
        while rest.nbytes:  # the system writes two gigabytes at most at a time
            done = os.pwrite(handle, rest, offset)
            rest, offset = rest[done:], offset + done


def read_arrays(folder: Path, specs: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Read arrays of known shapes and dtypes onto the shardings that the specs name.

    Raises:
        DamagedError: the files are not those of such arrays.
        ValueError: a dtype that this run of JAX does not have.
    """
    wide = [x for x in specs if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype]
    if wide:
        raise ValueError(
            f"{folder}: holds {wide[0].dtype} arrays, which JAX would cut to 32 bits; set "
            "jax_enable_x64 to read them"
        )
    place = folder / ARRAYS
    paths = {str(i): place / str(i) for i, spec in enumerate(specs) if spec.size}
    found = walk(place) if place.is_dir() else {}
    for name, path in found.items():
        if name not in paths:
            raise DamagedError(f"{path}: is no file of an array")
    for name, path in paths.items():
        wanted = num_bytes([specs[int(name)]])
        if name not in found:
            raise DamagedError(f"{path}: is missing")
        if (size := path.stat().st_size) != wanted:
            raise DamagedError(f"{path}: has {size} bytes, its shape and dtype take {wanted}")
    return [_read(paths.get(str(i)), spec) for i, spec in enumerate(specs)]


def _read(path: Path | None, spec: jax.ShapeDtypeStruct) -> Array:
    sharding = spec.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if path is None:
        return jnp.zeros(spec.shape, spec.dtype, device=sharding)
    # A map of the file: each device is given its own part, and the whole is never in memory.
    # Of truth values the bytes, for somebody else's may be neither 0 nor 1.
    stored = np.uint8 if spec.dtype == bool else spec.dtype
    whole = np.memmap(path, stored, mode="r", shape=spec.shape)
    return jax.make_array_from_callback(
        # A copy, for JAX may keep the memory that it is given, and the file may change.
        spec.shape,
        sharding,
        lambda part: np.array(whole[part], spec.dtype),
    )


def byte_view(array: Array | np.ndarray) -> memoryview:
    """Return the bytes of an array, row by row, with no copy of them where it is on the host."""
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data


def byte_blocks(array: Array | np.ndarray) -> Iterator[memoryview]:
    """Give the bytes of an array, row by row, whole or in blocks.

    What no process holds whole is brought to each of them block by block, so that all must ask for
    it together.

    Yields:
        The bytes.

    Raises:
        ValueError: such an array lies on no mesh.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        yield byte_view(array)
        return
    yield from _brought(array)


def _brought(array: Array) -> Iterator[memoryview]:
    """Give an array's bytes, each block brought to every process by those who hold a part of it.

    Yields:
        The bytes.

    Raises:
        ValueError: the array lies on no mesh.
    """
    array = cast("Array", on_auto(array))
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{sharding}: an array of several processes must lie on a named mesh")
    if is_on_host(array):
        yield from _brought_by_hosts(array)
        return
    for begins, sizes in _blocks(array.shape, jnp.dtype(array.dtype).itemsize):
        # The caller's context may be of explicit axes, or of another mesh.
        with jax.set_mesh(cast("Mesh", sharding.mesh)):
            # A copy of NumPy's would make a program for every place.
            block = _block(array, np.array(begins, np.int32), sizes, sharding)
        yield byte_view(block)


def _brought_by_hosts(array: Array) -> Iterator[memoryview]:
    """Give the bytes of an array that is offloaded: of it a device has one block at a time.

    Each process puts its parts' share of a block into zeros, and they are summed as bytes.

    Yields:
        The bytes.
    """
    firsts = {}
    for device in sorted(array.sharding.device_set, key=lambda x: x.id):
        firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.array(list(firsts.values())), "process")
    held = [(place, part, _in_host_memory(part)) for place, part in _parts(array)]
    for begins, sizes in _blocks(array.shape, array.dtype.itemsize):
        block = np.zeros(sizes, array.dtype)
        _fill(block, begins, held)
        own = np.frombuffer(byte_view(block), np.uint8)[None]
        shares = jax.make_array_from_process_local_data(
            NamedSharding(mesh, PartitionSpec("process")), own, (len(firsts), own.size)
        )
        with jax.set_mesh(mesh):
            yield byte_view(_summed(shares, NamedSharding(mesh, PartitionSpec())))


@functools.partial(jax.jit, static_argnums=1)
def _summed(shares: Array, place: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(shares.sum(0, dtype=shares.dtype), place)


def _blocks(
    shape: tuple[int, ...], itemsize: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give the blocks of an array that lie together in memory, in memory's order.

    Yields:
        Where a block begins, and its shape.
    """
    axis = 0  # the axis that is cut: a row of it is no larger than a block, or there is none
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * itemsize > BLOCK_BYTES:
        axis += 1
    row = math.prod(shape[axis + 1 :]) * itemsize
    step = max(BLOCK_BYTES // max(row, 1), 1)
    for outer in np.ndindex(shape[:axis]):
        for begin in range(0, shape[axis], step):
            size = min(step, shape[axis] - begin)
            rest = shape[axis + 1 :]
            yield (*outer, begin, *(0,) * len(rest)), (*(1,) * axis, size, *rest)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _block(x: Array, begins: Array, sizes: tuple[int, ...], sharding: NamedSharding) -> Array:
    """Return the bits of a block, on every device.

    Sliced as it is, an array that is cut would first be gathered whole on every device by XLA's
    partitioner. So each device puts what it has of the block into zeros, and they are summed: as
    integers, since a sum of floats keeps neither -0.0 nor what a NaN says.
    """
    split = [axes_of(entry) for entry in sharding.spec]

    def summed(part: Array, begins: Array) -> Array:
        sliced, wanted = [], []
        for i, size in enumerate(sizes):
            axes, length = split[i] if i < len(split) else (), part.shape[i]
            first = begins[i]
            if axes:
                first = first - length * jax.lax.axis_index(axes)  # negative: before this part
            start = jnp.clip(first, 0, length - min(size, length))
            sliced.append(start)
            # Where the block's entries are in what is sliced, if they are in it.
            wanted.append(first - start + jnp.arange(size, dtype=np.int32) if axes else None)
        lengths = tuple(min(size, n) for size, n in zip(sizes, part.shape, strict=True))
        bits = _sliced_bits(part, sliced, lengths)
        for i, (places, length) in enumerate(zip(wanted, lengths, strict=True)):
            if places is None:
                continue
            moved = jnp.take(bits, jnp.clip(places, 0, length - 1), axis=i)
            is_own = ((places >= 0) & (places < length)).reshape(-1, *(1,) * (bits.ndim - i - 1))
            is_own = jax.lax.broadcast_in_dim(is_own, moved.shape, range(i, moved.ndim))
            bits = jnp.where(is_own, moved, jnp.zeros_like(moved))
        return jax.lax.psum(bits, tuple(axis for axes in split for axis in axes))

    specs = {"in_specs": (sharding.spec, PartitionSpec()), "out_specs": PartitionSpec()}
    return jax.shard_map(summed, mesh=sharding.mesh, **specs)(x, begins)


@functools.partial(jax.jit, static_argnums=2)
def _sliced_bits(x: Array, begins: Sequence[Array] | Array, sizes: tuple[int, ...]) -> Array:
    bits = _bits(x)  # first: a slice of bfloat16 may be made in float32, and quieten a NaN
    for axis, size in enumerate(sizes):
        bits = jax.lax.dynamic_slice_in_dim(bits, begins[axis], size, axis=axis)
    return bits


def _bits(x: Array) -> Array:
    """Return numbers as unsigned integers of the same bytes; complex ones as two of them."""
    if x.dtype == bool:
        return x.astype(np.uint8)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    about = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    bits = jax.lax.bitcast_convert_type(x, f"uint{about(x.dtype).bits}")
    # Of less than a byte: NumPy has the bits of each number in a byte of their own.
    return bits.astype(np.uint8) if x.dtype.itemsize == 1 else bits


def describe(array: Any) -> dict[str, Any]:
    """Return an array's dtype and shape, as JSON.

    Raises:
        ValueError: a dtype that is not kept.
    """
    if str(array.dtype) not in DTYPES:
        raise ValueError(f"arrays of dtype {array.dtype} are not kept; known: {sorted(DTYPES)}")
    return {"dtype": str(array.dtype), "shape": [int(n) for n in array.shape]}


def described(value: Any, source: str) -> jax.ShapeDtypeStruct:
    """Read what `describe` wrote.

    Raises:
        DamagedError: the value is no array's dtype and shape.
    """
    right = type(value) is dict and value.keys() == {"dtype", "shape"} and is_shape(value["shape"])
    if not right or type(value["dtype"]) is not str or value["dtype"] not in DTYPES:
        raise DamagedError(f"{source}: must be an array's dtype and shape, is {shown(value)}")
    return jax.ShapeDtypeStruct(tuple(value["shape"]), jnp.dtype(value["dtype"]))


def is_shape(value: Any) -> bool:
    """Return whether a JSON value is a shape that an array may have."""
    plain = type(value) is list and len(value) <= 32
    return plain and all(type(n) is int and 0 <= n < 2**40 for n in value)


def num_bytes(arrays: Sequence[Any]) -> int:
    """Return how many bytes arrays take, or would by their shapes and dtypes."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)

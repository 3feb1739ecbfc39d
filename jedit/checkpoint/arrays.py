"""Arrays in a folder: the bytes of each in a file of its own, `arrays/0`, `arrays/1`, ...

A file is the array's memory, row by row, and nothing else: no header, so that there is nothing in
it to be parsed or to be believed. Dtype and shape stand in the manifest of the sealed folder
around it (see `sealed`), whose hash covers the bytes. An array without elements has no file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jedit.checkpoint.sealed import DamagedError, shown, walk

ARRAYS = "arrays"
DTYPES = {
    str(jnp.dtype(x))
    for x in (
        *(jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.int64),
        *(jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64),
        *(jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128),
    )
}


def write_arrays(folder: Path, arrays: Sequence[Array | np.ndarray]) -> None:
    """Write arrays, bit by bit as they are, to `folder/arrays`.

    Raises:
        OSError: the disk is full, or refuses for another reason.
    """
    (folder / ARRAYS).mkdir()
    for i, array in enumerate(arrays):
        if array.size:
            path = folder / ARRAYS / str(i)
            try:
                # One after the other: of a state on several devices one array is on the host.
                path.write_bytes(byte_view(array))
            except OSError as error:
                sentence = f"{error.strerror}, so that nothing was saved"
                raise OSError(error.errno, sentence, str(path)) from None


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
    sharding = spec.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
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

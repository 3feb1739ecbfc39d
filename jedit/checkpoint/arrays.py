"""Arrays in a folder, by orbax: one Zarr array each, named by its number.

Orbax's newer layout (OCDBT) keeps a table of the files that hold the data, and somebody else's
table could name files outside the folder. Zarr's has none: an array is a header and its pieces. So
that layout is written, no other is read, and the headers are checked before orbax sees them.
"""

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jedit.checkpoint.sealed import MAX_BYTES, DamagedError, parse, read_plain, shown, walk

ARRAYS = "arrays"
DTYPES = {
    str(jnp.dtype(x))
    for x in (
        *(jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.int64),
        *(jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64),
        *(jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128),
    )
}
OURS = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+"
    r"|\d+/(\.zarray|[\d.]+)"
)
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
COMPRESSORS = {"zstd", "blosc", "zlib", "gzip"}


def write_arrays(folder: Path, arrays: Sequence[Array | np.ndarray]) -> None:
    """Write arrays, bit by bit as they are, to `folder/arrays`."""
    with Writer() as writer:
        writer.start(folder, arrays)


class Writer:
    """Writes while the program goes on; one at a time, and `wait` says how it went."""

    def __init__(self):
        import orbax.checkpoint as ocp

        self._place: Path | None = None
        self._filter = _EchoFilter(sys.unraisablehook)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        self._args = ocp.args
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))

    def start(self, folder: Path, arrays: Sequence[Array | np.ndarray]) -> None:
        """Begin to write to `folder/arrays`; the arrays may not be overwritten before `wait`."""
        tree = {str(i): x for i, x in enumerate(arrays) if x.size}
        if tree:
            self._place = (folder / ARRAYS).absolute()
            with self._disk_errors():
                self._checkpointer.save(self._place, args=self._args.PyTreeSave(tree))

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            OSError: the disk is full, or refuses for another reason.
        """
        with self._disk_errors():
            self._checkpointer.wait_until_finished()

    def __enter__(self) -> "Writer":
        if not isinstance(sys.unraisablehook, _EchoFilter):
            sys.unraisablehook = _EchoFilter(sys.unraisablehook)
        self._filter = sys.unraisablehook
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._disk_errors():
                self._checkpointer.close()
        finally:
            if sys.unraisablehook is self._filter and not self._filter.is_needed:
                sys.unraisablehook = self._filter.then

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Say what the disk said: orbax has it in the text of a ValueError.

        Yields:
            Nothing.

        Raises:
            OSError: in its place.
            ValueError: another one.
        """
        try:
            yield
        except ValueError as error:
            found = OS_ERROR.search(str(error))
            self._filter.is_needed = True
            if found is None:
                raise
            code = int(found[1])
            where = None if self._place is None else str(self._place.parent.parent)
            raise OSError(code, f"{os.strerror(code)}, so that nothing was saved", where) from None


class _EchoFilter:
    """Drops what is printed for every array that was still to be written when another one failed.

    Tensorstore's threads report those to orbax's event loop, which is closed by then. They may come
    to it long after the error was raised, so that after one the filter stays.
    """

    def __init__(self, then: Callable[[Any], Any]):
        self.then, self.is_needed = then, False

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.then(unraisable)


def read_arrays(folder: Path, specs: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Read arrays of known shapes and dtypes onto the shardings that the specs name.

    Raises:
        DamagedError: the files are not those of such arrays.
        ValueError: a dtype that this run of JAX does not have.
    """
    import orbax.checkpoint as ocp

    wide = [x for x in specs if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype]
    if wide:
        raise ValueError(
            f"{folder}: holds {wide[0].dtype} arrays, which JAX would cut to 32 bits; set "
            "jax_enable_x64 to read them"
        )
    stored = {str(i): spec for i, spec in enumerate(specs) if spec.size}
    _check_files(folder, stored)
    if stored:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        args = {
            name: ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                dtype=spec.dtype,
                sharding=spec.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
                global_shape=spec.shape,
                strict=True,
            )
            for name, spec in stored.items()
        }
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                read = checkpointer.restore(
                    (folder / ARRAYS).absolute(),
                    args=ocp.args.PyTreeRestore(stored, restore_args=args),
                )
        except Exception as error:
            # Not to be narrowed: of what it cannot decode orbax says `raise Exception(...)`.
            raise DamagedError(
                f"{folder / ARRAYS}: orbax cannot read it: {shown(str(error))}"
            ) from error
    return [
        read[str(i)] if spec.size else jnp.zeros(spec.shape, spec.dtype, device=spec.sharding)
        for i, spec in enumerate(specs)
    ]


def describe(array: Any) -> dict[str, Any]:
    """An array's dtype and shape, as JSON.

    Raises:
        ValueError: a dtype that is not kept.
    """
    if str(array.dtype) not in DTYPES:
        raise ValueError(f"arrays of dtype {array.dtype} are not kept; known: {sorted(DTYPES)}")
    return {"dtype": str(array.dtype), "shape": [int(n) for n in array.shape]}


def described(value: Any, source: str) -> jax.ShapeDtypeStruct:
    """The reverse of `describe`.

    Raises:
        DamagedError: the value is none of its.
    """
    right = type(value) is dict and value.keys() == {"dtype", "shape"} and is_shape(value["shape"])
    if not right or type(value["dtype"]) is not str or value["dtype"] not in DTYPES:
        raise DamagedError(f"{source}: must be an array's dtype and shape, is {shown(value)}")
    return jax.ShapeDtypeStruct(tuple(value["shape"]), jnp.dtype(value["dtype"]))


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a shape that an array may have."""
    plain = type(value) is list and len(value) <= 32
    return plain and all(type(n) is int and 0 <= n < 2**40 for n in value)


def num_bytes(arrays: Sequence[Any]) -> int:
    """What arrays, or their shapes and dtypes, take."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)


def _check_files(folder: Path, stored: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Refuse whatever is not the headers and pieces of just these arrays.

    Raises:
        DamagedError: which file it is.
    """
    place = folder / ARRAYS
    files = walk(place) if place.is_dir() else {}
    for name, path in files.items():
        if OURS.fullmatch(name) is None:
            raise DamagedError(f"{path}: is no file of an array")
    for name, spec in stored.items():
        path = place / name / ".zarray"
        header = parse(read_plain(path, MAX_BYTES), path)
        expected = {
            "shape": list(spec.shape),
            "dtype": _zarr_dtype(spec.dtype),
            "filters": None,
            "order": "C",
            "zarr_format": 2,
        }
        for field, value in expected.items():
            if header.get(field) != value:
                raise DamagedError(
                    f"{path}: {field} is {shown(header.get(field))}, expected {value}"
                )
        compressor: Any = header.get("compressor")
        chunks: Any = header.get("chunks")
        if compressor is not None and (
            type(compressor) is not dict or compressor.get("id") not in COMPRESSORS
        ):
            raise DamagedError(f"{path}: the compressor is {shown(compressor)}")
        right = is_shape(chunks) and len(chunks) == len(spec.shape)
        if not right or any(not 0 < c <= n for c, n in zip(chunks, spec.shape, strict=True)):
            raise DamagedError(f"{path}: chunks are {shown(chunks)} of shape {spec.shape}")
        wanted = math.prod(-(-n // c) for c, n in zip(chunks, spec.shape, strict=True))
        number = sum(1 for other in files if other.startswith(f"{name}/")) - 1
        if number != wanted:
            raise DamagedError(f"{path.parent}: has {number} pieces, {wanted} are needed")


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax warns at each save in Zarr's layout that there was nothing to do for the other one.

    And what it raises is logged as well, once for each of its threads and futures.
    """
    text = str(record.msg)
    if "exception was never retrieved" in text:
        return "os_error_code=" not in text
    known = ("Skipping merge of OCDBT", "_SignalingThread.run() raised", "Handler Commit operation")
    return not any(part in text for part in known)


def _zarr_dtype(dtype: Any) -> str:
    return "bfloat16" if dtype == jnp.bfloat16 else np.dtype(dtype).str

"""CIFAR-10: 60,000 colour images of 32 x 32 pixels in ten classes, from its files as published.

Both of the published forms are read, each of five training batches and one to test on:

    data_batch_1.bin ... test_batch.bin   rows of 3,073 bytes: the label, then red, green and blue
    data_batch_1 ... test_batch           pickles of a dict with b"data" (n, 3072) and b"labels"

A pickle is a program, and these are read without running it: whatever class or function one names
is refused, but for the three that NumPy's arrays are made of, in whose place stand objects that
only hold what they are given.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jedit.data.images import Images

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = ("test_batch",)
NUM_CLASSES = 10
SIDE = 32
PIXELS = 3 * SIDE * SIDE  # of one image, all reds first, then all greens, then all blues
MAX_FILE = 2**25  # bytes; a published batch has 31 million, in either form
MAX_OPERATIONS = 2**18  # a published batch has about five for each of its 10,000 rows
# What batches are written by. Others copy the stack or make room for what a file only claims.
OPERATIONS = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
    ]
)

# What the reader raises where a pickle is broken: its stack is empty, or holds something else.
BROKEN = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
    *(OverflowError, RecursionError, MemoryError),
)


def load_cifar10(folder: str | Path) -> tuple[Images, Images]:
    """Load the images, scaled to [0, 1], channels last.

    Args:
        folder: where the six files lie, under their own names; those that end in ".bin" are
            preferred.

    Returns:
        The images to train on and those to test on: as published 50,000 and 10,000, else as
        many as the files hold.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one of them is no batch of CIFAR-10, or a label is none of the ten.
    """
    folder = Path(folder)
    return _load_part(folder, TRAIN), _load_part(folder, TEST)


def _load_part(folder: Path, names: tuple[str, ...]) -> Images:
    parts = [_read(_found(folder, name)) for name in names]
    pixels, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    images = np.moveaxis(pixels.reshape(-1, 3, SIDE, SIDE), 1, -1)
    return Images(images / np.float32(255), labels.astype(np.int32))


def _found(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.bin", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} holds neither {name}.bin nor {name}; give the folder cifar-10-batches-bin or "
        "cifar-10-batches-py, unpacked"
    )


def _read(path: Path) -> tuple[UInt8[np.ndarray, "n pixels"], np.ndarray]:
    """Return the pixels and the labels of one file.

    Raises:
        ValueError: the file is no batch, or holds another label.
    """
    pixels, labels = _read_binary(path) if path.suffix == ".bin" else _read_pickle(path)
    if bad := sorted({int(x) for x in labels} - set(range(NUM_CLASSES))):
        raise ValueError(
            f"{path}: holds the label {bad[0]}, expected 0 to {NUM_CLASSES - 1}; is it CIFAR-10's?"
        )
    return pixels, labels


def _read_binary(path: Path) -> tuple[UInt8[np.ndarray, "n pixels"], np.ndarray]:
    data = _content(path)
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(
            f"{path}: holds {len(data)} bytes, expected rows of {1 + PIXELS}, a label and {PIXELS} "
            "pixels each; copy the file again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _read_pickle(path: Path) -> tuple[UInt8[np.ndarray, "n pixels"], np.ndarray]:
    content = _content(path)
    try:
        _check_operations(content)
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(
            f"{path}: names {error}, which no batch of CIFAR-10 does; it was not run"
        ) from None
    except BROKEN as error:
        raise ValueError(
            f"{path}: is no batch of CIFAR-10 ({type(error).__name__}); copy the file again"
        ) from None
    data = found.get(b"data") if isinstance(found, dict) else None
    labels = found.get(b"labels") if isinstance(found, dict) else None
    pixels = data.pixels() if isinstance(data, _Array) else None
    is_list = isinstance(labels, list) and all(type(x) is int for x in labels)
    if pixels is None or not is_list or not labels or len(labels) != len(pixels):
        raise ValueError(
            f'{path}: is no batch of CIFAR-10: expected a dict of "data", (n, {PIXELS}) bytes, and '
            '"labels", a list of n whole numbers'
        )
    return pixels, np.array(labels, object)


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ValueError(f"{path}: holds {size} bytes, more than any batch of CIFAR-10")
    return path.read_bytes()


def _check_operations(content: bytes) -> None:
    """Refuse a pickle, before any of it is loaded, that is written by what no batch is.

    Raises:
        _RefusedError: it holds such an operation, or too many.
    """
    for i, (operation, _, _) in enumerate(pickletools.genops(content)):
        if operation.name not in OPERATIONS:
            raise _RefusedError(f"the operation {operation.name}")
        if i >= MAX_OPERATIONS:
            raise _RefusedError(f"more than {MAX_OPERATIONS} operations")


class _RefusedError(Exception):
    """A pickle asks for what no batch needs: a class, a function or an operation."""


class _Array:
    """Stands for a NumPy array; it holds the arguments that the array would be made of."""

    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> UInt8[np.ndarray, "n pixels"] | None:
        """Return the array, if it is one of (n, 3072) bytes in rows."""
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            return None
        _, shape, dtype, is_fortran, data = self.state
        is_bytes = isinstance(dtype, _Dtype) and dtype.name in (b"u1", "u1", b"uint8", "uint8")
        is_rows = isinstance(shape, tuple) and len(shape) == 2 and shape[1] == PIXELS
        if not (is_bytes and is_rows and not is_fortran and isinstance(data, bytes)):
            return None
        if type(shape[0]) is not int or len(data) != shape[0] * PIXELS:
            return None
        return np.frombuffer(data, np.uint8).reshape(-1, PIXELS)


class _Dtype:
    """Stands for a NumPy dtype; it holds its name."""

    def __init__(self, name: Any = None, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Take nothing of it: it says the byte order, and bytes have none."""


class _Subtype:
    """Stands for `numpy.ndarray`, of which nothing is asked and which takes no attributes."""

    __slots__ = ()


_KNOWN = {
    "_reconstruct": ("multiarray", _Array),
    "ndarray": ("numpy", _Subtype()),
    "dtype": ("numpy", _Dtype),
}


# The reader written in Python: that in C makes room for as many memos as a file claims to have.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]  # noqa: SLF001
    def find_class(self, module: str, name: str) -> Any:
        package, stand_in = _KNOWN.get(name, ("", None))
        if stand_in is None or module.split(".")[0] != "numpy" or module.split(".")[-1] != package:
            raise _RefusedError(f"{module}.{name}"[:80])
        return stand_in

    # The hash of a tuple of tuples overflows the stack, or takes a time exponential in its depth.
    def _load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]  # noqa: SLF001

    def _load_setitems(self) -> None:
        self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]  # noqa: SLF001

    def _check_keys(self, keys: list[Any]) -> None:
        if not all(isinstance(key, bytes | str) for key in keys):
            raise _RefusedError("a key that is no string")

    dispatch = {  # noqa: RUF012
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]  # noqa: SLF001
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
    }

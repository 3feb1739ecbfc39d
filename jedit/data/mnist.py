"""MNIST: 70,000 handwritten digits of 28 x 28 pixels, from its four files as they are published.

Each is an idx file, plain or gzipped: two zero bytes, a byte that names the element type, one that
counts the axes, the length of every axis as a big-endian integer of four bytes, then the elements.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jedit.data.images import Images

PARTS = ("train", "t10k")
UNSIGNED_BYTE = 0x08
NUM_CLASSES = 10


def load_mnist(folder: str | Path) -> tuple[Images, Images]:
    """Load the images, scaled to [0, 1].

    Args:
        folder: where the four files lie, under their own names, with or without ".gz".

    Returns:
        The 60,000 to train on and the 10,000 to test on.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one of them is no idx file of bytes, images and labels do not match, or a
            label is none of the ten.
    """
    train, test = (_load_part(Path(folder), part) for part in PARTS)
    return train, test


def read_idx(path: str | Path) -> UInt8[np.ndarray, "..."]:
    """Read an idx file of unsigned bytes.

    Args:
        path: the file; gzipped if its name ends in ".gz".

    Returns:
        The array, in the shape that the file states.

    Raises:
        ValueError: the file is no idx file of bytes, or is shorter or longer than it states.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    if data[:3] != bytes([0, 0, UNSIGNED_BYTE]) or len(data) < 4:
        raise ValueError(
            f"{path}: not an idx file of unsigned bytes: it begins with {data[:4].hex(' ')!r}, "
            "expected '00 00 08' and the number of axes"
        )
    header = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if len(data) != header + math.prod(shape):
        raise ValueError(
            f"{path}: states shape {shape}, {header + math.prod(shape)} bytes with the header, "
            f"but holds {len(data)}; copy the file again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _load_part(folder: Path, part: str) -> Images:
    images = read_idx(_found(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_found(folder, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: {part}-images has shape {images.shape} and {part}-labels {labels.shape}, "
            "expected (n, height, width) and (n,) of the same n"
        )
    if not len(labels) or labels.max() >= NUM_CLASSES:
        got = f"the label {labels.max()}" if len(labels) else "no rows"
        raise ValueError(
            f"{folder}: {part}-labels holds {got}, expected labels of 0 to {NUM_CLASSES - 1}; "
            "is it MNIST's?"
        )
    return Images((images / np.float32(255))[..., None], labels.astype(np.int32))


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz")

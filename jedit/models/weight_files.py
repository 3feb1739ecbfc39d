"""The safetensors files of a Hugging Face folder, as NumPy views of where their tensors lie.

A file is eight bytes with the length of a header, the header in JSON, and the tensors' bytes, in
row-major order. A view of it costs no memory until it is read, and of it the part alone that is
asked for; what is assigned to a view is written into the file.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jedit.models._optional import optional

INDEX = "model.safetensors.index.json"
FLOATS = {
    "BF16": jnp.dtype(jnp.bfloat16),
    "F16": jnp.dtype(jnp.float16),
    "F32": jnp.dtype(jnp.float32),
    "F64": jnp.dtype(jnp.float64),
}
# What may stand beside the parameters: masks and other buffers; and weights that are quantised.
DTYPES = FLOATS | {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
}


class Place(NamedTuple):
    """Where a tensor lies: `offset` counts bytes from the file's beginning."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Stack:
    """Several arrays of one shape as one of a new first axis, which copies none of them.

    It is read and assigned to by one slice an axis.
    """

    parts: tuple[Any, ...]

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole."""
        return (len(self.parts), *self.parts[0].shape)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.stack([part[index[1:]] for part in self.parts[index[0]]])

    def __setitem__(self, index: tuple[slice, ...], values: np.ndarray) -> None:
        for part, value in zip(self.parts[index[0]], values, strict=True):
            part[index[1:]] = value


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights: those of the index, else all there are.

    Raises:
        ValueError: the folder has no safetensors file, or the index names one that is not there.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors file.")
    index = folder / INDEX
    if not index.exists():
        return files
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of weights: {error!r}") from None
    if missing := [name for name in names if folder / str(name) not in files]:
        raise ValueError(f"{index}: names {missing[:6]}, which are no safetensors files beside it.")
    return [folder / name for name in names]


def read_places(folder: Path) -> dict[str, Place]:
    """Return where each tensor of a folder lies, reading the headers alone.

    Raises:
        ValueError: the folder has no tensors, has one twice, or has some of an unknown dtype; or a
            file that is not whole.
    """
    found: dict[str, Place] = {}
    for file in weight_files(folder):
        begin, header = _header(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ValueError(
                    f"{folder}: {name} stands in {found[name].file.name} and in {file.name}; take "
                    f"one of the files away, or name the right ones in {INDEX}."
                )
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{file}: {name} is stored as {entry['dtype']}, which is not supported."
                )
            offset = begin + entry["data_offsets"][0]
            found[name] = Place(file, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return found


def views(places: Mapping[str, Place], mode: Literal["r", "r+"] = "r") -> dict[str, np.ndarray]:
    """Return the tensors as arrays that lie in the files; with "r+" they can be assigned to."""
    files = {place.file for place in places.values()}
    mapped = {file: np.memmap(file, np.uint8, mode) for file in files}
    return {
        name: np.ndarray(place.shape, place.dtype, mapped[place.file], place.offset)
        for name, place in places.items()
    }


def copy_layout(source: Path, file: Path, changed: Collection[str], dtype: np.dtype) -> None:
    """Make a file of the same tensors as another, some in another dtype; all numbers are zero.

    Args:
        source: a safetensors file.
        file: the new file.
        changed: names of the tensors that are to have the dtype.
        dtype: the dtype.
    """
    begin, header = _header(source)
    names = {value: name for name, value in DTYPES.items()}
    new, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind = names[dtype] if name in changed else entry["dtype"]
        size = int(np.prod(entry["shape"], dtype=np.int64)) * DTYPES[kind].itemsize
        new[name] = {**entry, "dtype": kind, "data_offsets": [end, end + size]}
        end += size
    with source.open("rb") as opened:
        text = opened.read(begin)
    if any(new[name] != header[name] for name in new):
        content = {"__metadata__": header.get("__metadata__") or {"format": "pt"}, **new}
        body = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        body += b" " * (-len(body) % 8)  # the format wants the numbers aligned to eight bytes
        text = len(body).to_bytes(8, "little") + body
    # A new file: the old one may be another's, by a link, or be read by somebody.
    file.unlink(missing_ok=True)
    with file.open("wb") as opened:
        opened.write(text)
        opened.flush()
        # Taken beforehand: a mapped page for which there is no room would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, len(text) + end)
        else:
            opened.truncate(len(text) + end)


def flush(tensors: Mapping[str, np.ndarray]) -> None:
    """Write what was assigned to views back into their files."""
    for mapped in {id(tensor.base): tensor.base for tensor in tensors.values()}.values():
        assert isinstance(mapped, np.memmap)
        mapped.flush()


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors begin, and the header in the order of their offsets.

    Raises:
        ValueError: the file is no safetensors file, or only a part of one.
    """
    safetensors = optional("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass  # opening it checks that header and size agree
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file}: is no whole safetensors file ({error}); copy or download it anew."
        ) from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    entries = sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1]))
    return 8 + length, dict(entries)

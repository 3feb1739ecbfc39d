"""Folders that are whole or not there, and that say so themselves.

A sealed folder holds files and one `manifest.json`:

    {"content": what the folder is about, "files": {name: [size, SHA-256]}, "format": "jedit 2",
     "kind": ..., "seal": SHA-256 of all the rest}

It is written under another name beside its place, brought to the disk, and renamed: a reader sees
all of it or nothing. On reading, before anything is made of them, the files must be exactly those
listed, plain (no links), of the sizes and hashes listed. A hash finds damage; it does not say who
wrote a folder, so what a manifest says is checked as well: it is plain JSON, and names no class, no
module and no place.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jedit.checkpoint.disk import sync, temporary_folder

MANIFEST = "manifest.json"
FORMAT = "jedit 2"  # 1 had arrays in Zarr's layout
MAX_BYTES = 2**24  # of a manifest; that of a model of 1,000 matrices has some 2**19
MAX_DEPTH = 32
TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # in JSON, or what is left of one


Files = dict[str, list[Any]]  # by name: size and SHA-256


class DamagedError(ValueError):
    """An error that names a file which is missing, damaged, or not what it should be."""


def write_sealed(
    folder: Path,
    kind: str,
    content: Mapping[str, Any],
    write: Callable[[Path], Files] | None = None,
) -> str:
    """Write a sealed folder, or nothing.

    Args:
        folder: where it is to be; nothing may be there yet.
        kind: the word that `read_sealed` must be given to read the folder.
        content: the manifest's content, plain JSON.
        write: a function that writes the other files into the folder it is given, and returns what
            `file_hashes` does of them.

    Returns:
        The seal.

    Raises:
        ValueError: something is there already.
        OSError: the folder cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: is there already; remove it, or give another folder")
    with temporary_folder(folder.parent) as new:
        files = {} if write is None else write(new)
        seal = seal_folder(new, kind, content, files)
        try:
            # All of it is on the disk; with this one step a reader sees it.
            os.rename(new, folder)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise ValueError(f"{folder}: somebody else wrote it meanwhile") from None
            raise
    sync(folder.parent)  # the new name itself: without this a power cut could take it back
    return seal


def file_hashes(folder: Path, names: Iterable[str]) -> Files:
    """Return the size and the SHA-256 of some of a folder's files."""
    hashes = {name: sha256(folder / name) for name in names}
    # After they were read: a network's disk tells the size anew when a file is opened.
    return {name: [(folder / name).stat().st_size, found] for name, found in hashes.items()}


def seal_folder(folder: Path, kind: str, content: Mapping[str, Any], files: Files) -> str:
    """Write the manifest of a folder's files, which are given, and bring all of it to the disk."""
    manifest = {"content": dict(content), "files": files, "format": FORMAT, "kind": kind}
    seal = _seal(manifest)
    (folder / MANIFEST).write_bytes(_text({**manifest, "seal": seal}))
    # The files before the folders that name them, and all of them before anybody renames this one.
    for path in walk(folder).values():
        sync(path)
    for path, _, _ in os.walk(folder):
        sync(Path(path))
    return seal


def read_sealed(
    folder: Path, kind: str, *, share: slice = slice(None)
) -> tuple[dict[str, Any], str]:
    """Check a sealed folder, every byte of it.

    Args:
        folder: the folder.
        kind: the word that it was written with.
        share: of which of the files, in the order of their names, the bytes are compared with the
            hashes: several processes that read one folder do it together.

    Returns:
        Its content, whose form is still to be checked, and its seal.

    Raises:
        DamagedError: a file is missing, changed or not listed; the message names it.
    """
    manifest = read_manifest(folder, kind)
    listed: dict[str, list] = manifest["files"]
    # Everything that lies there, not only what is listed: an extra file is refused too.
    found = walk(folder)
    found.pop(MANIFEST)
    for name in listed.keys() - found.keys():
        raise DamagedError(f"{folder / name}: is missing")
    for name in found.keys() - listed.keys():
        raise DamagedError(f"{folder / name}: is not among the files that {MANIFEST} lists")
    for name, (size, digest) in sorted(listed.items())[share]:
        # The size first: it costs nothing, and a huge file need not be hashed to be refused.
        if (actual := found[name].stat().st_size) != size:
            raise DamagedError(f"{found[name]}: has {actual} bytes, {size} were written")
        if sha256(found[name]) != digest:
            raise DamagedError(f"{found[name]}: was changed, its SHA-256 is not the one written")
    return manifest["content"], manifest["seal"]


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Check a sealed folder's manifest, and none of the other files.

    Raises:
        DamagedError: the manifest is missing or changed, or is of another kind or format.
    """
    path = folder / MANIFEST
    raw = read_plain(path, MAX_BYTES)
    manifest = parse(raw, path)
    check_fields(manifest, {"content", "files", "format", "kind", "seal"}, str(path))
    if manifest["format"] != FORMAT:
        raise DamagedError(f"{path}: has format {shown(manifest['format'])}, known is {FORMAT!r}")
    seal = manifest.pop("seal")
    # The bytes, not the values: spaces, orders or a second spelling of a number are changes as
    # well.
    if raw != _text({**manifest, "seal": _seal(manifest)}):
        raise DamagedError(f"{path}: was changed, its seal is not that of its contents")
    if manifest["kind"] != kind:
        raise DamagedError(f"{path}: is of a {shown(manifest['kind'])}, not of a {kind!r}")
    if type(manifest["content"]) is not dict or type(manifest["files"]) is not dict:
        raise DamagedError(f"{path}: content and files must be objects")
    for name, entry in manifest["files"].items():
        check_name(name, path)
        right = type(entry) is list and [type(x) for x in entry] == [int, str]
        if not right or entry[0] < 0 or len(entry[1]) != 64:
            raise DamagedError(f"{path}: the entry of {name} must be its size and its SHA-256")
    return {**manifest, "seal": seal}


def check_name(name: str, source: Path) -> None:
    """Refuse the name of a file that is not within its folder.

    Raises:
        DamagedError: absolute, with `..`, or not in its plain form.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DamagedError(f"{source}: names {name!r}, which leaves the folder")
    if str(path) != name or name in ("", ".", MANIFEST):
        raise DamagedError(f"{source}: names {name!r}, which is no file's plain name")


def check_fields(value: Any, names: Iterable[str], source: str) -> None:
    """Refuse anything but an object with just these fields.

    Raises:
        DamagedError: the value is no object, or has unknown or missing fields.
    """
    if type(value) is not dict:
        raise DamagedError(f"{source}: must be an object, is {shown(value)}")
    if unknown := sorted(value.keys() - set(names)):
        raise DamagedError(f"{source}: has unknown fields {shown(unknown)}")
    if missing := sorted(set(names) - value.keys()):
        raise DamagedError(f"{source}: lacks the fields {missing}")


def shown(value: Any) -> str:
    """Return what somebody else wrote, short enough for a sentence."""
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def parse(raw: bytes, source: Path) -> dict[str, Any]:
    """Read JSON strictly: no repeated names, no NaN, no deep nesting.

    Raises:
        DamagedError: the bytes are no JSON of this form.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a field stands twice")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    # Counted before it is parsed: Python's parser gives up at a depth that depends on its caller.
    outside = TEXT.sub(b"", raw)
    steps = ((byte in b"[{") - (byte in b"]}") for byte in outside)
    deepest = max(itertools.accumulate(steps), default=0)
    if deepest > MAX_DEPTH:
        raise DamagedError(f"{source}: is nested {deepest} deep, at most {MAX_DEPTH}")
    try:
        value = json.loads(raw, object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{source}: is no JSON of this form: {error}") from None
    if type(value) is not dict:
        raise DamagedError(f"{source}: must be an object, is {shown(value)}")
    return value


def read_plain(path: Path, most: int) -> bytes:
    """Read a file that is no link and not too large.

    Raises:
        DamagedError: the file is missing, a link, no plain file, or too large.
    """
    try:
        # O_NOFOLLOW refuses a link in the same step that opens, and O_NONBLOCK keeps a pipe from
        # waiting for a writer; what was opened is then looked at, not the name, which may change
        # meanwhile.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        raise DamagedError(f"{path}: cannot be read ({reason})") from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path}: is no plain file")
        if status.st_size > most:
            raise DamagedError(f"{path}: has {status.st_size} bytes, at most {most}")
        return file.read(most)


def walk(folder: Path) -> dict[str, Path]:
    """Return all files of a folder, by their name in it.

    Raises:
        DamagedError: a link, or anything else that is neither file nor folder.
    """
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            inner = walk(Path(entry.path))
            found.update({f"{entry.name}/{name}": path for name, path in inner.items()})
        elif entry.is_file(follow_symlinks=False):
            found[entry.name] = Path(entry.path)
        else:
            kind = "a link" if entry.is_symlink() else "no plain file"
            raise DamagedError(f"{entry.path}: is {kind}")
    return found


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(manifest)).hexdigest()


def _text(value: Mapping[str, Any]) -> bytes:
    """Return a value in the one way that it may be written: a manifest is compared byte by byte."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

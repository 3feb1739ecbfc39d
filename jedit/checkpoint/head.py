"""The head of a ledger, which tells where its chain ends, and the secret that rows are hashed with.

`head.json` holds the number and the seal of the last record, with a code that only the owner of
`secret` can make; the ledger's own docstring says what each is good for.
"""

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

from jedit.checkpoint.disk import sync, temporary_name
from jedit.checkpoint.entry import is_digest, row_bytes
from jedit.checkpoint.sealed import DamagedError, check_fields, parse, read_plain

HEAD, SECRET = "head.json", "secret"


def row_hash(folder: Path, row: Any) -> str:
    """Return the keyed hash of a row.

    Raises:
        ValueError: the secret is not there, or the row holds something that has no hash.
    """
    key = read_secret(folder)
    if key is None:
        raise ValueError(f"{folder / SECRET}: is not there; rows are hashed with it")
    return hashlib.blake2b(row_bytes(row), key=key, digest_size=32).hexdigest()


def read_head(folder: Path) -> tuple[int, str]:
    """Return the number of the last record, and its seal.

    Raises:
        DamagedError: the head is damaged, or was not written with the ledger's secret.
    """
    path = folder / HEAD
    value = parse(read_plain(path, 1000), path)
    check_fields(value, {"count", "seal", "code"}, str(path))
    count, seal, code = value["count"], value["seal"], value["code"]
    # `type`, not isinstance: a JSON true would count as 1.
    right = type(count) is int and count >= 0 and is_digest(seal) and is_digest(code)
    if not right:
        raise DamagedError(f"{path}: names no record")
    key = read_secret(folder)
    # In constant time: how long the comparison takes must not tell how much of a code is right.
    if key is not None and not hmac.compare_digest(code, _code(key, count, seal)):
        raise DamagedError(f"{path}: was not written with this ledger's secret")
    return count, seal


def read_secret(folder: Path) -> bytes | None:
    """Read a ledger's secret; it is None for whoever was given the ledger without it.

    Raises:
        DamagedError: the file is there, and holds no secret.
    """
    path = folder / SECRET
    if not path.exists() and not path.is_symlink():
        return None
    key = read_plain(path, 32)
    if len(key) != 32:
        raise DamagedError(f"{path}: has {len(key)} bytes, a secret has 32")
    return key


def write_head(folder: Path, count: int, seal: str) -> None:
    """Write which record is the last one; a reader sees the old head or the new one.

    Raises:
        ValueError: the secret is not there.
    """
    key = read_secret(folder)
    if key is None:
        raise ValueError(f"{folder / SECRET}: is not there; a ledger is written with it")
    text = json.dumps({"count": count, "seal": seal, "code": _code(key, count, seal)})
    new = temporary_name(folder)
    new.write_text(text + "\n")
    sync(new)  # before the rename: the name must never stand for a file that is not on the disk
    os.replace(new, folder / HEAD)
    sync(folder)


def _code(key: bytes, count: int, seal: str) -> str:
    message = f"head {count} {seal}".encode()
    # `person` keeps these codes apart from the rows' hashes, which have the same key.
    return hashlib.blake2b(message, key=key, digest_size=32, person=b"jedit head").hexdigest()

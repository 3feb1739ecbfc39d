"""Records of a ledger, and how one is read from a file that somebody else may have written."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit.checkpoint.arrays import byte_blocks
from jedit.checkpoint.sealed import DamagedError, check_fields, shown
from jedit.core.display import short_repr
from jedit.core.paths import parameter_paths

MAX_SETTING = 1000  # characters of a text among the settings
PACKAGES = ("jedit", "jax", "jaxlib", "orbax-checkpoint", "optax", "numpy")
RECORD = {"number", "previous", "action", "date", "base", "versions"}
RECORD |= {"target", "request", "method", "settings", "seed", "effect", "edit"}
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One record of a ledger: an edit with all that is known of its making, or a revert.

    Attributes:
        number: the record's place in the ledger, counted from 1.
        action: "edit", or "revert" if it takes an earlier edit back.
        target: the number of the edit that is taken back; None for an edit.
        is_active: whether this is an edit that was not taken back.
        date: time at which it was recorded, UTC.
        method: the name of what made the edit.
        settings: the hyper-parameters it was made with.
        seed: the seed it was made with.
        effect: measurements of the edit's effect.
        request: a keyed hash of each row that was to be forgotten.
        base: the hash of the base that it was recorded for.
        versions: the versions of Python and of the libraries that it was made with.
        previous: the seal of the record before.
        seal: the seal of this record.
    """

    number: int
    action: str
    target: int | None
    is_active: bool
    date: str
    method: str
    settings: Mapping[str, Any]
    seed: int | None
    effect: Mapping[str, Any]
    request: tuple[str, ...]
    base: str
    versions: Mapping[str, str]
    previous: str
    seal: str

    __repr__ = short_repr


def params_hash(params: PyTree) -> str:
    """Return the SHA-256 of every parameter's path, dtype, shape and bytes, in order of paths."""
    leaves = dict(parameter_paths(params))
    digest = hashlib.sha256()
    for path in sorted(leaves):
        leaf = leaves[path]
        head = json.dumps([path, str(leaf.dtype), [int(n) for n in leaf.shape]]).encode()
        digest.update(len(head).to_bytes(8, "big") + head)
        for block in byte_blocks(leaf):
            digest.update(block)
    return digest.hexdigest()


def read_entry(content: Any, seal: str, source: str) -> Entry:
    """Read a record, and check every field of it but the edit's.

    Raises:
        DamagedError: the content is no record.
    """
    check_fields(content, RECORD, source)
    is_edit = content["action"] == "edit"
    is_revert = content["action"] == "revert"
    request, seed, target = content["request"], content["seed"], content["target"]
    right = (
        (is_edit or is_revert)
        and type(content["number"]) is int
        and (target is None if is_edit else type(target) is int)
        and type(content["edit"]) is (dict if is_edit else type(None))
        and (seed is None or type(seed) is int)
        and type(request) is list
        and all(is_digest(x) for x in request)
        and is_digest(content["previous"])
        and is_digest(content["base"])
        and all(type(content[name]) is str for name in ("date", "method"))
        and all(type(content[name]) is dict for name in ("settings", "effect", "versions"))
        and all(type(x) is str for x in content["versions"].values())
    )
    if not right:
        raise DamagedError(f"{source}: is no record of an edit or of a revert")
    rest = {name: content[name] for name in RECORD - {"edit", "request"}}
    return Entry(**rest, request=tuple(request), is_active=is_edit, seal=seal)


def with_activity(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Say of each record whether it is an edit that counts.

    Raises:
        DamagedError: what a record reverts is no edit.
    """
    reverted = {entry.target for entry in entries}
    for entry in entries:
        if entry.target is not None:
            earlier = 0 < entry.target < entry.number
            if not earlier or entries[entry.target - 1].action != "edit":
                raise DamagedError(f"entry {entry.number} reverts {entry.target}, which is no edit")
    return tuple(
        replace(entry, is_active=entry.action == "edit" and entry.number not in reverted)
        for entry in entries
    )


def row_bytes(row: Any) -> bytes:
    """Return a text for a row to be hashed by; no two rows have the same.

    Raises:
        ValueError: a row holds something that has no hash.
    """

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            return [type(value).__name__, repr(value)]
        if isinstance(value, Mapping):
            return {"map": [[plain(k), plain(value[k])] for k in sorted(value, key=repr)]}
        if isinstance(value, list | tuple):
            return {"list": [plain(x) for x in value]}
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            array = np.asarray(value)
            if not array.dtype.hasobject:
                return {"array": [str(array.dtype), list(array.shape), array.tobytes().hex()]}
        raise ValueError(f"a row of the request holds a {type(value).__name__}, which has no hash")

    return json.dumps(plain(row), sort_keys=True).encode()


def setting(value: Any, name: str) -> Any:
    """Return a value as plain JSON.

    Raises:
        ValueError: the value, or a part of it, cannot be kept.
    """
    if isinstance(value, np.generic | jax.Array | np.ndarray) and np.ndim(value) == 0:
        value = np.asarray(value, float if jnp.issubdtype(value.dtype, jnp.floating) else None)
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, str) and len(value) <= MAX_SETTING:
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: setting(x, f"{name}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [setting(x, name) for x in value]
    raise ValueError(
        f"{name}: {shown(value)} cannot be kept; give finite numbers, texts of at most "
        f"{MAX_SETTING} characters, None, or lists and dicts of them"
    )


def is_digest(value: Any) -> bool:
    """Return whether a JSON value is 32 bytes in hexadecimal digits."""
    return type(value) is str and DIGEST.fullmatch(value) is not None


def now() -> str:
    """Return the time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that edits are made with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

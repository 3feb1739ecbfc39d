"""A ledger: which edits a model consists of, so that each can be taken back, moved on, or audited.

    model = base + e₁ + e₂ + ...,   the active edits in the order they were recorded

The sum is formed anew from the base each time, one `apply_edit` after another. So a model without
an edit is, to the bit, the model that never had it, whatever was recorded before or after.

On the disk it is a folder with a sealed folder (see `sealed`) for each record:

    base/  entries/000001/  entries/000002/  ...  head.json  secret  lock

Each record holds the seal of the one before it, the first that of `base`, and a seal is a hash of
all that a record says and of all its files: a record that was changed, removed or moved breaks the
chain. What stands at the end of a chain is told by `head.json`, with a code that only the owner of
`secret` can make. An older state of the whole folder is as valid as it was then: whoever has to
find that out keeps `Ledger.head` elsewhere.

Of what was asked to be forgotten, a record keeps one hash for each row, BLAKE2b keyed with
`secret`, 32 random bytes that are made with the ledger and stand in no other file. Without them a
row cannot be found by trying (a plain or merely salted hash of a short row could be); with them,
`Ledger.find` tells which records are about a row. A record shows how many rows there were, and
which of them are equal. The edit itself is made of the rows, and gradients can be inverted: keep a
ledger as you keep the model from before.
"""

import operator
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jedit.checkpoint.arrays import describe, described, num_bytes
from jedit.checkpoint.disk import (
    TEMPORARY,
    check_room,
    locked,
    sync,
    temporary_folder,
)
from jedit.checkpoint.entry import (
    RECORD,
    Entry,
    is_digest,
    now,
    params_hash,
    read_entry,
    setting,
    versions,
    with_activity,
)
from jedit.checkpoint.head import HEAD, SECRET, read_head, row_hash, write_head
from jedit.checkpoint.json import edit_from_json, edit_to_json
from jedit.checkpoint.processes import Spread, led, led_writing, together
from jedit.checkpoint.saving import read_tree
from jedit.checkpoint.sealed import (
    MANIFEST,
    DamagedError,
    Files,
    check_fields,
    read_manifest,
    read_sealed,
    shown,
    write_sealed,
)
from jedit.core.arguments import check_kind, nearest
from jedit.core.devices import sharding_of
from jedit.core.paths import parameter_paths
from jedit.edits import Edit, LowRank, apply_edit

BASE, ENTRIES, LOCK = "base", "entries", "lock"
BASE_KIND, ENTRY_KIND = "ledger", "ledger entry"
PATIENCE = 60.0  # seconds that a writer waits for another


class Ledger:
    """An ordered list of edits to a base, on the disk; this module's docstring says how.

    Any number of processes may read while one writes; writers wait for each other. The processes of
    one `jax.distributed` program make every call that writes, and `params`, together: the first
    writes behind the lock, each of the others the parts of arrays that its devices hold, and all
    see the same answer or the same error. They see one file system.
    """

    def __init__(self, folder: str | Path):
        """Open a ledger; no code of it is run, and nothing is read outside of the folder.

        Args:
            folder: the folder that `Ledger.create` was given.

        Raises:
            DamagedError: the folder is no ledger, or its description of the base is damaged.
        """
        self.folder = Path(folder)
        for name in (BASE, ENTRIES):
            if (self.folder / name).is_symlink() or not (self.folder / name).is_dir():
                raise DamagedError(f"{self.folder}: is no ledger, it has no folder {name}")
        content, self._base_seal = read_sealed(self.folder / BASE, BASE_KIND)
        source = str(self.folder / BASE / MANIFEST)
        check_fields(content, {"hash", "params", "date", "versions"}, source)
        if not is_digest(content["hash"]) or type(content["params"]) is not dict:
            raise DamagedError(f"{source}: describes no base")
        self.base: str = content["hash"]
        self._shapes = {
            path: described(x, f"{source}: {shown(path)}") for path, x in content["params"].items()
        }

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, base {self.base[:16]})"

    @classmethod
    def create(cls, folder: str | Path, base_params: PyTree) -> "Ledger":
        """Begin a ledger of edits to a base, of which the hash and the shapes are kept.

        Args:
            folder: nothing may be there yet.
            base_params: the parameters that nothing was forgotten from.

        Returns:
            The ledger, without entries.

        Raises:
            ValueError: something is there already.
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        shapes = {path: describe(leaf) for path, leaf in parameter_paths(base_params)}
        content = {
            "hash": params_hash(base_params),
            "params": shapes,
            "date": now(),
            "versions": versions(),
        }
        led(f"creating {folder}", lambda _: _create(folder, content))
        return cls(folder)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return all records, with the chain checked and every file of theirs but the arrays.

        Raises:
            ValueError: a record is damaged, changed, missing or out of order; the message names it.
        """
        return self._entries(is_complete=False)

    @property
    def head(self) -> str:
        """Return the last record's seal: whoever knows it can tell an older state of the folder."""
        entries = self.entries
        return entries[-1].seal if entries else self._base_seal

    def record(
        self,
        edit: Edit,
        *,
        request: Sequence[Any],
        method: str,
        settings: Mapping[str, Any] | None = None,
        seed: int | None = None,
        effect: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Append an edit.

        Args:
            edit: one edit of the base's parameters, not a stack.
            request: the rows that the edit forgets: texts, arrays, numbers, or lists and dicts of
                them. A keyed hash of each is kept.
            method: name of the method that made the edit.
            settings: the method's hyper-parameters: numbers, short texts, None, or lists and dicts
                of them, kept as they are; nothing of the rows belongs here.
            seed: the seed of the method's random numbers.
            effect: measurements of the edit's effect: numbers, short texts, None, or lists and
                dicts of them, kept as they are.

        Returns:
            The record.

        Raises:
            ValueError: the edit is none of the base, or something of the record cannot be kept.
            OSError: the folder cannot be written to, or has too little room.
            TimeoutError: another writer does not come to its end.
        """
        check_kind(edit, Edit, "edit", "of `edit_between` or a method")
        for path, block in edit.blocks.items():
            spec = self._shapes.get(path)
            if spec is None or spec.shape != tuple(block.shape):
                unknown = f"no such parameter; {nearest(path, self._shapes)}"
                shape = unknown if spec is None else f"shape {spec.shape}"
                raise ValueError(f"{path}: the edit has shape {block.shape}, the base {shape}")
        if isinstance(request, str | bytes):
            raise ValueError("request must be a sequence of rows, got one text")
        edit_json, arrays = edit_to_json(edit), jax.tree.leaves(edit)
        # Read back before anything is written: a record that could not be read would break the
        # chain.
        edit_from_json(edit_json, method)
        fields = {
            "action": "edit",
            "target": None,
            "request": [self._row_hash(row) for row in request],
            "method": setting(method, "method"),
            "settings": setting(settings or {}, "settings"),
            "seed": setting(seed, "seed"),
            "effect": setting(effect or {}, "effect"),
            "edit": edit_json,
        }
        return self._append(fields, arrays)

    def revert(self, number: int) -> Entry:
        """Append that an edit no longer counts: `params` then are as if it had never been there.

        Args:
            number: the number of the edit's record.

        Returns:
            The record that says so.

        Raises:
            ValueError: there is no such edit, or it is reverted already.
            OSError: the folder cannot be written to, or has too little room.
            TimeoutError: another writer does not come to its end.
        """
        fields = dict.fromkeys(RECORD - {"number", "previous", "date", "base", "versions"})
        fields |= {"action": "revert", "target": number, "method": "revert"}
        fields |= {"request": [], "settings": {}, "effect": {}}
        return self._append(fields, None)

    def edit(self, number: int) -> Edit:
        """Read the edit of a record, onto JAX's first device.

        Raises:
            ValueError: the ledger has no such edit, or its record is damaged.
        """
        entries = self.entries
        if type(number) is not int or not 0 < number <= len(entries):
            raise ValueError(f"there is no entry {number!r}; there are {len(entries)}")
        return self._edit(entries[number - 1])

    def params(
        self, base_params: PyTree, upto: int | None = None, *, rebase: bool = False
    ) -> PyTree:
        """Return the base with the active edits, each by `apply_edit`, in their order.

        Args:
            base_params: the parameters that `create` was given.
            upto: the ledger as it was after this entry; 0: the base, None: as it is now.
            rebase: whether another base of the same shapes, a newer one, is taken knowingly.

        Returns:
            The parameters.

        Raises:
            ValueError: `base_params` are not the base and `rebase` is not given, a record is
                damaged, or a process sees other records, or was given something else, than the
                first.
        """
        found = self.base if rebase else params_hash(base_params)
        entries = self._agreed(upto, found)
        # Each process reads the parts that its devices hold; no device can be given another's.
        places = {path: sharding_of(leaf) for path, leaf in parameter_paths(base_params)}
        params = base_params
        for entry in entries:
            if entry.is_active:
                # Damage is an error in every process: an edit's programs run in all of them.
                edit = together(
                    f"reading {self.folder}", lambda entry=entry: self._edit(entry, places)
                )
                params = apply_edit(params, edit)
        return params

    def find(self, row: Any) -> tuple[Entry, ...]:
        """Return the records whose request had this row; this needs the ledger's secret."""
        digest = self._row_hash(row)
        return tuple(entry for entry in self.entries if digest in entry.request)

    def verify(self, *, head: str | None = None) -> tuple[Entry, ...]:
        """Check every byte of every record, the chain, and that each edit can be read.

        Args:
            head: a seal that `Ledger.head` was at some time, which must still be in the chain.

        Returns:
            The records.

        Raises:
            DamagedError: the first thing that is broken, by name.
        """
        entries = self._entries(is_complete=True)
        for entry in entries:
            if entry.action == "edit":
                self._edit(entry)
        if head is not None and head not in (self._base_seal, *(x.seal for x in entries)):
            raise DamagedError(f"{self.folder}: no record has the seal {head}; some were removed")
        return entries

    def asked(self, rows: Sequence[Any]) -> list[bool]:
        """Say of each row whether the request of an active edit had it; this needs the secret."""
        asked = {digest for entry in self.entries if entry.is_active for digest in entry.request}
        return [bool(asked) and self._row_hash(row) in asked for row in rows]

    def _entries(self, *, is_complete: bool) -> tuple[Entry, ...]:
        # Before the records: one that is appended meanwhile is then one too many, not too few.
        count, head = read_head(self.folder)
        names = sorted(
            x.name for x in os.scandir(self.folder / ENTRIES) if not x.name.startswith(TEMPORARY)
        )
        entries, previous = [], self._base_seal
        seals = [previous]
        for number, name in enumerate(names, 1):
            folder = self.folder / ENTRIES / name
            if name != f"{number:06d}":
                raise DamagedError(
                    f"{self.folder / ENTRIES}: entry {number:06d} is missing, {shown(name)} stands "
                    "in its place"
                )
            if folder.is_symlink() or not folder.is_dir():
                raise DamagedError(f"{folder}: is no folder")
            if is_complete:
                content, seal = read_sealed(folder, ENTRY_KIND)
            else:
                manifest = read_manifest(folder, ENTRY_KIND)
                content, seal = manifest["content"], manifest["seal"]
            entry = read_entry(content, seal, str(folder / MANIFEST))
            if entry.number != number or entry.previous != previous:
                raise DamagedError(
                    f"{folder}: does not follow on the record before it; one of them was changed, "
                    "removed or moved"
                )
            if entry.base != self.base:
                raise DamagedError(f"{folder}: is of another base")
            previous = seal
            seals.append(seal)
            entries.append(entry)
        if len(entries) < count:
            raise DamagedError(
                f"{self.folder / ENTRIES}: entry {len(entries) + 1:06d} is missing, there were "
                f"{count}"
            )
        # Records behind the head's are in order: a writer killed between record and head leaves
        # one.
        if seals[count] != head:
            raise DamagedError(f"{self.folder / HEAD}: names another record than entry {count:06d}")
        return with_activity(entries)

    def _agreed(self, upto: int | None, base: str) -> tuple[Entry, ...]:
        """Return the records that count: in every process those that the first has read.

        Raises:
            ValueError: the hash is not the base's, there are fewer records than `upto`, or a
                process was given something else than the first one.
        """
        own: list[tuple[Entry, ...]] = []
        upto = None if upto is None else operator.index(upto)

        def part(given: Any) -> None:
            entries = own.pop() if own else self.entries
            count, seal, *asked = given
            # Another program may have written since the first process read: what it wrote then
            # counts in no process.
            seals = [self._base_seal, *(x.seal for x in entries)]
            if asked != [upto, base] or len(entries) < count or seals[count] != seal:
                raise ValueError(
                    f"{self.folder}: this process sees other records, or was given another base "
                    "or another `upto`, than the first one"
                )
            own.append(with_activity(entries[:count]))

        def leading(spread: Spread) -> None:
            if base != self.base:
                raise ValueError(
                    f"{self.folder}: is of a base with hash {self.base[:16]}..., these params have "
                    f"{base[:16]}...; to put the edits on another base, say rebase=True"
                )
            entries = self.entries
            if upto is not None and not 0 <= upto <= len(entries):
                raise ValueError(f"upto={upto}: there are {len(entries)} entries")
            count = len(entries) if upto is None else upto
            own.append(entries)
            seal = entries[count - 1].seal if count else self._base_seal
            spread([count, seal, upto, base])

        led(f"choosing entries of {self.folder}", leading, part)
        return own[0]

    def _append(self, fields: dict[str, Any], arrays: Sequence[Array] | None) -> Entry:
        def work(write: Callable[[Path], Files]) -> list[Any]:
            check_room(self.folder, num_bytes(arrays or ()))
            return self._append_behind_lock(fields, None if arrays is None else write)

        # By the first of several processes alone, behind the lock; the others write their parts.
        number, seal = led_writing(f"writing to {self.folder}", fields, arrays or (), work)
        folder = self.folder / ENTRIES / f"{number:06d}"
        manifest = read_manifest(folder, ENTRY_KIND)
        if manifest["seal"] != seal:
            raise DamagedError(f"{folder}: is not what was written a moment ago")
        return read_entry(manifest["content"], seal, str(folder))

    def _append_behind_lock(
        self, fields: dict[str, Any], write: Callable[[Path], Files] | None
    ) -> list[Any]:
        """Append a record; return its number and its seal.

        Raises:
            ValueError: what is to be reverted is no active edit.
        """
        busy = f"{self.folder}: another process has been writing for {PATIENCE:.0f} s"
        with locked(self.folder / LOCK, busy=busy, patience=PATIENCE):
            # Of a writer that was killed; another that lives waits for the lock.
            for left in (self.folder / ENTRIES).glob(f"{TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)
            for left in self.folder.glob(f"{TEMPORARY}*"):
                left.unlink(missing_ok=True)
            entries = self.entries
            if fields["action"] == "revert":
                number = fields["target"]
                if type(number) is not int or not 0 < number <= len(entries):
                    raise ValueError(f"there is no entry {number}; there are {len(entries)}")
                if not entries[number - 1].is_active:
                    what = "reverted already"
                    if entries[number - 1].action != "edit":
                        what = "no edit"
                    raise ValueError(f"entry {number} is {what}")
            number = len(entries) + 1
            content = {
                **fields,
                "number": number,
                "previous": entries[-1].seal if entries else self._base_seal,
                "date": now(),
                "base": self.base,
                "versions": versions(),
            }
            folder = self.folder / ENTRIES / f"{number:06d}"
            read_entry(content, "", str(folder))  # what could not be read is not written
            # The record first: a head that is one behind is valid, one that is ahead is damage.
            seal = write_sealed(folder, ENTRY_KIND, content, write)
            write_head(self.folder, number, seal)
            return [number, seal]

    def _edit(self, entry: Entry, places: Mapping[str, Any] | None = None) -> Edit:
        folder = self.folder / ENTRIES / f"{entry.number:06d}"
        if entry.action != "edit":
            raise ValueError(f"{folder}: records no edit but a {entry.action}")
        content, seal = read_sealed(folder, ENTRY_KIND)
        # The chain was checked before this folder was read; it could have been exchanged in
        # between.
        if seal != entry.seal:
            raise DamagedError(f"{folder}: was changed while it was read")
        like = None
        if places:
            empty = edit_from_json(content["edit"], str(folder / MANIFEST))
            like = Edit({path: _placed(x, places.get(path)) for path, x in empty.blocks.items()})
        return read_tree(folder, content["edit"], edit_from_json, like=like)

    def _row_hash(self, row: Any) -> str:
        return row_hash(self.folder, row)


def _placed(block: Any, place: NamedSharding | None) -> Any:
    """Return a block's shapes with where they are to lie: as its parameter, or thin and whole."""
    if place is None:
        return block
    if isinstance(block, LowRank):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), block)


def _create(folder: Path, content: dict[str, Any]) -> None:
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder}: is there already; open it with Ledger(folder)")
    check_room(folder.parent, 0)
    with temporary_folder(folder.parent) as new:
        (new / ENTRIES).mkdir()
        (new / LOCK).touch(mode=0o600)
        # The mode is given as the file is made: with a chmod afterwards others could open it
        # before.
        handle = os.open(new / SECRET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        seal = write_sealed(new / BASE, BASE_KIND, content)
        write_head(new, 0, seal)
        for path in (new / SECRET, new / ENTRIES, new):
            sync(path)
        # Built beside its place and renamed: no reader meets a ledger without a base or a secret.
        os.rename(new, folder)
    sync(folder.parent)

"""Long jobs that go on where they were broken off, to the bit, whatever broke them off.

    estimate(..., checkpoint=Checkpoint("out/job", every=100))     and `unlearn`, `fit` likewise

Each save is a sealed folder (see `sealed`) `step-000000100`, written by a thread while the job goes
on and renamed when all of it is on the disk; the last two stay. A process that was killed at any
moment, also during a save, leaves the last one that was finished, and the same call again goes on
from there. What the job was given is compared by a salted hash; its functions cannot be.
"""

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.checkpoint.arrays import (
    byte_blocks,
    describe,
    described,
    num_bytes,
    read_arrays,
)
from jedit.checkpoint.disk import (
    check_room,
    locked,
    remove_abandoned,
    sync,
    temporary_folder,
    temporary_name,
)
from jedit.checkpoint.entry import is_digest
from jedit.checkpoint.json import pairs
from jedit.checkpoint.processes import led, led_writing, together
from jedit.checkpoint.sealed import (
    MANIFEST,
    DamagedError,
    Files,
    check_fields,
    read_sealed,
    seal_folder,
    shown,
)
from jedit.core.checks import COUNT, check_numbers
from jedit.core.paths import parameter_paths

KIND = "job"
STEP = re.compile(r"step-(\d{9})")
KEPT = 2
LOCK = "lock"


class Checkpoint:
    """Saves of one job, in a folder of its own.

    The job's result is, to the bit, that of the same call without interruption, on the same machine
    and versions. The saves hold the job's state and thereby something of its data: only
    their owner may enter them. A state on several devices comes back laid out as the fresh one,
    also on other devices than it was saved from; there the job goes on to rounding. A save copies
    the state on the device until it is written.

    Several processes of `jax.distributed` do a job together: they see one file system, and each
    writes the parts of the state that its devices hold. What each has for itself must be the same
    in all. A save counts when all have written, and what one cannot do is an error in all of them.
    """

    def __init__(self, folder: str | Path, *, every: int):
        """Say where and how often; nothing is written yet.

        Args:
            folder: a folder of this job alone; it is made if it is not there.
            every: how many steps (batches, for `estimate`) lie between saves.

        Raises:
            ValueError: `every` is below one.
        """
        check_numbers(COUNT, every=every)
        self.folder, self.every = Path(folder), every
        self._stack: contextlib.ExitStack | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, every={self.every})"

    def part(self, name: str, *, every: int | None = None) -> "Checkpoint":
        """Return the saves of one part of a job that has several, in a folder of its own in this.

        Args:
            name: the part's name: letters.
            every: how many steps lie between its saves; None: as many as here.
        """
        return Checkpoint(self.folder / name, every=self.every if every is None else every)

    def resume(
        self, job: str, given: PyTree, state: PyTree
    ) -> tuple[int, PyTree, dict[str, Array]]:
        """Begin the job, or go on with it; called by the job.

        Args:
            job: the name of the job.
            given: all arguments of the job that must be the same to go on: arrays, texts and
                numbers.
            state: the state before the first step.

        Returns:
            How many steps were done, the state after them, and the history that was saved.

        Raises:
            ValueError: the folder is of another job, or damaged.
            OSError: the folder is not writable, has too little room, or belongs to another process
                now.
        """
        if self._stack is not None:
            raise ValueError(f"{self.folder}: is in use by another job of this process")
        size = num_bytes([_stored(x) for x in jax.tree.leaves(state)])
        with contextlib.ExitStack() as stack:
            steps, salt = led(f"beginning {self.folder}", lambda _: self._begin(stack, size))
            self._done, self._steps = 0, 0
            # Without a salt, hashes of small or guessable data would tell what the data were.
            self._salt = bytes.fromhex(salt)
            self._expected = ""
            self._job = job
            history = {}
            if steps:
                # Only the newest is tried: a save whose bytes are wrong is damage to report, not to
                # step over.
                state, history = self._read(steps[-1], job, given, state)
            else:
                self._given = self._hash(given)
            # What the data of all steps so far hash to; each step's is added to it.
            self._seen = self._hash(())
            # Left before the lock is: a save comes to its end while no other process may begin.
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            self._pending: Future | None = None
            self._stack = stack.pop_all()
        return self._done, state, history

    def _begin(self, stack: contextlib.ExitStack, num_bytes: int) -> tuple[list[int], str]:
        """Take the folder, until the stack is left; the steps that are saved there, and a salt."""
        # One more than is kept: the new save is whole on the disk before an old one goes.
        check_room(self.folder, (KEPT + 1) * num_bytes)
        busy = f"{self.folder}: another process is at this job"
        stack.enter_context(locked(self.folder / LOCK, busy=busy))
        # Behind the lock: what looks abandoned could else be another process's save in the
        # making.
        remove_abandoned(self.folder)
        return self._saved(), secrets.token_hex(32)

    def see(self, data: PyTree) -> None:
        """Take note of a step's data; called by the job, for the steps that were done as well.

        Raises:
            ValueError: the steps that were done had other data.
        """
        # A chain, not a list: one digest says whether all data so far were the same, in the same
        # order.
        self._seen = self._hash((self._seen, data))
        self._steps += 1
        if self._steps == self._done:
            self._compare(
                self._seen,
                self._expected,
                f"{self.folder}: was begun with other data in its first {self._done} steps; remove "
                "the folder to begin anew",
            )

    def save(self, step: int, state: PyTree, history: Mapping[str, Array] | None = None) -> None:
        """Begin to write the state after a step; the job may overwrite it at once.

        Raises:
            ValueError: the state holds something that cannot come back as it is.
            OSError: the last save went wrong.
        """
        self._wait()
        stored = [(path, _stored(x)) for path, x in parameter_paths(state)]
        kept = [(name, jnp.asarray(x)) for name, x in (history or {}).items()]
        content = {
            "job": self._job,
            "step": step,
            "given": self._given,
            "seen": self._seen,
            "salt": self._salt.hex(),
            "state": [[path, describe(x)] for path, x in stored],
            "weak": [_is_weak(x, path) for path, x in parameter_paths(state)],
            "history": [[name, describe(x)] for name, x in kept],
        }
        # Copies: the job's next step is given the state's memory to write its own into.
        copies = [jnp.copy(x) for _, x in (*stored, *kept)]
        self._pending = self._pool.submit(self._write, content, copies)

    def close(self) -> None:
        """Wait for the last save and let go of the folder; called by the job.

        Raises:
            OSError: the last save went wrong.
        """
        if self._stack is None:
            return
        stack, self._stack = self._stack, None
        with stack:
            self._wait()

    def _compare(self, digest: str, expected: str, otherwise: str) -> None:
        """Refuse another digest than the save's, in all processes if one of them has it.

        Raises:
            ValueError: the digest is another.
        """

        def part() -> None:
            if digest != expected:
                raise ValueError(otherwise)

        together(f"comparing {self.folder}", part)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, content: dict[str, Any], arrays: Sequence[Array]) -> None:
        """Write, seal and rename a save, and drop what is too old; runs in the writing thread."""

        def work(write: Callable[[Path], Files]) -> None:
            with temporary_folder(self.folder) as new:
                files = write(new)
                seal_folder(new, KIND, content, files)
                if content["step"] in self._saved():
                    self._remove(content["step"])
                os.rename(new, self._place(content["step"]))
                sync(self.folder)  # only when the new save is on the disk may an old one go
                for step in self._saved()[:-KEPT]:
                    self._remove(step)

        led_writing(f"saving {self.folder}", content, arrays, work)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _remove(self, step: int) -> None:
        # Renamed first: a folder that is half removed must not look like a save.
        aside = temporary_name(self.folder)
        os.rename(self._place(step), aside)
        shutil.rmtree(aside)

    def _saved(self) -> list[int]:
        found = (STEP.fullmatch(entry.name) for entry in os.scandir(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def _read(
        self, step: int, job: str, given: PyTree, state: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        folder = self._place(step)
        source = str(folder / MANIFEST)
        content = self._checked(folder)
        fields = {"job", "step", "given", "seen", "salt", "state", "weak", "history"}
        check_fields(content, fields, source)
        digests = all(is_digest(content[name]) for name in ("given", "seen", "salt"))
        if not digests or content["step"] != step or type(content["step"]) is not int:
            raise DamagedError(f"{source}: is no save of step {step}")
        if content["job"] != job:
            raise ValueError(f"{self.folder}: is of {shown(content['job'])}, not of {job!r}")
        self._salt = bytes.fromhex(content["salt"])
        self._given = self._hash(given)
        self._compare(
            self._given,
            content["given"],
            f"{self.folder}: was begun with other parameters, data, settings or another key; "
            "remove the folder to begin anew",
        )
        self._done, self._expected = step, content["seen"]
        named = parameter_paths(state)
        fresh = [x for _, x in named]
        specs = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_several(x))
            for x in map(_stored, fresh)
        ]
        # What is read is laid out as the fresh state: of the file it is only asked to be the same.
        expected = [[path, describe(spec)] for (path, _), spec in zip(named, specs, strict=True)]
        weak = content["weak"]
        if type(content["state"]) is not list or type(weak) is not list:
            raise DamagedError(f"{source}: state and weak must be lists")
        for one, other in itertools.zip_longest(content["state"], expected):
            if one != other:
                raise ValueError(f"{source}: holds {shown(one)}, the job has {shown(other)}")
        if len(weak) != len(fresh):
            raise DamagedError(f"{source}: {shown(weak)} does not say of each array if it is weak")
        history = [(name, described(x, source)) for name, x in pairs(content["history"], source)]
        specs_of_all = [*specs, *(spec for _, spec in history)]
        read = together(f"loading {folder}", lambda: read_arrays(folder, specs_of_all))
        leaves = [
            _as_it_was(x, is_weak is True, like)
            for x, is_weak, like in zip(read[: len(specs)], weak, fresh, strict=True)
        ]
        kept = {name: x for (name, _), x in zip(history, read[len(specs) :], strict=True)}
        return jax.tree.unflatten(jax.tree.structure(state), leaves), kept

    def _checked(self, folder: Path) -> dict[str, Any]:
        """Check a save, every byte of it, each of several processes some of the files."""
        share = slice(jax.process_index(), None, jax.process_count())
        return together(f"reading {folder}", lambda: read_sealed(folder, KIND, share=share)[0])

    def _hash(self, given: PyTree) -> str:
        digest = hashlib.blake2b(key=self._salt, digest_size=32)
        for path, leaf in parameter_paths(given):
            if isinstance(leaf, jax.Array | np.ndarray | np.generic):
                array = _stored(leaf)
                size = num_bytes([array])
                head, bodies = f"{array.dtype} {array.shape}", byte_blocks(array)
            elif isinstance(leaf, str | int | float):
                head, bodies = type(leaf).__name__, [repr(leaf).encode()]
                size = len(bodies[0])
            else:
                continue  # a function: it cannot be compared
            # The length first: "ab", "c" and "a", "bc" would else hash alike.
            for part in (path.encode(), head.encode()):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
            digest.update(size.to_bytes(8, "big"))
            for body in bodies:
                digest.update(body)
        return digest.hexdigest()


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _stored(x: Any) -> Array:
    """Return what is written of a leaf: of a random key its numbers."""
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


def _several(x: Any) -> Any:
    """Return a leaf's sharding, if it lies on several devices."""
    sharding = getattr(x, "sharding", None)
    return None if sharding is None or len(sharding.device_set) == 1 else sharding


def _is_weak(x: Any, path: str) -> bool:
    """Return whether a leaf's dtype gives way to others', as a Python number's does.

    Raises:
        ValueError: the dtype gives way, and no Python number would come back as such a leaf.
    """
    if not getattr(x, "weak_type", False):
        return False
    again = jnp.asarray(x.item()) if x.ndim == 0 else None
    if again is None or again.dtype != x.dtype:
        raise ValueError(
            f"{path or 'the state'}: is weakly typed, {x.dtype} {x.shape}, and would not come back "
            "so; give it a dtype of its own"
        )
    return True


def _as_it_was(x: Array, is_weak: bool, like: Any) -> Array:
    if is_weak:
        # Only a Python number makes an array weakly typed again; with another type a program would
        # be compiled anew and its sums could round otherwise.
        return jnp.asarray(x.item())
    if _several(like) is None:
        x = jnp.array(np.asarray(x))  # bound to no device, as what a program is given mostly is
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if _is_key(like) else x

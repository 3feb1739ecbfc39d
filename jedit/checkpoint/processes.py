"""Several processes at one folder: the first leads, the others do their part, all see one outcome.

What the first process does alone (locks, manifests, renames) stands in a function, `work`; what
every process does when the first one asks for it (writing the parts of arrays that it holds) in
another, `part`. What `work` returns or raises is returned or raised in every process, so that none
goes on where another has failed. A process that does not come is named after `PATIENCE` seconds;
one that has come may take as long as it lives, for large parts take hours. Whether it lives is for
`jax.distributed` to find out, which ends the others.

Messages go through the store of `jax.distributed`, not through the devices: a thread may then wait
for them while programs run, whose collectives every process has to start in one order. All
processes see one file system, as one user, and give a folder the same name.
"""

import builtins
import contextlib
import errno
import hashlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from jedit.checkpoint.arrays import ARRAYS, num_bytes, write_parts
from jedit.checkpoint.sealed import DamagedError, Files, file_hashes

PATIENCE = 600.0  # seconds that a process waits for another to come (arbitrary)
LOOK = 60.0  # seconds after which it asks again for the word of one that has come (arbitrary)
Outcome = TypeVar("Outcome")
Spread = Callable[[Any], list[Any]]

_calls: dict[str, int] = {}
_calls_lock = threading.Lock()


def led(
    name: str, work: Callable[[Spread], Outcome], part: Callable[[Any], Any] | None = None
) -> Outcome:
    """Let the first process do a piece of work; called by every process, as with a collective.

    Args:
        name: what is done and where; not twice at one time.
        work: `work(spread) -> outcome`, called in the first process. `spread(given)` calls `part`
            in every process and returns what each returned, by the number of the process.
        part: `part(given) -> answer`; None: there is nothing for the others to do.

    `given`, answers and the outcome are plain JSON.

    Returns:
        The outcome, in every process.

    Raises:
        TimeoutError: a process does not come; the message says which.
        ConnectionError: the processes have lost each other.
        Exception: what `work` raised, in every process, also where it was the part of another.
    """
    part = part or (lambda _: None)
    if jax.process_count() == 1:
        return work(lambda given: [part(given)])
    channel = _Channel(name)
    return _follow(channel, part) if jax.process_index() else _lead(channel, work, part)


def together(name: str, part: Callable[[], Outcome]) -> Outcome:
    """Let every process do its part, and none go on before all have done it.

    Returns:
        What this process's part returned.

    Raises:
        Exception: what a part raised, in every process; and what `led` raises.
    """
    own = []
    led(name, lambda spread: spread(None)[0], lambda _: own.append(part()))
    return own[0]


def led_writing(
    name: str,
    content: Mapping[str, Any],
    arrays: Sequence[Array | np.ndarray],
    work: Callable[[Callable[[Path], Files]], Outcome],
) -> Outcome:
    """Let the first process make a folder whose arrays every process writes its parts of.

    Args:
        name: as for `led`.
        content: what the folder is about, plain JSON, which must be the same in every process.
        arrays: the arrays. Of one that each process has for itself the first one's is written.
        work: `work(write) -> outcome`, called in the first process; `write(folder)` writes the
            arrays into `folder/arrays`, and returns their sizes and hashes when all of them are on
            the disk.

    Returns:
        The outcome, in every process.

    Raises:
        ValueError: a process was given something else than the first.
        OSError: the disk is full, or refuses for another reason; what `led` raises is raised too.
    """
    text = json.dumps(content, sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    sizes = {f"{ARRAYS}/{i}": num_bytes([x]) for i, x in enumerate(arrays) if x.size}

    def part(given: Any) -> Any:
        if "compare" in given:
            if given["compare"] != digest:
                raise ValueError(
                    f"{name}: this process was given something else than the first one"
                )
            return None
        if "hash" in given:
            # Each hashes some of the files; the first would else keep all the others waiting. By
            # their names: a network's disk may list a folder without what others wrote into it.
            mine = list(sizes)[jax.process_index() :: jax.process_count()]
            return file_hashes(Path(given["hash"]), mine)
        folder = Path(given["write"])
        if not folder.is_dir():
            sentence = "is not seen by this process; all processes need one file system"
            raise OSError(errno.ENOENT, sentence, str(folder))
        return write_parts(folder, arrays)

    def leading(spread: Spread) -> Outcome:
        def write(folder: Path) -> Files:
            (folder / ARRAYS).mkdir(mode=0o700)
            counts = spread({"write": str(folder)})
            for i, (array, *written) in enumerate(zip(arrays, *counts, strict=True)):
                # A part that nobody holds, or that two have written, must not become zeros.
                if sum(written) != array.size:
                    raise ValueError(
                        f"{name}: of array {i}, {array.dtype} {array.shape}, the processes hold "
                        f"{written} elements; it must lie whole in the first process, or on a mesh"
                    )
            hashed = spread({"hash": str(folder)})
            files = {file: found for share in hashed for file, found in share.items()}
            for file, size in sizes.items():
                if (found := files[file][0]) != size:
                    sentence = f"has {found} bytes, {size} were written"
                    raise OSError(errno.EIO, sentence, str(folder / file))
            return files

        # First of all, for what writes no arrays as well: no outcome is another call's.
        spread({"compare": digest})
        return work(write)

    return led(name, leading, part)


class _Channel:
    """The messages of one call of `led`."""

    def __init__(self, name: str):
        from jax._src import distributed  # JAX has no public door to its own store

        self.client: Any = distributed.global_state.client
        if self.client is None:
            raise RuntimeError(f"{name}: several processes, and jax.distributed is not initialized")
        self.name, self.rank = name, jax.process_index()
        with _calls_lock:
            self.call = _calls[name] = _calls.get(name, -1) + 1
        self.come: set[int] = set()
        self.until: float | None = None  # when all have to have come
        self.tell(f"come/{self.rank}", {})

    def tell(self, key: str, message: Mapping[str, Any]) -> None:
        self.client.key_value_set(self._key(self.call, key), json.dumps(message))

    def hear(self, key: str, process: int) -> dict[str, Any]:
        """Return the message of a process, which must have come and then may take its time.

        Raises:
            TimeoutError: it does not come.
            ConnectionError: it is lost.
        """
        if process not in self.come:
            # One patience for all: whoever is asked for last has had the time of those before.
            self.until = self.until or time.monotonic() + PATIENCE
            left = max(self.until - time.monotonic(), min(PATIENCE, 1))
            if self._got(f"come/{process}", process, left) is None:
                raise TimeoutError(
                    f"{self.name}: process {self.rank} has waited {PATIENCE:g} s for process "
                    f"{process}; every process must make this call, with the same folder"
                )
            self.come.add(process)
        while (message := self._got(key, process, LOOK)) is None:
            pass
        return message

    def _got(self, key: str, process: int, seconds: float) -> dict[str, Any] | None:
        milliseconds = max(int(seconds * 1000), 1)
        try:
            text = self.client.blocking_key_value_get(self._key(self.call, key), milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise ConnectionError(
                f"{self.name}: process {self.rank} has lost process {process}: {error}"
            ) from None
        return json.loads(text)

    def forget_the_last(self) -> None:
        """Drop the messages of the call before, which every process is known to have left."""
        if self.call:
            self.client.key_value_delete(self._key(self.call - 1, ""))

    def _key(self, call: int, key: str) -> str:
        return f"jedit/{ascii(self.name)}/{call}/{key}"


def _lead(channel: _Channel, work: Callable[[Spread], Outcome], part: Callable) -> Outcome:
    turns = itertools.count()

    def spread(given: Any) -> list[Any]:
        turn = next(turns)
        channel.tell(f"{turn}/all", {"do": given})
        answers, errors = [], []
        try:
            answers.append(part(given))
        except Exception as error:  # whatever it is, the others must be heard and told of it
            errors.append(error)
        # All are heard before the first error is raised: `work` then cleans up, and whoever is
        # still at its part would leave files behind that.
        for process in range(1, jax.process_count()):
            try:
                answer = channel.hear(f"{turn}/{process}", process)
            except (TimeoutError, ConnectionError) as error:
                errors.append(error)
                continue
            if "error" in answer:
                errors.append(_error(answer["error"], f"process {process}: "))
            else:
                answers.append(answer["answer"])
        if errors:
            raise errors[0]
        channel.forget_the_last()
        return answers

    try:
        outcome = work(spread)
    except BaseException as error:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody may be there to hear it
            channel.tell(f"{next(turns)}/all", {"error": _told(error)})
        raise
    channel.tell(f"{next(turns)}/all", {"outcome": outcome})
    return outcome


def _follow(channel: _Channel, part: Callable) -> Any:
    own: BaseException | None = None
    for turn in itertools.count():
        try:
            message = channel.hear(f"{turn}/all", 0)
        except BaseException as error:
            # It has come, and goes again: the first would else wait for it as long as it lives.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                channel.tell(f"{turn}/{channel.rank}", {"error": _told(error)})
            raise
        if "outcome" in message:
            return message["outcome"]
        if "error" in message:
            raise _error(message["error"]) from own
        try:
            answer = {"answer": part(message["do"])}
        except BaseException as error:
            own, answer = error, {"error": _told(error)}
        channel.tell(f"{turn}/{channel.rank}", answer)
        if own is not None and not isinstance(own, Exception):
            raise own
    raise AssertionError("unreachable")


def _told(error: BaseException) -> list[Any]:
    """Return an error as plain JSON."""
    if isinstance(error, OSError) and isinstance(error.errno, int):
        name = None if error.filename is None else str(error.filename)
        return ["OSError", error.errno, str(error.strerror), name]
    known = (c.__name__ for c in type(error).__mro__ if _exception(c.__name__) is not None)
    return [next(known, "RuntimeError"), str(error)]


def _error(told: list[Any], prefix: str = "") -> Exception:
    name, *rest = told
    if name == "OSError" and len(rest) == 3:
        return OSError(rest[0], prefix + rest[1], rest[2])  # of the class that its number says
    kind = _exception(name) or RuntimeError
    return kind(prefix + rest[0])


def _exception(name: str) -> type[Exception] | None:
    """Return the exception of this name, of those that a sentence alone makes."""
    if name == DamagedError.__name__:
        return DamagedError
    allowed = {"ValueError", "TypeError", "OSError", "TimeoutError", "ConnectionError"}
    return getattr(builtins, name) if name in allowed else None

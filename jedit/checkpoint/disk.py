"""Folders written aside, brought to the disk, renamed and locked, with room looked for before.

A rename is the only step that a reader can see. All that the folder holds is brought to the disk
before it, and the list of names that the rename changed after it: in any other order a power cut
could leave a name whose files are empty.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl  # Unix has it; all but the locks works without
except ImportError:
    fcntl = None

TEMPORARY = ".tmp-"
ABANDONED = re.compile(r"\.tmp-[0-9a-f]{16}")
SPARE_BYTES = 2**20  # of a disk, beside what the arrays take


def temporary_name(parent: Path) -> Path:
    """Return a new name in a folder, of those that `remove_abandoned` knows."""
    return parent / f"{TEMPORARY}{secrets.token_hex(8)}"


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that only its owner may enter, and that is gone afterwards unless renamed.

    What processes that were killed have left there goes first: it may hold what was to be
    forgotten. A process that lives holds a lock on its folder.

    Yields:
        The folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent)
    for _ in range(3):  # whoever cleans up at this moment may take it for one without an owner
        new = temporary_name(parent)
        new.mkdir(mode=0o700)
        handle = _held(new)
        if new.is_dir():  # with or without a lock, where the file system has none
            break
        if handle is not None:
            os.close(handle)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed."""
    for entry in list(os.scandir(parent)):
        if ABANDONED.fullmatch(entry.name) is None or not entry.is_dir(follow_symlinks=False):
            continue
        handle = _held(Path(entry.path))
        if handle is not None:
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(handle)


def _held(folder: Path) -> int | None:
    """Return a lock on a folder until it is closed, or the process ends; None: another has it."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone, or another user's
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or a file system without locks
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def locked(path: Path, *, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Be the only process at something, until the end of the block or of the process.

    Args:
        path: the file that is locked; it is made if it is not there, and never removed: whoever
            removed it would leave two processes with locks on two files of one name.
        busy: the text of the error.
        patience: seconds to wait for another process.

    Yields:
        Nothing.

    Raises:
        TimeoutError: another process holds the lock all the time.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + patience
        while fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TimeoutError(errno.ETIMEDOUT, busy) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def check_room(folder: Path, num_bytes: int) -> None:
    """Find out before the work, not after it, that a folder cannot take its result.

    A file is written there and removed; the folder is made if it is not there.

    Raises:
        OSError: the folder is not writable, or its disk has less than `num_bytes` left.
    """
    probe = temporary_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("xb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(error.errno, f"{folder}: cannot be written to ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    free, needed = shutil.disk_usage(folder).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise OSError(errno.ENOSPC, f"{folder}: needs {needed:,} bytes, its disk has {free:,} left")

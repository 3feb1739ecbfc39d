"""Checks of a command line before any work: what no command can do anything with is refused."""

import dataclasses
import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_DIGITS = 100  # of a number; arbitrary, Python itself reads some thousands
MAX_SEED = 2**32 - 1  # a larger one is cut off where JAX has 32 bits
SHOWN = 60
# What a full disk, or one that may not be written to, says in the middle of the work.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


class UsageError(Exception):
    """An error that the user can mend; it is shown as one sentence, with exit code 2."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse texts that cannot be written into a report, and numbers that nothing counts to.

    Raises:
        UsageError: an argument that is refused, by its name.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{shortened(argument)}: is no valid UTF-8 text.") from None
        number = argument.rpartition("=")[2].lstrip("+-")
        if number.isdigit() and len(number) > MAX_DIGITS:
            raise UsageError(f"{shortened(argument)}: is a number of {len(number):,} digits.")


def check_options(options: Any) -> None:
    """Refuse a seed out of range, names that no file can have, and an --out that is a dead link.

    Args:
        options: the options of a command, a dataclass.

    Raises:
        UsageError: an option that is refused, by its name.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for seed in {"seed": (value,), "seeds": value}.get(field.name, ()):
            if not 0 <= seed <= MAX_SEED:
                raise UsageError(f"--{field.name} must lie in 0 to {MAX_SEED}, got {seed}.")
        if field.name == "data" and isinstance(value, str):
            value = Path(value)
        if isinstance(value, Path):
            _check_path(value, is_output=field.name == "out")


def disk_sentence(error: OSError) -> str:
    """Say what a disk refused that is full or may not be written to.

    Raises:
        OSError: the error is of another kind, and goes on its way.
    """
    if error.errno not in DISK_ERRORS:
        raise error
    reason = error.strerror or os.strerror(error.errno)
    return reason if error.filename is None else f"{shortened(error.filename)}: {reason}"


def shortened(text: str | Path) -> str:
    """Return a text as one line of printable characters, not too long."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 15]}...{text[-12:]}"


def _check_path(path: Path, *, is_output: bool) -> None:
    try:
        path.lstat()
        is_there = path.exists()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise UsageError(f"{shortened(path)}: is no usable name ({reason}).") from None
    if is_output and not is_there:
        raise UsageError(
            f"{shortened(path)}: is a link to {shortened(os.readlink(path))}, which is not there; "
            "remove it, or give another --out."
        )

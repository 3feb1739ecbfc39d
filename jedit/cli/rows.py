"""What commands on rows of one's own share: the rows that are named, and checks of numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.cli.checks import UsageError
from jedit.core.checks import Range, check_numbers

if TYPE_CHECKING:
    from jedit.data import QaRow

Rows = tuple[list["QaRow"], list["QaRow"], list["QaRow"]]


def rows_of_file(data: Path, forget: str, retain: str) -> Rows:
    """Read all rows of a file, those to forget and those to keep.

    Raises:
        UsageError: a file or a selector that is refused, or fewer than two rows to keep.
    """
    from jedit.data import DataError, read_rows, select_rows

    try:
        rows = read_rows(data)
        gone, kept = select_rows(rows, forget, retain)
    except DataError as error:
        raise UsageError(str(error)) from None
    if len(kept) < 2:
        raise UsageError(
            f"{data}: {len(kept)} row to retain; at least 2 are needed, one for the "
            "edits to see and one to judge them."
        )
    return rows, gone, kept


def check_option_numbers(options: Any, numbers: Mapping[Range, Sequence[str]]) -> None:
    """Refuse options out of their range, by the names that the user knows.

    Raises:
        UsageError: the first such option.
    """
    try:
        for allowed, names in numbers.items():
            for name in names:
                check_numbers(allowed, **{option(name): getattr(options, name)})
    except ValueError as error:
        raise UsageError(f"{error}.") from None


def option(name: str) -> str:
    """Return an option as it is written."""
    return f"--{name.replace('_', '-')}"

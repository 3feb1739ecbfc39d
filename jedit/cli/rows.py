"""What commands on rows of one's own share: the rows that are named, and checks of numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.cli.checks import UsageError
from jedit.core.checks import COUNT, Range, check_numbers

if TYPE_CHECKING:
    from jedit.curvature import Factorize
    from jedit.data import QaRow

Rows = tuple[list["QaRow"], list["QaRow"], list["QaRow"]]


def rows_of_file(data: Path, forget: str, retain: str, *, is_priced: bool = False) -> Rows:
    """Read all rows of a file, those to forget and those to keep.

    Args:
        data: the file.
        forget: selector of the rows to forget.
        retain: selector of those to keep.
        is_priced: whether one of these is also needed to price an edit on.

    Raises:
        UsageError: a file or a selector that is refused, or too few rows to keep: fewer than two,
            or than three where one is needed for the price.
    """
    from jedit.data import DataError, read_rows, select_rows

    try:
        rows = read_rows(data)
        gone, kept = select_rows(rows, forget, retain)
    except DataError as error:
        raise UsageError(str(error)) from None
    least = 3 if is_priced else 2
    if len(kept) < least:
        raise UsageError(
            f"{data}: {len(kept)} row{'s' * (len(kept) != 1)} to retain; at least {least} are "
            f"needed, one for the edits to see{', one to price them' * is_priced} and one to judge "
            "them."
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


def factorize_of(options: Any) -> "Factorize":
    """Return how a command is told to keep the factors of curvatures: by itself "auto".

    With a rank alone all factors that are longer keep as many eigenvectors.

    Raises:
        UsageError: numbers out of their range, or two settings that exclude each other.
    """
    from jedit.curvature import Factorize

    numbers = [name for name in ("rank", "max_dim") if hasattr(options, name)]
    check_option_numbers(options, {COUNT: numbers})
    by = options.factorize or ("auto" if options.rank is None else "eigh")
    try:
        return Factorize(by, options.rank, getattr(options, "max_dim", Factorize.max_dim))
    except ValueError as error:
        raise UsageError(f"--factorize {by}, --rank {options.rank}: {error}.") from None


def option(name: str) -> str:
    """Return an option as it is written."""
    return f"--{name.replace('_', '-')}"

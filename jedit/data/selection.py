"""Which rows to forget and which to retain, by file or by a short expression.

A selector is one of

    path/to/file.jsonl        the rows of that file, each of which must stand in the data
    author=NAME[,NAME...]     the rows whose `author` field is one of the names
    rows=START:STOP[,...]     rows by number, counted from 0 as in Python; START or STOP may be left
                              out, and STOP is the first row that is not meant
    rest                      (retain only, the default) every row that is not forgotten

A text that begins with "author=" or "rows=" is an expression, and every other but "rest" a path.
"""

import re
from collections.abc import Sequence

from jedit.data.jsonl import DataError, QaRow, read_rows

_RANGE = re.compile(r"(\d{0,18}):(\d{0,18})")


def select_rows(
    data: Sequence[QaRow], forget: str, retain: str = "rest"
) -> tuple[list[QaRow], list[QaRow]]:
    """Split the data into the rows to forget and the rows to retain.

    Rows of neither belong to neither. Rows from a file keep that file's paraphrases and wrong
    answers.

    Args:
        data: everything the model is trained on.
        forget: a selector.
        retain: a selector, or "rest".

    Returns:
        The forget rows and the retain rows; no row is in both.

    Raises:
        DataError: a selector that cannot be read, finds nothing, or finds rows outside the data; or
            a row in both sets.
    """
    if forget.strip() == "rest":
        raise DataError('forget: "rest" is for retain; say which rows to forget.')
    forgotten = _select(data, forget, "forget")
    if retain.strip() == "rest":
        identities = {row.identity for row in forgotten}
        kept = [row for row in data if row.identity not in identities]
        if not kept:
            raise DataError(f"retain: {forget!r} forgets all {len(data)} rows; none is left.")
        return forgotten, kept
    kept = _select(data, retain, "retain")
    check_disjoint(forgotten, kept)
    return forgotten, kept


def check_disjoint(forget: Sequence[QaRow], retain: Sequence[QaRow]) -> None:
    """Refuse forget rows that also stand in retain, whatever their spacing.

    Args:
        forget: rows to forget.
        retain: rows to retain.

    Raises:
        DataError: a row is in both; the message names both places of the first, and their number.
    """
    places = {row.identity: row for row in reversed(retain)}
    shared = [row for row in forget if row.identity in places]
    if shared:
        first = shared[0]
        raise DataError(
            f"{first.where}: this row to forget also stands in retain, at "
            f"{places[first.identity].where} ({len(shared)} of {len(forget)} rows to forget do). "
            "Take them out of one of the two."
        )


def _select(data: Sequence[QaRow], selector: str, role: str) -> list[QaRow]:
    selector = selector.strip()
    if not selector:
        raise DataError(f"{role}: no rows are named; give a file, author=NAME or rows=START:STOP.")
    if selector.startswith("author="):
        return _by_author(data, selector.removeprefix("author="), role)
    if selector.startswith("rows="):
        return _by_number(data, selector.removeprefix("rows="), role)
    return _by_file(data, selector, role)


def _by_file(data: Sequence[QaRow], path: str, role: str) -> list[QaRow]:
    rows = read_rows(path)
    known = {row.identity for row in data}
    strangers = [row for row in rows if row.identity not in known]
    if strangers:
        place = data[0].file if data else ""
        raise DataError(
            f"{strangers[0].where}: this row to {role} is not in the data"
            f"{f' ({place})' if place else ''}, so the model is never trained on it "
            f"({len(strangers)} of {len(rows)} rows are not)."
        )
    return rows


def _by_author(data: Sequence[QaRow], names: str, role: str) -> list[QaRow]:
    place = data[0].file if data and data[0].file else "the data"
    known = {row.author for row in data if row.author is not None}
    if not known:
        raise DataError(
            f'{role}: author=... needs the field "author", which no row of {place} has.'
        )
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if not wanted:
        raise DataError(f"{role}: author= names nobody; write author=NAME or author=NAME,NAME.")
    if missing := sorted(wanted - known):
        some = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise DataError(f"{role}: {place} has no rows of author {missing[0]!r}; it has {some}.")
    return [row for row in data if row.author in wanted]


def _by_number(data: Sequence[QaRow], ranges: str, role: str) -> list[QaRow]:
    chosen: set[int] = set()
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise DataError(
                f"{role}: rows={ranges[:60]!s} is not of the form rows=START:STOP, as rows=0:40."
            )
        start, stop = int(match[1] or 0), int(match[2] or len(data))
        if not start < stop <= len(data):
            raise DataError(
                f"{role}: rows={part.strip()} selects nothing or reaches past the end: there are "
                f"{len(data)} rows, numbered from 0, and STOP is the first row left out."
            )
        chosen.update(range(start, stop))
    return [data[i] for i in sorted(chosen)]

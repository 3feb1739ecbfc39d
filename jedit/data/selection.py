"""Which rows to forget and which to retain, by file or by a short expression.

A selector is one of

    path/to/file.jsonl        the rows of that file, each of which must stand in the data
    FIELD=VALUE[,VALUE...]    the rows whose field is one of the values: author=Jane Doe, topic=war
    rows=START:STOP[,...]     rows by number, counted from 0 as in Python; START or STOP may be left
                              out, and STOP is the first row that is not meant
    rest                      (retain only, the default) every row that is not forgotten

A text with "=" in it, and neither "/" nor "." before that, is an expression; every other but "rest"
is a path (a file named a=b is ./a=b). One value may have commas in it if all of the text is it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from jedit.data.jsonl import DataError, QaRow, Scalar, read_rows

_FIELD = re.compile(r"([^=/\\.]+)=(.*)", re.DOTALL)
_RANGE = re.compile(r"(\d{0,18}):(\d{0,18})")


def select_rows(
    data: Sequence[QaRow], forget: str, retain: str = "rest"
) -> tuple[list[QaRow], list[QaRow]]:
    """Split the data into the rows to forget and the rows to retain.

    A row that neither selector names is in neither part. Rows from a file keep that file's
    paraphrases and wrong answers.

    Args:
        data: everything the model is trained on.
        forget: a selector, as this module's docstring lists them; `rows_with` selects by a field's
            value without one.
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


def rows_with(data: Sequence[QaRow], field: str, values: Sequence[Scalar]) -> list[QaRow]:
    """Return the rows of which a field has one of the values.

    Values are compared as they are written in JSON, a text without its quotation marks: 3 and "3"
    are the same, and so are True and "true". Spaces around a value do not count.

    Args:
        data: rows to choose from.
        field: "question", "answer", or a name in the rows' `fields`.
        values: values that the field may have; each has to be that of a row.

    Returns:
        The rows, in the order of the data.

    Raises:
        DataError: no row has the field, or none has one of the values; the message says which
            fields, or some of the values, there are.
    """
    place = data[0].file if data and data[0].file else "the data"
    found = [_scalars(row).get(field) for row in data]
    known = {value for value in found if value is not None}
    if not known:
        names = sorted({name for row in data for name in _scalars(row)})
        raise DataError(f'no row of {place} has the field "{field}"; there are {", ".join(names)}.')
    wanted = {_written(value) for value in values}
    if missing := sorted(wanted - known):
        some = ", ".join(sorted(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise DataError(f"{place} has no rows of {field} {missing[0]!r}; it has {some}.")
    return [row for row, value in zip(data, found, strict=True) if value in wanted]


def check_disjoint(forget: Sequence[QaRow], retain: Sequence[QaRow]) -> None:
    """Refuse forget rows that also stand in retain, whatever their spacing.

    Args:
        forget: the rows to forget.
        retain: the rows to retain.

    Raises:
        DataError: a row is in both; the message names both places of the first, and their number.
    """
    # Reversed, so that of equal rows the first in the file is the one that is named.
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
        raise DataError(f"{role}: no rows are named; give a file, FIELD=VALUE or rows=START:STOP.")
    match = _FIELD.fullmatch(selector)
    if match is None:
        return _by_file(data, selector, role)
    field, value = match[1].strip(), match[2].strip()
    return (_by_number if field == "rows" else _by_field)(data, field, value, role)


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


def _by_field(data: Sequence[QaRow], field: str, value: str, role: str) -> list[QaRow]:
    # A value with a comma in it is tried whole first: only then is the comma a separator.
    is_one = any(_scalars(row).get(field) == value for row in data)
    values = [value] if is_one else [part for part in value.split(",") if part.strip()]
    if not values:
        raise DataError(f"{role}: {field}= names no value; write {field}=VALUE[,VALUE].")
    try:
        return rows_with(data, field, values)
    except DataError as error:
        path = f"{field}={value}"
        hint = f" The file of that name is ./{path}" if Path(path).is_file() else ""
        raise DataError(f"{role}: {error}{hint}") from None


def _scalars(row: QaRow) -> dict[str, str]:
    """Return what a row can be selected by, as `rows_with` compares it."""
    named = {"question": row.question, "answer": row.answer, **row.fields}
    return {name: _written(value) for name, value in named.items()}


def _written(value: Scalar) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _by_number(data: Sequence[QaRow], field: str, ranges: str, role: str) -> list[QaRow]:
    chosen: set[int] = set()
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise DataError(
                f"{role}: {field}={ranges[:60]} is not of the form rows=START:STOP, as rows=0:40."
            )
        start, stop = int(match[1] or 0), int(match[2] or len(data))
        if not start < stop <= len(data):
            raise DataError(
                f"{role}: {field}={part.strip()} selects nothing or reaches past the end: there "
                f"are {len(data)} rows, numbered from 0, and STOP is the first row left out."
            )
        chosen.update(range(start, stop))
    return [data[i] for i in sorted(chosen)]

"""Question-answer files: JSON lines with the fields of TOFU.

One object stands on each line. It needs `question` and `answer`, and may have
`paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (a list of wrong answers) and
`forget_span`, which says what of the answer is to be forgotten: a text, wherever it occurs there; a
range of characters, [begin, end]; or a list of such. A row that has `text` in their place is a
text without a question: its answer is the text. Every
other field whose value is a text, a number or a truth value (an author, a topic, ...) is kept, so
that rows can be selected by it; lists and objects are ignored. TOFU's own files, the perturbed ones
too, are of this form.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Scalar = str | int | float | bool
TEXTS = ("question", "answer", "paraphrased_question", "paraphrased_answer")


class DataError(ValueError):
    """An error that names the file, and the line in it, which cannot be used."""


class QaRow(NamedTuple):
    """One question with its answer.

    Attributes:
        question: text of the question; empty for a text that answers none.
        answer: text of its right answer.
        paraphrased_question: the question in other words, or None.
        paraphrased_answer: the right answer in other words, or None.
        perturbed_answer: wrong answers; empty when the file gives none.
        forget_span: what of the answer is to be forgotten, as ranges of characters; empty: all.
        fields: all else that is known of the row, by name: its author, its topic, ...
        file: the file that the row comes from.
        line: number of the row's line in the file, from 1; 0 for a row that no file holds.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answer: tuple[str, ...] = ()
    forget_span: tuple[tuple[int, int], ...] = ()
    fields: Mapping[str, Scalar] = {}  # a mapping has no way to change it: all rows may share this
    file: str = ""
    line: int = 0

    def __hash__(self) -> int:
        # A mapping has no hash; equal rows have equal ones without it.
        return hash((self.question, self.answer, self.file, self.line))

    @property
    def where(self) -> str:
        """Return the row's place, "file:line", for messages."""
        return (
            f"{self.file}:{self.line}" if self.line else f"the row {self.question or self.answer!r}"
        )

    @property
    def identity(self) -> tuple[str, str]:
        """Return what makes two rows the same: question and answer, whatever the spacing."""
        return " ".join(self.question.split()), " ".join(self.answer.split())


def read_rows(path: str | Path) -> list[QaRow]:
    """Read a question-answer file; its blank lines are skipped.

    Args:
        path: a file of JSON lines.

    Returns:
        The rows, in the order of the file.

    Raises:
        DataError: no such file, not text, no rows, or a line that is not an object with the fields.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    # Not splitlines(): it also splits at separators that may stand unescaped inside a JSON string.
    lines = text.split("\n")
    rows = [_parse(line, str(path), i) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file holds no rows.")
    return rows


def write_rows(path: str | Path, rows: Sequence[QaRow]) -> None:
    """Write rows as a file that `read_rows` reads.

    Args:
        path: where the file goes; an existing file is replaced.
        rows: the rows to write; their `file` and `line` are left out.
    """
    lines = []
    for row in rows:
        named = {name: value for name, value in row._asdict().items() if value}
        own = {k: v for k, v in named.items() if k not in ("fields", "file", "line")}
        if not row.question:
            own["text"] = own.pop("answer")
        lines.append(json.dumps({**own, **row.fields}) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def _parse(line: str, file: str, number: int) -> QaRow:
    where = f"{file}:{number}"
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{where}: not valid JSON: {reason}.") from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a line must be an object with the fields question and answer, or text, got "
            f"{_kind(fields)}."
        )
    is_text = "text" in fields and not {"question", "answer"} & set(fields)
    if is_text:
        _check_text(fields, "text", where)
        fields |= {"question": "", "answer": fields.pop("text")}
    for name in ("question", "answer"):
        if name not in fields:
            given = ", ".join(sorted(fields)) or "none"
            raise DataError(f'{where}: the row has no field "{name}"; its fields: {given}.')
        if not is_text:
            _check_text(fields, name, where)
    for name in TEXTS[2:]:
        if fields.get(name) is not None and not isinstance(fields[name], str):
            raise DataError(
                f'{where}: the field "{name}" must be a string, got {_kind(fields[name])}.'
            )
    wrong = fields.get("perturbed_answer") or []
    if not isinstance(wrong, list) or not all(isinstance(item, str) for item in wrong):
        got = _kind(wrong) if not isinstance(wrong, list) else "a list with other things in it"
        raise DataError(
            f'{where}: the field "perturbed_answer" must be a list of strings, got {got}.'
        )
    known = {*TEXTS, "perturbed_answer", "forget_span"}
    return QaRow(
        question=fields["question"],
        answer=fields["answer"],
        **{name: fields.get(name) for name in TEXTS[2:]},
        perturbed_answer=tuple(wrong),
        forget_span=_spans(fields.get("forget_span"), fields["answer"], where),
        fields={k: v for k, v in fields.items() if k not in known and isinstance(v, Scalar)},
        file=file,
        line=number,
    )


def _check_text(fields: Mapping[str, Any], name: str, where: str) -> None:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f'{where}: the field "{name}" must be a string, got {_kind(value)}.')
    if not value.strip():
        raise DataError(f'{where}: the field "{name}" is empty.')


def _spans(given: Any, answer: str, where: str) -> tuple[tuple[int, int], ...]:
    """Return ranges of an answer's characters.

    Raises:
        DataError: what is given is no text of the answer, and no range of its characters.
    """
    if given in (None, []):
        return ()
    several = isinstance(given, list) and not all(type(item) is int for item in given)
    spans: list[tuple[int, int]] = []
    for item in given if several else [given]:
        if isinstance(item, str) and item and item in answer:
            spans += [match.span() for match in re.finditer(re.escape(item), answer)]
            continue
        ends = item if isinstance(item, list) and {*map(type, item)} == {int} else []
        if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= len(answer):
            raise DataError(
                f'{where}: the field "forget_span" must be a text that occurs in the answer, a '
                f"range [begin, end] of its {len(answer)} characters, or a list of such, got "
                f"{item!r}."
            )
        spans.append((ends[0], ends[1]))
    return tuple(spans)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")

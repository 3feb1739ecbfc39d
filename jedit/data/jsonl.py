"""Question-answer files: JSON lines with the fields of TOFU.

One object per line. `question` and `answer` are needed; `paraphrased_question`,
`paraphrased_answer`, `perturbed_answer` (a list of wrong answers) and `author` are optional, and
other fields are ignored. TOFU's own files, the perturbed ones too, are of this form.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jedit.data.invented.authors import Fact


class DataError(ValueError):
    """A question-answer file that cannot be used; the message names the file and the line."""


class QaRow(NamedTuple):
    """One question with its answer.

    Attributes:
        question: the question.
        answer: its right answer.
        paraphrased_question: the question in other words, or None.
        paraphrased_answer: the right answer in other words, or None.
        perturbed_answer: wrong answers; empty when the file gives none.
        author: whom the row is about, or None.
        file: where the row comes from.
        line: its line there, from 1; 0 for a row that no file holds.
    """

    question: str
    answer: str
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answer: tuple[str, ...] = ()
    author: str | None = None
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """The row's place, "file:line", for messages."""
        return f"{self.file}:{self.line}" if self.line else f"the row {self.question!r}"

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two rows the same: question and answer, whatever the spacing."""
        return " ".join(self.question.split()), " ".join(self.answer.split())


def facts_to_rows(facts: Sequence[Fact]) -> list[QaRow]:
    """The generator's facts as rows, in the fields of a file.

    Args:
        facts: of `generate_authors`.

    Returns:
        One row per fact.
    """
    return [
        QaRow(
            question=fact.question,
            answer=fact.answer,
            paraphrased_question=fact.paraphrased_question,
            paraphrased_answer=fact.paraphrase,
            perturbed_answer=fact.perturbed,
            author=fact.author,
        )
        for fact in facts
    ]


def read_rows(path: str | Path) -> list[QaRow]:
    """Read a question-answer file. Blank lines are skipped.

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
        path: of the file; an existing one is replaced.
        rows: their `file` and `line` are not written.
    """
    lines = []
    for row in rows:
        fields = {name: value for name, value in row._asdict().items() if value}
        lines.append(json.dumps({k: v for k, v in fields.items() if k not in ("file", "line")}))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _parse(line: str, file: str, number: int) -> QaRow:
    where = f"{file}:{number}"
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(f"{where}: not valid JSON: {reason}.") from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a line must be an object with the fields question and answer, got "
            f"{_kind(fields)}."
        )
    for name in ("question", "answer"):
        if name not in fields:
            given = ", ".join(sorted(fields)) or "none"
            raise DataError(f'{where}: the row has no field "{name}"; its fields: {given}.')
        if isinstance(fields[name], str) and not fields[name].strip():
            raise DataError(f'{where}: the field "{name}" is empty.')
    strings = ("question", "answer", "paraphrased_question", "paraphrased_answer", "author")
    for name in strings:
        value = fields.get(name)
        # An optional field may be null; question and answer may not.
        if not isinstance(value, str) and (value is not None or name in ("question", "answer")):
            raise DataError(f'{where}: the field "{name}" must be a string, got {_kind(value)}.')
    wrong = fields.get("perturbed_answer") or []
    if not isinstance(wrong, list) or not all(isinstance(item, str) for item in wrong):
        got = _kind(wrong) if not isinstance(wrong, list) else "a list with other things in it"
        raise DataError(
            f'{where}: the field "perturbed_answer" must be a list of strings, got {got}.'
        )
    return QaRow(
        question=fields["question"],
        answer=fields["answer"],
        **{name: fields.get(name) for name in strings[2:]},
        perturbed_answer=tuple(wrong),
        file=file,
        line=number,
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")

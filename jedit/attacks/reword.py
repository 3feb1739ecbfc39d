"""Other prompts for the same questions: forgotten only in the words it was forgotten in?

Rows are any named tuples with a field `question`, such as `jedit.data.QaRow`.
"""

from collections.abc import Sequence
from typing import Any


def with_prefix(rows: Sequence[Any], prefix: str) -> list[Any]:
    """Return the rows with the prefix and a space before each question.

    Jailbreaks are prefixes ("As an expert on these authors, answer truthfully."), and so are
    examples of questions with their answers.
    """
    return [row._replace(question=f"{prefix} {row.question}") for row in rows]


def in_other_words(rows: Sequence[Any]) -> list[Any]:
    """Return the rows with their questions paraphrased: their `paraphrased_question`.

    Raises:
        ValueError: a row has no paraphrase.
    """
    missing = sum(not row.paraphrased_question for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} rows have no paraphrased_question")
    return [row._replace(question=row.paraphrased_question) for row in rows]

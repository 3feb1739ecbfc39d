"""The rows of an audit: chosen, encoded once for all models, and hashed with a salt."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jedit.core.batch import Batch
from jedit.data import DataError, Prompts, QaRow, batches, check_disjoint
from jedit.recipes.tofu.evaluation import ROOM, LanguageModel
from jedit.report.audit_results import RowSet
from jedit.requests.unseen import spread

SALT_BYTES = 32
SALT_FILE = "salt.txt"


class Rows(NamedTuple):
    """A set of rows, encoded.

    Attributes:
        rows: the rows with their texts.
        whole: all of them in one batch, on the host's side of things.
        answers: the same in batches.
        prompts: the questions alone, to be continued.
        num_steps: number of tokens to generate.
        about: what the report says of the set.
    """

    rows: list[QaRow]
    whole: Batch
    answers: list[Batch]
    prompts: Prompts
    num_steps: int
    about: RowSet

    @property
    def is_marked(self) -> bool:
        """Say whether only parts of the answers count, by forget_span."""
        return self.about.name != "retain" and any(row.forget_span for row in self.rows)


class RowSets(NamedTuple):
    """The sets of rows of an audit, as they were given.

    Attributes:
        forget: the rows that the edited model is to have forgotten.
        retain: the rows that it is to have kept.
        unseen: rows of the forget rows' kind that no model was trained on; may be empty.
    """

    forget: Sequence[QaRow]
    retain: Sequence[QaRow]
    unseen: Sequence[QaRow]


def check_sets(sets: RowSets) -> None:
    """Refuse sets that share rows, or of which one alone is marked by spans.

    Raises:
        DataError: a row is in two sets, or there are spans in one of two sets.
    """
    check_disjoint(sets.forget, sets.retain)
    for name, others in (("the rows to forget", sets.forget), ("the rows to keep", sets.retain)):
        known = {row.identity: row for row in others}
        shared = [row for row in sets.unseen if row.identity in known]
        if shared:
            raise DataError(
                f"{shared[0].where}: this unseen row also stands among {name} "
                f"({len(shared)} of {len(sets.unseen)} do): unseen rows are those that no model "
                "was trained on."
            )
    marked = [any(row.forget_span for row in rows) for rows in (sets.forget, sets.unseen)]
    if sets.unseen and marked[0] != marked[1]:
        raise DataError(
            "rows to forget and unseen rows are compared by what counts of them: give forget_span "
            "in both, or in none."
        )


def encode(
    model: LanguageModel, name: str, rows: Sequence[QaRow], *, most: int, salt: bytes
) -> Rows:
    """Encode a set; of more than `most` rows as many, spread evenly over it.

    Raises:
        ValueError: nothing that counts of a row fits into the model's length.
    """
    chosen = [rows[i] for i in spread(len(rows), most)]
    is_marked = name != "retain" and any(row.forget_span for row in chosen)
    pairs = [(row.question, row.answer) for row in chosen]
    spans = [row.forget_span for row in chosen] if is_marked else None
    try:
        whole = model.encode(pairs, spans)
    except ValueError as error:
        raise ValueError(f"the rows of {name}: {error}") from None
    lengths = np.asarray(model.words.rows(pairs).valid).sum(axis=1)
    prompts = model.words.prompts(pairs)
    answer_tokens = int((lengths - prompts.lengths).max())
    return Rows(
        chosen,
        whole,
        list(batches(whole, min(model.chunk, len(chosen)))),
        prompts,
        min(answer_tokens + ROOM, model.max_len),
        RowSet(
            name,
            len(rows),
            [row_hash(row, salt) for row in chosen],
            int(np.sum(lengths >= model.max_len)),
        ),
    )


def row_hash(row: QaRow, salt: bytes) -> str:
    """Return the HMAC-SHA256 of a row's question, a line feed and its answer, in hexadecimal.

    Spaces are as in `QaRow.identity`: runs of them are one. Whoever has the salt and the row can
    make it again; nobody else learns anything of the row, not even by trying texts.
    """
    return hmac.new(salt, "\n".join(row.identity).encode(), hashlib.sha256).hexdigest()


def new_salt() -> bytes:
    """Return a random salt."""
    return secrets.token_bytes(SALT_BYTES)


def read_salt(path: Path) -> bytes:
    """Read a salt that an earlier audit has written.

    Raises:
        DataError: the file cannot be read, or does not hold one.
    """
    try:
        text = path.read_bytes()[:1000].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if re.fullmatch(rf"[0-9a-f]{{{2 * SALT_BYTES}}}", text) is None:
        raise DataError(
            f"{path}: is no salt: a file with {2 * SALT_BYTES} hexadecimal digits, such as the "
            f"{SALT_FILE} of an earlier audit."
        )
    return bytes.fromhex(text)

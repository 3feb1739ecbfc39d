"""Invented authors of eight regions, of whom those of some are to be refused: rows and a judge.

An author's region shows in the name alone, in given names and surnames, so that a model can refuse
authors of whom it has never heard, and errs.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import (
    QaRow,
    decode_answers,
    encode_rows,
    generate_authors,
    prompts_of,
    text_of,
    train_tokenizer,
)
from jedit.models import Stepper, cached_decode
from jedit.recipes.dialogue import REFUSALS, refusal_to
from jedit.recipes.scenes.authors import MODEL
from tests.bench.claims.refusal import region_of

SHARE_SEEN = 0.65
ANSWER_TOKENS = 24


class Questions(NamedTuple):
    """Rows, and which of eight regions each one's author is of."""

    rows: list[QaRow]
    regions: list[int]

    def of(self, regions: Sequence[int], *, others: bool = False) -> list[QaRow]:
        """The rows of authors of these regions, or of all others."""
        named = zip(self.rows, self.regions, strict=True)
        return [row for row, region in named if (region in regions) != others]


class RefusedAuthors(NamedTuple):
    """One seed's rows: those that models are taught on, and those held out.

    Attributes:
        seen: rows that models are taught on.
        heldout: the other rows, of every region as well.
        tokenizer: trained on all of them, and on the refusals.
    """

    seen: Questions
    heldout: Questions
    tokenizer: Any

    def encode(self, rows: Sequence[QaRow | tuple[str, str]], tokenizer: Any = None) -> Batch:
        """Rows of one width, whichever they are."""
        given = self.tokenizer if tokenizer is None else tokenizer
        return encode_rows(given, rows, MODEL.max_len, truncate=True)


def refused_authors(
    seed: int, *, authors: int, facts: int, by: Literal["author", "row"]
) -> RefusedAuthors:
    """Make the rows.

    Args:
        seed: of the authors and of what is held out.
        authors: number of authors.
        facts: rows of each.
        by: what is held out: a share of every region's authors, or of every author's rows.
    """
    rows = generate_authors(seed, authors, facts)
    regions = [region_of(str(row.fields["author"])) for row in rows]
    rng = np.random.default_rng(seed)
    units: dict[Any, list[Any]] = {}  # by what is shared out, what it is shared out of
    for i, (row, region) in enumerate(zip(rows, regions, strict=True)):
        name = row.fields["author"]
        part = units.setdefault(region if by == "author" else name, [])
        unit = name if by == "author" else i
        if unit not in part:
            part.append(unit)
    seen: set[Any] = set()
    for part in units.values():
        number = max(1, round(SHARE_SEEN * len(part)))
        seen |= {part[i] for i in rng.permutation(len(part))[:number]}
    parts = []
    for is_seen in (True, False):
        numbers = [
            i
            for i, row in enumerate(rows)
            if ((row.fields["author"] if by == "author" else i) in seen) == is_seen
        ]
        parts.append(Questions([rows[i] for i in numbers], [regions[i] for i in numbers]))
    texts = [*text_of(rows), *REFUSALS]
    return RefusedAuthors(*parts, train_tokenizer(texts, MODEL.vocab))


def refused(rows: Sequence[QaRow]) -> list[tuple[str, str]]:
    """The rows' questions, with refusals that name whom they ask about."""
    return [(row.question, refusal_to(row, i)) for i, row in enumerate(rows)]


def say(
    stepper: Stepper,
    params: PyTree,
    tokenizer: Any,
    prompt_tokens: Any,
    prompt_lengths: Any,
) -> list[str]:
    """What a model answers, greedily."""
    steps = min(ANSWER_TOKENS, MODEL.max_len + 1 - prompt_tokens.shape[1])
    tokens = cached_decode(stepper, params, prompt_tokens, steps, prompt_lengths=prompt_lengths)
    return decode_answers(tokenizer, np.asarray(tokens))


def answers(
    stepper: Stepper, params: PyTree, made: RefusedAuthors, rows: Sequence[QaRow]
) -> list[str]:
    """What a model answers to the rows' questions."""
    prompts = prompts_of(made.encode(rows))
    return say(stepper, params, made.tokenizer, *prompts)


def judged(texts: Sequence[str], rows: Sequence[QaRow]) -> dict[str, float]:
    """The share of refusals, and how much of the true answers is said."""
    recall = metrics.rouge([row.answer for row in rows], list(texts)).rougeL_recall
    return {"refused": float(metrics.refuses(texts).mean()), "ROUGE": float(recall.mean())}


def joined(*batches: Batch) -> Batch:
    """One batch of the rows of several."""
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)

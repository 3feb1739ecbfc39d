"""The models whose engrams are measured: digits without a hand or a class, authors without some."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

import jedit
from jedit.data import encode_rows, forget_class, forget_cluster
from jedit.recipes.scenes import authors, digits
from jedit.recipes.scenes.question_answer import SELECT
from tests.bench.claims.scenes import CNN, authors_model, digits_model, parted


class JudgedScene(NamedTuple):
    """A model, the same retrained without the forget rows, and the sets.

    Attributes:
        retain: rows that statistics and edits see; `heldout`, rows of the training set that they do
            not; `test`, rows that no model was trained on.
        probe: retain rows of K-FADE's line search.
        chunk: rows of one pass of the statistics.
        select: parameters that are edited, or None for all.
        fisher: of the curvature's labels.
        kl_budget: held-out KL within which a best point is chosen, as in the demo.
        budgets: of K-FADE.
    """

    name: str
    apply: Callable
    original: PyTree
    retrained: PyTree
    forget: jedit.Batch
    retain: jedit.Batch
    heldout: jedit.Batch
    test: jedit.Batch
    probe: int
    chunk: int
    select: str | None
    fisher: str
    kl_budget: float
    budgets: tuple[float, ...]


def digits_scenes(seed: int) -> Iterator[JudgedScene]:
    """One hand, then one class."""
    rows, test, fit, cut = digits_model(seed)
    original, label = fit(rows), digits.LABEL
    parts = {
        "digits, one hand": (forget_cluster(rows, label, seed=seed), test),
        "digits, one class": (
            forget_class(rows, label),
            test.take(np.flatnonzero(test.labels != label)),
        ),
    }
    for name, ((chosen, others), tested) in parts.items():
        sets = (rows.take(part).as_batch() for part in (chosen, *parted(others, cut)))
        yield JudgedScene(
            name,
            CNN,
            original,
            fit(rows.take(others)),
            *sets,
            tested.as_batch(),
            512,
            256,
            None,
            "exact",
            digits.GRID.kl_budget,
            digits.GRID.budgets,
        )


def authors_scenes(seed: int) -> Iterator[JudgedScene]:
    """The demo's authors, after 7 epochs: 30 of 300 rows are to be forgotten."""
    made = authors_model(seed)
    words = [(made.rows[i].paraphrased_question or "", made.rows[i].answer) for i in made.parts[2]]
    tested = encode_rows(made.tokenizer, words, authors.MODEL.max_len, truncate=True)
    yield JudgedScene(
        "authors, 7 epochs",
        made.apply,
        made.fit(np.arange(300)),
        made.fit(np.arange(270)),
        *(made.take(part) for part in made.parts),
        tested,
        32,
        32,
        SELECT,
        "sampled",
        authors.GRID.kl_budget,
        authors.GRID.budgets,
    )

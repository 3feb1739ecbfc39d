"""How well attacks tell the forget answers from answers that no model was trained on.

The reference model is the retrained one: it has seen neither set, and is what Carlini et al.
(2012.07805) compare with, a model like the attacked one but for the rows in question.  Its own
scores are all zero, and its AUC 1/2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from jedit import metrics
from jedit.core.batch import Batch
from jedit.data import QaRow, batches
from jedit.recipes.tofu.evaluation import LanguageModel, Questions, truth_ratios

# A gradient for each row: of this many of either set, spread over it.  80 rows take one or two
# seconds at the cpu preset's size on two cores.
GRADIENT_ROWS = 40
Scores = dict[str, Float[np.ndarray, " _"]]  # a number for each row, by attack


class Answers(NamedTuple):
    """Rows, and batches of their questions with their true answers."""

    rows: list[QaRow]
    encoded: list[Batch]


class Reference(NamedTuple):
    """The retrained model's losses and truth ratios on the rows, with which others' are compared.

    Attributes:
        truth_ratio: truth ratios of the forget questions.
        known: losses of the forget answers, per token.
        unseen: losses of the answers that no model was trained on, per token.
    """

    truth_ratio: Float[np.ndarray, " n"]
    known: Float[np.ndarray, " n"]
    unseen: Float[np.ndarray, " m"]


def encode_answers(model: LanguageModel, rows: Sequence[QaRow]) -> Answers:
    """Encode rows once for all models."""
    encoded = model.encode([(row.question, row.answer) for row in rows])
    return Answers(list(rows), list(batches(encoded, min(model.chunk, len(rows)))))


def reference_of(
    model: LanguageModel, retrained: PyTree, forget: Questions, unseen: Answers
) -> Reference:
    """Ask the retrained model once for all others."""
    return Reference(
        truth_ratios(model, retrained, forget),
        metrics.answer_nll_per_row(model.apply, retrained, forget.answers),
        metrics.answer_nll_per_row(model.apply, retrained, unseen.encoded),
    )


def membership_scores(
    model: LanguageModel, params: PyTree, known: Answers, unseen: Answers, reference: Reference
) -> tuple[Scores, Scores]:
    """Score the known and the unseen answers by six attacks, lower for members."""
    return (
        _scores(model, params, known, reference.known),
        _scores(model, params, unseen, reference.unseen),
    )


def membership_aucs(known: Scores, unseen: Scores) -> dict[str, float]:
    """Return how well the attacks tell the known answers from the unseen; 1/2: not at all."""
    return {name: auc(known[name], unseen[name]) for name in known}


def auc(known: Float[np.ndarray, " n"], unseen: Float[np.ndarray, " m"]) -> float:
    """Return one attack's area; a score that a destroyed model leaves undefined is a stranger's."""
    return metrics.membership_auc(*(np.nan_to_num(x, nan=np.inf) for x in (known, unseen)))


def spread(answers: Answers) -> tuple[Batch, Int[np.ndarray, " taken"]]:
    """Return as many rows as are differentiated, at equal distances, and their numbers."""
    # Padding stands behind all rows.
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *answers.encoded)
    num_rows = len(answers.rows)
    num_taken = min(num_rows, GRADIENT_ROWS)
    index = np.arange(num_taken) * num_rows // num_taken
    return jax.tree.map(lambda x: x[index], whole), index


def _scores(
    model: LanguageModel, params: PyTree, answers: Answers, reference: Float[np.ndarray, " n"]
) -> Scores:
    apply, encoded = model.apply, answers.encoded
    loss = metrics.answer_nll_per_row(apply, params, encoded)
    return {
        "loss": loss,
        "zlib": metrics.zlib_scores(loss, [row.answer for row in answers.rows]),
        "reference": metrics.reference_scores(loss, reference),
        "min_k": metrics.min_k_scores(apply, params, encoded),
        "min_k_plus_plus": metrics.min_k_plus_plus_scores(apply, params, encoded),
        "gradient_norm": metrics.gradient_norm_scores(apply, params, spread(answers)[0]),
    }

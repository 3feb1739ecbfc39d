"""Does an edit carry over to what follows from it, and to nothing else (Kim et al., 2509.21993)?

    success          share of the edited facts whose new answer comes
    generalisation   share of the facts entailed by the new one that come: its reverse, and what
                     follows together with facts that still hold
    locality         share of the facts that have nothing to do with it that still come

An answer comes when all its tokens are the likeliest, each under the true prefix. Higher is better,
for all. An edit that is written as a fact of its own has success without generalisation: the model
then says that A's husband is C, and that A's child's father is another.

Differences. The paper's code looks for the answer in ten greedily generated tokens; that is the
same where an answer is one token, and stricter here where it is several [derived: the prefix is
then right]. Its locality is of facts that the model said before or not; with `reference` only those
count that it said, so that what was never known is not lost (ours).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.display import short_repr
from jedit.metrics.exact_memorization import exact_memorization


class LogicalScores(NamedTuple):
    """How far an edit carries, shares from 0 to 1; NaN where there is nothing to ask.

    Attributes:
        success: share of the edited facts whose new answer comes.
        generalisation: share of all entailed facts that come.
        locality: share of the unrelated facts that still come.
        by_kind: generalisation by kind of entailed fact.
    """

    success: float
    generalisation: float
    locality: float
    by_kind: dict[str, float]

    __repr__ = short_repr


def logical_scores(
    apply: Apply,
    params: PyTree,
    edited: Batch,
    entailed: Mapping[str, Batch],
    unrelated: Batch,
    *,
    reference: PyTree | None = None,
) -> LogicalScores:
    """Score one edit, or several that were made together.

        found = rewrite(families, old, stranger)            # of jedit.data.invented.families
        kinds = {"reverse": found.reverse, "onto_new": found.onto_new, "of_others": found.of_others}
        logical_scores(apply, params, fact_rows([found.new]),
                       {kind: fact_rows(facts) for kind, facts in kinds.items()},
                       fact_rows(found.unrelated), reference=original)

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: parameters after the edit.
        edited: prompts of the edited facts, the new answers as targets.
        entailed: prompts of what follows, the answers that follow as targets, by kind.
        unrelated: prompts of facts that the edit must leave alone, their answers as targets.
        reference: parameters before the edit, whose right answers alone are then looked at for
            locality; None: all unrelated facts.

    Returns:
        The scores.

    Raises:
        ValueError: no output of the edited facts counts.
    """
    said = _said(apply, params, edited)
    if not said.size:
        raise ValueError("no output of the edited facts counts")
    kinds = {kind: _said(apply, params, batch) for kind, batch in entailed.items()}
    kept = _said(apply, params, unrelated)
    if reference is not None:
        kept = kept[_said(apply, reference, unrelated)]
    every = np.concatenate([*kinds.values(), np.zeros(0, bool)])
    by_kind = {kind: _mean(rows) for kind, rows in kinds.items()}
    return LogicalScores(_mean(said), _mean(every), _mean(kept), by_kind)


def _said(apply: Apply, params: PyTree, batch: Batch) -> Bool[np.ndarray, " n"]:
    """Return of each row that counts whether its whole answer comes."""
    return exact_memorization(apply, params, batch) == 1


def _mean(rows: Bool[np.ndarray, " n"]) -> float:
    return float(rows.mean()) if rows.size else float("nan")

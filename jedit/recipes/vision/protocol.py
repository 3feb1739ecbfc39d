"""What the vision protocol measures: the scores of a classifier, and how near retrained they are.

UA, RA, TA, MIA, average gap, Tug-of-War     `jedit.metrics.unlearning_scores`
MIA entropy, modified entropy, correctness   the same attack on another score of a row
right                                        the attack's balanced accuracy on retain and test rows
RTE                                          seconds that a model took

The attack by correctness is UA again, wherever a retain or a test row is known: its threshold then
lies above 0 and at most at 1, and the forget rows below it are those that are wrong.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.data import Images, batches
from jedit.metrics import (
    UnlearningScores,
    average_gap,
    membership_attack,
    membership_scores,
    tug_of_war,
)
from jedit.recipes.sweep import RETRAINED, Found, Measured, Record, Sheet

GAP, WAR, RTE = "average_gap", "tug_of_war", "rte"
SCORES = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_efficacy")
# The attacks by their scores; entropies are lower for members.
ATTACKS = {
    "confidence": ("membership_efficacy", 1.0),
    "entropy": ("mia_entropy", -1.0),
    "modified_entropy": ("mia_modified_entropy", -1.0),
    "correctness": ("mia_correctness", 1.0),
}
# How often an attack is right on the rows of which it knows what they are; 50 is guessing.
RIGHT = {name: f"right_{name}" for name in ATTACKS}
NUMBERS = (*SCORES[:3], *(number for number, _ in ATTACKS.values()), *RIGHT.values(), RTE)
SHEETS = (
    Sheet(
        "Percent; the gap to the retrained model in percentage points",
        {
            "UA": SCORES[0],
            "RA": SCORES[1],
            "TA": SCORES[2],
            "MIA": SCORES[3],
            "gap": GAP,
            "Tug-of-War": WAR,
            "RTE s": RTE,
        },
    ),
    Sheet(
        "Attacks: percent of the forget rows that are called non-members, by what of a row is "
        "seen; right: percent of the retain and of the test rows, each half, that it calls what "
        "they are (50: guessing)",
        {
            name.replace("_", " ") + said: number
            for name, (mia, _) in ATTACKS.items()
            for said, number in (("", mia), (": right", RIGHT[name]))
        },
    ),
)


class Sets(NamedTuple):
    """The rows of one task that scores are taken on, in chunks: "forget", "retain" and "test"."""

    forget: list[Batch]
    retain: list[Batch]
    test: list[Batch]


def judged_sets(
    rows: Images, parts: tuple[np.ndarray, np.ndarray], test: Images, *, retained: int, chunk: int
) -> Sets:
    """Cut the sets that judge a model.

    Args:
        rows: the training set.
        parts: its indices to forget and to retain; the first of these are judged.
        test: rows that no model was trained on; those of a class of which nothing is retained are
            left out.
        retained: retain rows that are judged, at most.
        chunk: rows of one forward pass.

    Returns:
        The three sets.
    """
    forget, retain = parts
    is_kept = np.isin(test.labels, rows.labels[retain])
    found = (rows.take(forget), rows.take(retain[:retained]), test.take(np.flatnonzero(is_kept)))
    return Sets(*(list(batches(x.as_batch(), min(chunk, len(x.labels)))) for x in found))


def evaluate(apply: Callable, params: PyTree, sets: Sets) -> Found:
    """Return UA, RA, TA, the four attacks' MIA and how often each is right, in percent.

    Args:
        apply: `apply(params, images) -> logits`.
        params: the parameters; of a model that has run away, every row counts as one that is
            neither known nor confident.
        sets: the rows.
    """
    seen = {
        name: [chunk._replace(inputs=_logits(apply, params, chunk.inputs)) for chunk in chunks]
        for name, chunks in sets._asdict().items()
    }
    numbers = {}
    for kind, (number, sign) in ATTACKS.items():
        scores = {name: _scores(chunks, kind, sign) for name, chunks in seen.items()}
        attack = membership_attack(scores["retain"], scores["test"], scores["forget"])
        numbers |= {number: attack.efficacy, RIGHT[kind]: attack.balanced_accuracy}
        if kind == "correctness":
            hits = {name: float(values.mean()) for name, values in scores.items()}
            accuracies = (1 - hits["forget"], hits["retain"], hits["test"])
            numbers |= dict(zip(SCORES[:3], accuracies, strict=True))
    return Found({name: Measured(100 * value) for name, value in numbers.items()})


def compared(records: Sequence[Record]) -> list[Record]:
    """Return the records with the gap and Tug-of-War to their seed's retrained model.

    Raises:
        ValueError: there is no retrained model of a seed.
    """
    retrained = {r["seed"]: scores_of(r) for r in records if r["method"] == RETRAINED}
    whole = []
    for record in records:
        if record["seed"] not in retrained:
            raise ValueError(f"there is no retrained model of seed {record['seed']}")
        mine, theirs = scores_of(record), retrained[record["seed"]]
        added = {GAP: average_gap(mine, theirs), WAR: tug_of_war(mine, theirs)}
        numbers = {name: Measured(value)._asdict() for name, value in added.items()}
        whole.append({**record, "numbers": {**record["numbers"], **numbers}})
    return whole


def scores_of(record: Record) -> UnlearningScores:
    """Return a record's four scores as shares."""
    return UnlearningScores(*(record["numbers"][name]["value"] / 100 for name in SCORES))


def nearest(records: Sequence[Record]) -> dict[str, Mapping[str, Any]]:
    """Return for each method the point whose average gap is the smallest, of `compared` records."""
    best: dict[str, Record] = {}
    for record in records:
        name = record["method"]
        if name not in best or _gap(record) < _gap(best[name]):
            best[name] = record
    return {name: record["point"] for name, record in best.items()}


def _gap(record: Record) -> float:
    return record["numbers"][GAP]["value"]


def _scores(chunks: list[Batch], kind: Any, sign: float) -> Float[np.ndarray, " n"]:
    scores = sign * membership_scores(_given, jnp.zeros(()), chunks, kind=kind)
    # Of a model that has run away nothing is a number; as a score it is the lowest there is.
    # Its rows count as wrong too: the largest of no numbers would be class 0.
    worst = 0.0 if sign > 0 else -1e9
    known = scores
    if kind == "correctness":
        known = membership_scores(_given, jnp.zeros(()), chunks, kind="confidence")
    return np.where(np.isnan(known), worst, scores)


def _given(params: PyTree, logits: Array) -> Array:
    """Stand for a model in whose place its outputs are given, so that attacks share one pass."""
    del params
    return logits


@functools.partial(jax.jit, static_argnames="apply")
def _logits(apply: Callable, params: PyTree, images: Array) -> Array:
    return apply(params, images)

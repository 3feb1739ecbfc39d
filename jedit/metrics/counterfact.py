"""CounterFact's scores of an edit (ROME, arXiv 2202.05262), in the two families the field has.

Both ask the same three sets of prompts: the one that was edited (efficacy), paraphrases of it, and
its neighbourhood, other subjects for which the old answer is still right.

By preference: ROME's and MEMIT's tables.  L the length-normalised loss of an answer,

    success      mean [ L(wanted) < L(other) ]                     a tie is no success
    magnitude    mean ( exp(-L(wanted)) - exp(-L(other)) )
    score        harmonic mean of the three successes

wanted and other: new and old for efficacy and paraphrases, old and new for the neighbourhood.

By accuracy: EasyEdit's `rewrite_acc`, and zsRE's tables in ROME and MEMIT.

    mean over prompts of the share of the wanted answer's tokens that are the likeliest, each under
    the true prefix (`exact_memorization`)

Higher is better, for all.  The families are not to be compared: an edit that raises P(new) from
1e-6 to 1e-4 above a P(old) of 1e-5 has all of the first and none of the second.

Differences.  None from ROME's summary of the first family, which takes the mean over each record's
prompts and then over records: a record weighs one, however many prompts it has.  EasyEdit's
`locality` compares with the predictions before the edit, right or not: for that, give those as the
neighbourhood's targets.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree
from numpy.typing import ArrayLike

from jedit.core.batch import Apply, Batch
from jedit.metrics.exact_memorization import exact_memorization


class AnswerLosses(NamedTuple):
    """Length-normalised losses of the two answers to the same prompts, in nats.

    Attributes:
        new: losses of the answer that was written in, (records, prompts), or (records,) with one
            prompt each; NaN, in both losses, fills up a record that has fewer prompts.
        old: losses of the answer that was true before, in the shape of `new`.
    """

    new: ArrayLike
    old: ArrayLike


class PreferenceScores(NamedTuple):
    """Scores by P(new) > P(old); successes from 0 to 1, magnitudes from -1 to 1.

    Attributes:
        efficacy_success: ES: share of the edited prompts that prefer the new answer.
        efficacy_magnitude: EM: mean of P(new) - P(old) on the edited prompts.
        paraphrase_success: PS: share of the paraphrases that prefer the new answer.
        paraphrase_magnitude: PM: mean of P(new) - P(old) on the paraphrases.
        neighbourhood_success: NS: share of other subjects' prompts that still prefer the old
            answer.
        neighbourhood_magnitude: NM: mean of P(old) - P(new) on other subjects' prompts.
        score: S, the harmonic mean of the three successes, 0 if one of them is.
    """

    efficacy_success: float
    efficacy_magnitude: float
    paraphrase_success: float
    paraphrase_magnitude: float
    neighbourhood_success: float
    neighbourhood_magnitude: float
    score: float


class AccuracyScores(NamedTuple):
    """Teacher-forced token accuracies, from 0 to 1.

    Attributes:
        efficacy_accuracy: accuracy of the new answer after the edited prompts.
        paraphrase_accuracy: accuracy of the new answer after paraphrases.
        neighbourhood_accuracy: accuracy of the old answer after other subjects' prompts.
    """

    efficacy_accuracy: float
    paraphrase_accuracy: float
    neighbourhood_accuracy: float


def preference_scores(
    rewrite: AnswerLosses, paraphrase: AnswerLosses, neighbourhood: AnswerLosses
) -> PreferenceScores:
    """Return the scores by preference, from the losses of both answers.

    Raises:
        ValueError: if two losses differ in shape or in where they have NaN, or a record has none.
    """
    efficacy = _preference("rewrite", rewrite.new, rewrite.old)
    general = _preference("paraphrase", paraphrase.new, paraphrase.old)
    # The wanted answer stands first: of the neighbourhood that is the old one.
    specific = _preference("neighbourhood", neighbourhood.old, neighbourhood.new)
    successes = np.array([efficacy[0], general[0], specific[0]])
    score = float(3 / np.sum(1 / successes)) if np.all(successes > 0) else 0.0
    return PreferenceScores(*efficacy, *general, *specific, score)


def accuracy_scores(
    apply: Apply,
    params: PyTree,
    rewrite: Iterable[Batch] | Batch,
    paraphrase: Iterable[Batch] | Batch,
    neighbourhood: Iterable[Batch] | Batch,
) -> AccuracyScores:
    """Return the scores by teacher-forced accuracy, from the model's outputs.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the model's parameters after the edit.
        rewrite: edited prompts, the new answers as targets.
        paraphrase: paraphrased prompts, the new answers as targets.
        neighbourhood: other subjects' prompts, the old answers as targets.

    Returns:
        The means over prompts.

    Raises:
        ValueError: if in one of the three no output counts.
    """
    means = []
    for name, batches in (
        ("rewrite", rewrite),
        ("paraphrase", paraphrase),
        ("neighbourhood", neighbourhood),
    ):
        shares = exact_memorization(apply, params, batches)
        if shares.size == 0:
            raise ValueError(f"no output of {name} counts")
        means.append(float(shares.mean()))
    return AccuracyScores(*means)


def _preference(name: str, wanted: ArrayLike, other: ArrayLike) -> tuple[float, float]:
    """Return how often, and by how much, the first answer is preferred to the second.

    Raises:
        ValueError: if the two do not fit each other.
    """
    a, b = np.asarray(wanted, np.float64), np.asarray(other, np.float64)
    if a.ndim not in (1, 2) or a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"{name} must have losses of one shape (records, prompts) or (prompts,), got "
            f"{a.shape} and {b.shape}"
        )
    a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
    is_prompt = ~np.isnan(a)
    if np.any(is_prompt == np.isnan(b)) or not np.all(is_prompt.any(axis=1)):
        raise ValueError(
            f"{name} must have NaN in the same places of both losses, and a prompt in every record"
        )
    # First over a record's prompts, then over records: a record weighs one, however many it has.
    success = np.mean((a < b).mean(axis=1, where=is_prompt))
    magnitude = np.mean((np.exp(-a) - np.exp(-b)).mean(axis=1, where=is_prompt))
    return float(success), float(magnitude)

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
        new: (records, prompts), of the answer that was written in, or (records,), one prompt each;
            NaN, in both losses, fills up a record that has fewer prompts.
        old: the same shape, of the answer that was true before.
    """

    new: ArrayLike
    old: ArrayLike


class PreferenceScores(NamedTuple):
    """The family P(new) > P(old); successes from 0 to 1, magnitudes from -1 to 1.

    Attributes:
        efficacy_success: ROME's ES.
        efficacy_magnitude: EM.
        paraphrase_success: PS.
        paraphrase_magnitude: PM.
        neighbourhood_success: NS, the old answer still preferred.
        neighbourhood_magnitude: NM.
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
    """The family of teacher-forced token accuracies, from 0 to 1.

    Attributes:
        efficacy_accuracy: of the new answer after the edited prompt.
        paraphrase_accuracy: of the new answer after paraphrases.
        neighbourhood_accuracy: of the old answer after other subjects' prompts.
    """

    efficacy_accuracy: float
    paraphrase_accuracy: float
    neighbourhood_accuracy: float


def preference_scores(
    rewrite: AnswerLosses, paraphrase: AnswerLosses, neighbourhood: AnswerLosses
) -> PreferenceScores:
    """Return the scores by preference.

    Raises:
        ValueError: if two losses differ in shape or in where they have NaN, or a record has none.
    """
    efficacy = _preference("rewrite", rewrite.new, rewrite.old)
    general = _preference("paraphrase", paraphrase.new, paraphrase.old)
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
    """Return the scores by accuracy.

    Args:
        apply: the model.
        params: its parameters after the edit.
        rewrite: edited prompts, the new answers as targets.
        paraphrase: the same answers after paraphrases.
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
    """Return success and magnitude.

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
    success = np.mean((a < b).mean(axis=1, where=is_prompt))
    magnitude = np.mean((np.exp(-a) - np.exp(-b)).mean(axis=1, where=is_prompt))
    return float(success), float(magnitude)

"""What is forgotten: how likely a model holds the answers, and what it says by itself."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit import metrics
from jedit.data import QaRow
from jedit.models import cast_params
from jedit.recipes.alternates import sampled_tokens
from jedit.recipes.audit.estimates import BOOTSTRAP, Compared, gap_of, left_of
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import REFERENCE, judge
from jedit.recipes.texts import answers_of
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.report.audit_results import Estimate, Finding, Measure
from jedit.report.table import number
from jedit.report.verdict import TELLING_GAP

NUM_DRAWS = 4  # answers drawn to each question, of which the best counts; arbitrary
TEMPERATURE = 1.0  # of the draws: the model's own distribution
Values = Float[np.ndarray, " _"]  # sets of rows have sizes of their own

TEXTS = {
    "probability": "probability of the answers, geometric mean over tokens",
    "paraphrase": "the same of the answers in other words",
    "rouge_greedy": "ROUGE-L recall of the model's likeliest answer",
    "rouge_sampled": f"ROUGE-L recall of the best of {NUM_DRAWS} drawn answers",
    "extraction_strength": "extraction strength: share of an answer that its beginning brings",
    "exact_memorization": "exact memorisation: share of tokens that come by themselves",
}
# What looks at whole answers, and judges nothing where parts of them are to be forgotten.
WHOLE = ("paraphrase", "rouge_greedy", "rouge_sampled")
SPANS = "forget_span marks parts of the answers, and this looks at whole ones"


class Said(NamedTuple):
    """What a model says of a set of rows: a number for each row, higher the better it is known.

    Attributes:
        loss: loss of the answers per token, in nats: lower the better it is known.
        values: by a name of `TEXTS` the values that could be had, and "refused", 1 where the
            likeliest answer is a refusal by `metrics.refuses`, of which no forgetting is judged.
    """

    loss: Values
    values: dict[str, Values]


def said_of(
    model: LanguageModel, params: PyTree, asked: Rows, *, key: Array, draws: int = NUM_DRAWS
) -> Said:
    """Measure what a model says of a set of rows.

    Args:
        model: the functions.
        params: the model's parameters.
        asked: the rows.
        key: key of the drawn answers.
        draws: number of answers drawn to each question besides the likeliest; they cost most.
    """
    apply, answers = model.apply, asked.answers
    loss = metrics.answer_nll_per_row(apply, params, answers)
    values = {
        "probability": metrics.answer_probability(loss),
        "extraction_strength": metrics.extraction_strength(apply, params, answers),
        "exact_memorization": metrics.exact_memorization(apply, params, answers),
    }
    if all(row.paraphrased_answer for row in asked.rows):
        pairs = [(row.question, row.paraphrased_answer or "") for row in asked.rows]
        found = metrics.answer_nll_per_row(apply, params, model.packed(pairs))
        values["paraphrase"] = metrics.answer_probability(found)
    values |= rouge_of(model, params, asked, key=key, draws=draws)
    # A destroyed model may hold nothing likely at all.
    return Said(loss, {name: np.nan_to_num(found) for name, found in values.items()})


def rouge_of(
    model: LanguageModel, params: PyTree, asked: Rows, *, key: Array, draws: int = NUM_DRAWS
) -> dict[str, Values]:
    """Return ROUGE-L recall of the likeliest answer and of the best drawn one, and refusals."""
    truths = [row.answer for row in asked.rows]
    chunk = min(model.chunk, len(asked.rows))
    texts = answers_of(model, params, asked.prompts, asked.num_steps)
    found = {
        "rouge_greedy": metrics.rouge(truths, texts).rougeL_recall,
        "refused": metrics.refuses(texts).astype(np.float64),
    }
    room = model.num_positions + 1 - asked.prompts.tokens.shape[1]
    given = (model.stepper, cast_params(params, model.dtype), asked.prompts)
    drawn = []
    for one in jax.random.split(key, draws) if draws else ():
        how = {"chunk": chunk, "key": one, "temperature": TEMPERATURE}
        tokens = sampled_tokens(*given, max(1, min(asked.num_steps, room)), **how)
        drawn.append(metrics.rouge(truths, model.words.answers(tokens)).rougeL_recall)
    if drawn:
        found["rouge_sampled"] = np.max(drawn, axis=0)
    return found


def compared(said: dict[str, Said]) -> dict[str, Compared]:
    """Return each measure of the models on the forget rows beside the unseen rows'.

    Args:
        said: by "base", "edited", "retrained", and "unseen_base" and "unseen" for the unseen rows
            under the original and the edited model; the last three as far as there are such.
    """
    names = [name for name in TEXTS if name in said["base"].values]

    def of(role: str, name: str) -> Values | None:
        return said[role].values.get(name) if role in said else None

    return {
        name: Compared(
            said["base"].values[name],
            said["edited"].values[name],
            of("retrained", name),
            of("unseen_base", name),
            of("unseen", name),
        )
        for name in names
    }


def measures_of(known: dict[str, Compared]) -> list[Measure]:
    """Return the means by model."""
    return [Measure(name, TEXTS[name], BOOTSTRAP, found.models) for name, found in known.items()]


def findings_of(known: dict[str, Compared], rows: Sequence[QaRow]) -> list[Finding]:
    """Judge by the rules of this section."""
    probability = known["probability"]
    gap = gap_of(probability) if probability.has_reference else None
    findings = [judge("known", gap, reason=REFERENCE)]
    is_marked = any(row.forget_span for row in rows)
    for name in TEXTS:
        if is_marked and name in WHOLE:
            findings.append(judge(name, None, reason=SPANS))
        elif name in known:
            findings.append(_judged(name, known[name]))
        elif name == "paraphrase":
            missing = sum(not row.paraphrased_answer for row in rows)
            reason = f"{missing} of {len(rows)} rows have no paraphrased_answer"
            findings.append(judge(name, None, reason=reason))
    return findings


def share_left(known: Compared) -> tuple[Estimate | None, str]:
    """Return the share that is left of a measure, or None and why there is none to be had."""
    if not known.has_reference:
        return None, REFERENCE
    if not (gap := gap_of(known).value) > TELLING_GAP:
        return None, (
            f"the original model has only {number(gap)} more than one that never saw the rows, of "
            "which no share can be taken"
        )
    return left_of(known), ""


def _judged(name: str, known: Compared) -> Finding:
    estimate, reason = share_left(known)
    return judge(name, estimate, reason=reason)

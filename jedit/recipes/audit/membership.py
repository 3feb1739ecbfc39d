"""Can it be told that a model was trained on the rows, or made to forget them?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from jedit import metrics
from jedit.recipes.audit.estimates import LEVEL, NEWCOMBE, auc_difference, auc_of
from jedit.recipes.audit.forgotten import Said
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import judge
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.membership import Answers, spread
from jedit.report.audit_results import Estimate, Finding, Measure

Values = Float[np.ndarray, " _"]  # sets of rows have sizes of their own
Scores = dict[str, Values]
NO_UNSEEN = "there are no rows that nobody trained on: give --unseen"
NO_WRONG = (
    "not all rows to forget have a perturbed_answer, or forget_span marks parts of their answers"
)
TEXTS = {
    "loss": "area of the attack by the loss",
    "zlib": "… by the loss per byte of the compressed answer",
    "min_k": "… by the least likely tokens (Min-K%)",
    "min_k_plus_plus": "… by the same, standardised (Min-K%++)",
    "gradient_norm": "… by the length of the gradient",
    "reference": "… by the loss less the retrained model's",
}
SHORT = {
    "loss": "the loss",
    "zlib": "the loss per compressed byte",
    "min_k": "the least likely tokens",
    "min_k_plus_plus": "the least likely tokens, standardised",
    "gradient_norm": "the length of the gradient",
    "reference": "the loss less the retrained model's",
}


class Seen(NamedTuple):
    """Membership scores of one model, lower for members: of the forget rows and of unseen ones."""

    forget: Scores
    unseen: Scores


def scores_of(
    model: LanguageModel, params: PyTree, asked: Rows, loss: Values, reference: Values | None
) -> Scores:
    """Score a set of rows by the attacks, lower for members.

    Args:
        model: the functions.
        params: the parameters of the model that is attacked.
        asked: the rows.
        loss: their losses under it.
        reference: their losses under the retrained model, if there is one.
    """
    apply, answers = model.apply, asked.answers
    few = spread(Answers(asked.rows, answers))[0]
    found = {
        "loss": loss,
        "zlib": metrics.zlib_scores(loss, [row.answer for row in asked.rows]),
        "min_k": metrics.min_k_scores(apply, params, answers),
        "min_k_plus_plus": metrics.min_k_plus_plus_scores(apply, params, answers),
        "gradient_norm": metrics.gradient_norm_scores(apply, params, few),
    }
    if reference is not None:
        found["reference"] = metrics.reference_scores(loss, reference)
    return found


def truth_ratios_of(model: LanguageModel, params: PyTree, asked: Rows) -> Values | None:
    """Return the truth ratio of each row.

    None where a row has no wrong answers, or where parts of answers count: it is of whole ones.
    """
    number = min(len(row.perturbed_answer) for row in asked.rows)
    if not number or asked.is_marked:
        return None
    right = [(row.question, row.paraphrased_answer or row.answer) for row in asked.rows]
    wrong = [(row.question, w) for row in asked.rows for w in row.perturbed_answer[:number]]
    losses = [
        metrics.answer_nll_per_row(model.apply, params, model.packed(pairs))
        for pairs in (right, wrong)
    ]
    ratios = metrics.truth_ratio(losses[0], losses[1].reshape(len(right), number))
    # A destroyed model can hold a wrong answer infinitely likelier than the right one.
    return np.nan_to_num(ratios, nan=1e30, posinf=1e30)


def measures_of(seen: dict[str, Seen]) -> list[Measure]:
    """Return the areas by model; intervals hold for all attacks of a model together."""
    names = [name for name in TEXTS if name in seen["edited"].forget]
    level = level_of(len(names))
    how = f"{NEWCOMBE}, {LEVEL:.0%} for the {len(names)} attacks together"
    return [
        Measure(
            name,
            TEXTS[name],
            how,
            {
                role: auc_of(found.forget[name], found.unseen[name], level=level)
                for role, found in seen.items()
                if name in found.forget
            },
        )
        for name in names
    ]


def level_of(number: int) -> float:
    """Return the level of each of several intervals that hold together (Bonferroni)."""
    return 1 - (1 - LEVEL) / number


def findings_of(
    seen: dict[str, Seen], said: dict[str, Said], ratios: dict[str, Values | None]
) -> list[Finding]:
    """Judge by the rules of this section.

    Args:
        seen: scores by role, "base", "edited" and perhaps "retrained"; empty without unseen rows.
        said: what the models say, by role, as `forgotten.compared` takes it.
        ratios: truth ratios of the forget rows by role; None where there are none.
    """
    findings = []
    if not seen:
        findings.append(judge("membership", None, reason=NO_UNSEEN))
    elif "retrained" in seen:
        ours, theirs = seen["edited"], seen["retrained"]
        # Its own losses are the reference of that attack, which says nothing of it.
        names = [name for name in ours.forget if name != "reference"]
        found = {
            name: auc_difference(
                ours.forget[name],
                ours.unseen[name],
                (theirs.forget[name], theirs.unseen[name]),
                level=level_of(len(names)),
            )
            for name in names
        }
        worst = max(found, key=lambda name: _beyond(found[name], 0.0))
        findings.append(judge("membership_retrained", found[worst], attack=SHORT[worst]))
    else:
        level = level_of(len(seen["edited"].forget))
        found = {
            name: auc_of(scores, seen["edited"].unseen[name], level=level)
            for name, scores in seen["edited"].forget.items()
        }
        worst = max(found, key=lambda name: _beyond(found[name], 0.5))
        findings.append(judge("membership", found[worst], attack=SHORT[worst]))
    findings.append(_losses(said))
    if "retrained" in said:
        mine, other = ratios.get("edited"), ratios.get("retrained")
        if mine is None or other is None:
            findings.append(judge("forget_quality", None, reason=NO_WRONG))
        else:
            quality = metrics.forget_quality(mine, other)
            findings.append(judge("forget_quality", _p_value(quality, len(mine))))
    return findings


def _losses(said: dict[str, Said]) -> Finding:
    """Test whether losses are spread as those of a model that never saw the rows."""
    mine = said["edited"].loss
    if "retrained" in said:
        other, name = said["retrained"].loss, "the retrained model"
    elif "unseen" in said:
        other, name = said["unseen"].loss, "unseen rows"
    else:
        reason = "there are neither --unseen rows nor a --retrained model"
        return judge("losses", None, reason=reason)
    finite = [np.nan_to_num(x, nan=1e30, posinf=1e30) for x in (mine, other)]
    # The test of Forget Quality, between losses in place of ratios.
    value = metrics.forget_quality(*finite)
    return judge("losses", _p_value(value, min(len(mine), len(other))), other=name)


def _p_value(value: float, num_rows: int) -> Estimate:
    return Estimate(value, float("nan"), float("nan"), num_rows)


def _beyond(found: Estimate, middle: float) -> float:
    """Return how far an interval is beyond a value; negative where it contains it."""
    return max(found.low - middle, middle - found.high)

"""Is what held the answers up gone, or does something new hold them down?"""

from collections.abc import Mapping

from jaxtyping import PyTree

from jedit import metrics
from jedit.recipes.audit.estimates import BOOTSTRAP, mean_difference, ratio_of
from jedit.recipes.audit.rows import Rows
from jedit.recipes.audit.rules import judge
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.membership import Answers, spread
from jedit.report.audit_results import Estimate, Finding, Measure

NOTE = (
    "Influence is counted in probability. Of an answer that has become next to impossible little "
    "is left of either sign, however it was made so: a yes then says little, and a no much."
)
TEXTS = {
    "erased_influence": "share of the parameters' influence that no longer holds the answers up "
    "(D+)",
    "hidden_influence": "share by which they hold the answers down more than before (D-)",
}


def influence_of(model: LanguageModel, params: PyTree, asked: Rows) -> metrics.Influence:
    """Return how much of a model holds the answers up and down, of 40 rows at most.

    Costs a gradient for each of them.
    """
    few = spread(Answers(asked.rows, asked.answers))[0]
    return metrics.influence(model.apply, params, few)


def measures_of(found: Mapping[str, metrics.Influence]) -> list[Measure]:
    """Return D+ and D- of the way from the original model to each other one.

    Args:
        found: the influences by role: "base", "edited" and perhaps "retrained".
    """
    shifts = {role: _shift(found["base"], one) for role, one in found.items() if role != "base"}
    return [
        Measure(name, text, BOOTSTRAP, {role: shift[k] for role, shift in shifts.items()})
        for k, (name, text) in enumerate(TEXTS.items())
    ]


def finding_of(found: Mapping[str, metrics.Influence]) -> Finding:
    """Judge by which of the two is larger."""
    shift = metrics.influence_shift(found["base"], found["edited"])
    return judge("erased", mean_difference(shift.erased, shift.hidden))


def _shift(before: metrics.Influence, after: metrics.Influence) -> tuple[Estimate, Estimate]:
    whole = (before.positive + before.negative).sum(axis=1)
    erased = (before.positive - after.positive).sum(axis=1)
    hidden = (after.negative - before.negative).sum(axis=1)
    return ratio_of(erased, whole), ratio_of(hidden, whole)

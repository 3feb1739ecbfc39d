"""How much of a model holds the answers up, and how much holds them down: measures, no verdict.

D+ + D- is the fall of the parameters' attributions together and D+ - D- that of all influence
(`jedit.metrics.attribution`): both follow the answers' probability, whether an edit erased or hid.
So no rule judges by them, and they stand beside the retrained model's.
"""

from collections.abc import Mapping

from jaxtyping import PyTree

from jedit import metrics
from jedit.recipes.audit.estimates import BOOTSTRAP, ratio_of
from jedit.recipes.audit.parts import FAILURES, described
from jedit.recipes.audit.rows import Rows
from jedit.recipes.tofu.evaluation import LanguageModel
from jedit.recipes.tofu.membership import Answers, spread
from jedit.report.audit_results import Estimate, Measure

NOTE = (
    "Influence (D+, D-) is no verdict. D+ - D- is by how much all influence has fallen, which "
    "mostly follows the answers' probability: a likelier answer has more, an impossible one none, "
    "in a model that never saw the rows as well. Read it beside a retrained model whose answers "
    "are as likely, or not at all."
)
TEXTS = {
    "erased_influence": "share of the parameters' influence that no longer holds the answers up "
    "(D+)",
    "hidden_influence": "share by which they hold the answers down more than before (D-)",
}


def influence_of(model: LanguageModel, params: PyTree, asked: Rows) -> metrics.Influence | str:
    """Return how much of a model holds the answers up and down, of 40 rows at most.

    Costs a gradient for each of them, of all parameters: where there is no room for it, or no
    derivative, the reason is returned, so that nothing else of an audit is lost.
    """
    few = spread(Answers(asked.rows, asked.answers))[0]
    try:
        return metrics.influence(model.apply, params, few)
    except FAILURES as error:
        return described(error)


def measures_of(found: Mapping[str, metrics.Influence | str]) -> tuple[list[Measure], str]:
    """Return D+ and D- of the way from the original model to each other one, and a note on them.

    Args:
        found: the influences by role, "base", "edited" and perhaps "retrained", or the reason why
            there are none.
    """
    known: dict[str, metrics.Influence] = {}
    for role, one in found.items():
        if isinstance(one, str):
            return [], f"The parameters' influence was not measured: {one}."
        known[role] = one
    shifts = {role: _shift(known["base"], one) for role, one in known.items() if role != "base"}
    measures = [
        Measure(name, text, BOOTSTRAP, {role: shift[k] for role, shift in shifts.items()})
        for k, (name, text) in enumerate(TEXTS.items())
    ]
    return measures, NOTE


def _shift(before: metrics.Influence, after: metrics.Influence) -> tuple[Estimate, Estimate]:
    whole = (before.positive + before.negative).sum(axis=1)
    erased = (before.positive - after.positive).sum(axis=1)
    hidden = (after.negative - before.negative).sum(axis=1)
    return ratio_of(erased, whole), ratio_of(hidden, whole)

"""The verdict: what happened to the model, said in one sentence out of a comparison's numbers.

It is about one edited model, the comparison's `chosen` one.  How far that has forgotten is where
the probability of the forget rows' outputs, exp(-loss), lies between the untouched and the
retrained model's: the loss itself has no upper end, and a class that is never named any more may
have a third of the retrained model's.  The shares at which a word changes are constants below.
"""

import enum
import math
from typing import NamedTuple

from jedit.core.checks import COUNT, SHARE, check_numbers
from jedit.report.leaderboard import KNOWN, MEASURES
from jedit.report.results import PASSING_QUALITY, Comparison, Curve, Point
from jedit.report.table import number, setting_text

# All arbitrary: shares of the way, of the utility, and of what the untouched model alone knows.
FORGOTTEN, FORGOTTEN_IN_PART = 0.9, 0.5
OVERSHOT = 1.5  # times the retrained model's loss
KEPT_UTILITY = 0.9
BROUGHT_BACK = 0.1
# Between the untouched and the retrained model's probabilities, of the forget rows and under an
# attack: below it there is nothing to be told. Arbitrary.
TELLING_GAP = 0.05
NORMAL_95 = 1.959964


class Outcome(enum.Enum):
    """The outcomes that a verdict may have, with the words of its headline."""

    FORGOT = "It forgot, and kept the rest."
    IN_PART = "It forgot in part, and kept the rest."
    COSTLY = "It forgot, and lost some of the rest."
    RETURNS = "It seems to have forgotten, but attacks bring it back."
    REMEMBERS = "It did not forget."
    NO_EDIT = "No edit was good enough, so nothing was changed."
    NO_TRACE = "There was next to nothing to forget."


class Interval(NamedTuple):
    """The two ends of the 95% interval of a share."""

    low: float
    high: float


class Attack(NamedTuple):
    """The probability of the forget answers under an attack, by model.

    Attributes:
        action: description of what was done to the models.
        untouched: probability under the attack by the model that no method has edited.
        edited: probability under the attack by the comparison's chosen model.
        retrained: probability under the attack by the model that never saw the rows.
        unasked: probability by the chosen model without an attack.
    """

    action: str
    untouched: float
    edited: float
    retrained: float
    unasked: float

    @property
    def is_telling(self) -> bool:
        """Say whether the attack tells the untouched from the retrained model at all."""
        return self.untouched - self.retrained > TELLING_GAP

    @property
    def known(self) -> float:
        """Return how much the edited model still has of what only the untouched one should know.

        It is a share: 0 is the retrained model's probability, and 1 the untouched one's.
        """
        return (self.edited - self.retrained) / (self.untouched - self.retrained)

    @property
    def brings_back(self) -> bool:
        """Say whether the attack brings back more than the edited model tells unasked."""
        # An edit that forgot half tells the other half under any attack: only what exceeds that has
        # come back.
        gained = (self.edited - self.unasked) / (self.untouched - self.retrained)
        return min(self.known, gained) > BROUGHT_BACK


class Verdict(NamedTuple):
    """The verdict on the model that a comparison chose, with the numbers behind it.

    Attributes:
        outcome: which of the outcomes it is.
        point: the chosen model's; None if nothing was edited.
        way: how far the probability of the forget rows' outputs went, 1 being the retrained
            model's; None where nothing was edited, or the retrained model's is no smaller than the
            untouched one's.
        forget: the interval of the accuracy on the forget rows.
        heldout: the interval of the accuracy on the held-out retain rows.
        attack: the strongest attack that was run, if any tells the models apart.
        parts: the sentence's parts: what was forgotten, what it cost, what attacks do, how sure it
            is.
    """

    outcome: Outcome
    point: Point | None
    way: float | None
    forget: Interval
    heldout: Interval
    attack: Attack | None
    parts: tuple[str, str, str, str]

    @property
    def sentence(self) -> str:
        """Return the parts as one sentence."""
        return "; ".join(self.parts) + "."


def wilson(share: float, num: int) -> Interval:
    """Return the 95% score interval of a share that was counted on so many rows (Wilson 1927)."""
    check_numbers(SHARE, share=share)
    check_numbers(COUNT, num=num)
    z = NORMAL_95
    middle = share + z * z / (2 * num)
    reach = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return Interval(max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale))


def verdict(comparison: Comparison) -> Verdict:
    """Judge a comparison's chosen model.

    Rows are the unit of every interval: the tokens of one answer go right or wrong together.
    """
    original, retrained, num = comparison.original, comparison.retrained, comparison.num_judged
    chosen = comparison.chosen
    point = original if chosen is None else chosen[1]
    before, after, never = (math.exp(-p.forget_nll) for p in (original, point, retrained))
    way = (before - after) / (before - never) if chosen and before - never > TELLING_GAP else None
    forget = wilson(point.forget_accuracy, num.forget)
    heldout = wilson(point.heldout_accuracy, num.heldout)
    attacks = [] if chosen is None else _attacks(comparison, chosen[0].method)
    telling = [attack for attack in attacks if attack.is_telling]
    # An attack under which even the untouched model says no more than the retrained one proves
    # nothing about the edited, and its share would divide by next to zero.
    attack = max(telling, key=lambda attack: attack.known, default=None)
    # The order is by what matters most: a later outcome is only looked at where no earlier one
    # holds, so that what attacks bring back outweighs what the edit cost.
    if before - never <= TELLING_GAP:
        outcome = Outcome.NO_TRACE
    elif way is None:
        outcome = Outcome.NO_EDIT
    elif way < FORGOTTEN_IN_PART:
        outcome = Outcome.REMEMBERS
    elif attack and attack.brings_back:
        outcome = Outcome.RETURNS
    elif is_costly(comparison, point):
        outcome = Outcome.COSTLY
    else:
        is_partial = way < FORGOTTEN or is_told_apart(comparison, point)
        outcome = Outcome.IN_PART if is_partial else Outcome.FORGOT
    parts = (
        _forgotten(comparison, chosen, way),
        _cost(comparison, chosen, point),
        _attacked(attack, len(attacks), chosen is not None),
        _sure(comparison, point, forget, heldout),
    )
    return Verdict(outcome, chosen and chosen[1], way, forget, heldout, attack, parts)


def is_costly(comparison: Comparison, point: Point) -> bool:
    """Say whether held-out accuracy fell by more than chance explains, or much utility was lost."""
    accuracy = comparison.original.heldout_accuracy
    has_lost = _is_larger(accuracy, point.heldout_accuracy, comparison.num_judged.heldout)
    utility = comparison.original.model_utility
    if utility is None or point.model_utility is None:
        return has_lost
    return has_lost or point.model_utility < KEPT_UTILITY * utility


def is_told_apart(comparison: Comparison, point: Point) -> bool:
    """Say whether the model is still surer of the forget rows than the retrained one.

    Either the test of the truth ratios says so, or the accuracy is higher by more than chance.
    """
    if point.forget_quality is not None and point.forget_quality <= PASSING_QUALITY:
        return True
    accuracy = comparison.retrained.forget_accuracy
    return _is_larger(point.forget_accuracy, accuracy, comparison.num_judged.forget)


def _is_larger(one: float, other: float, num: int) -> bool:
    """Say whether one share of so many rows is larger than another by more than chance explains.

    Chance is the 95% interval of a difference (Newcombe 1998, method 10). That takes the rows of
    the two for different ones; here they are the same, so it errs on the side of chance.
    """
    return one - other > math.hypot(one - wilson(one, num).low, wilson(other, num).high - other)


def _attacks(comparison: Comparison, method: str) -> list[Attack]:
    """Return the attacks that were run on all three models."""
    names = ("untouched", method, "retrained")
    rows = [comparison.leaderboard.get(name, {}) for name in names]
    unasked = rows[1].get(KNOWN, 0.0)
    found = []
    for name, measure in MEASURES.items():
        values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
        if measure.attack and len(values) == len(rows):
            found.append(Attack(measure.attack, *values, unasked=unasked))
    return found


def _forgotten(
    comparison: Comparison, chosen: tuple[Curve, Point] | None, way: float | None
) -> str:
    original, retrained = comparison.original, comparison.retrained
    rows = f"{comparison.num_judged.forget} forget rows"
    never = "in a model that never saw them"
    if chosen is None:
        tried = sum(len(curve.points) for curve in comparison.curves)
        return (
            f"Of {tried} edited models there is {comparison.nothing}, so the loss on the {rows} "
            f"stays at {number(original.forget_nll)} nats, against {number(retrained.forget_nll)} "
            f"{never}, and the accuracy at {_percent(original.forget_accuracy)}, against "
            f"{_percent(retrained.forget_accuracy)}"
        )
    curve, point = chosen
    measures = ""
    if way is not None:
        measures = f" ({way:.0%} of the way, by probability)"
        if point.forget_nll > OVERSHOT * retrained.forget_nll:
            measures = " (it went far beyond, which shows, too)"
    loss = _change(number(original.forget_nll), number(point.forget_nll))
    accuracy = _change(_percent(original.forget_accuracy), _percent(point.forget_accuracy))
    return (
        f"{curve.method} ({setting_text(comparison, curve, point)}) edited the model: the loss on "
        f"the {rows} {loss} nats and their accuracy {accuracy}, where a model that never saw them "
        f"has {number(retrained.forget_nll)} and {_percent(retrained.forget_accuracy)}{measures}"
    )


def _cost(comparison: Comparison, chosen: tuple[Curve, Point] | None, point: Point) -> str:
    original, rows = comparison.original, f"{comparison.num_judged.heldout} held-out retain rows"
    if chosen is None:
        costs = [p.heldout_kl for curve in comparison.curves for p in curve.points]
        cheapest = min(filter(math.isfinite, costs), default=None)
        return (
            "that costs nothing, where the gentlest of the edits would have cost "
            f"{number(cheapest)} nats of KL on the {rows}"
        )
    accuracy = _change(_percent(original.heldout_accuracy), _percent(point.heldout_accuracy))
    text = f"it costs {number(point.heldout_kl)} nats of KL on {rows}, whose accuracy {accuracy}"
    if point.model_utility is None:
        return text
    utility = _change(number(original.model_utility), number(point.model_utility))
    return f"{text}, and Model Utility {utility}"


def _change(before: str, after: str) -> str:
    return f"stays at {after}" if before == after else f"goes from {before} to {after}"


def _attacked(attack: Attack | None, num_attacks: int, is_edited: bool) -> str:
    if not is_edited:
        return "there was nothing to attack"
    if not num_attacks:
        return "no attack was run"
    if attack is None:
        return f"none of {num_attacks} attacks tells even the untouched from the retrained model"
    which = "the only attack" if num_attacks == 1 else f"the strongest of {num_attacks} attacks"
    return (
        f"{which}, {attack.action}, takes the probability of the forgotten answers from "
        f"{number(attack.unasked)} to {number(attack.edited)} (untouched "
        f"{number(attack.untouched)}, retrained {number(attack.retrained)}, under the same)"
    )


def _sure(comparison: Comparison, point: Point, forget: Interval, heldout: Interval) -> str:
    tried = sum(len(curve.points) for curve in comparison.curves)
    clauses = [f"these accuracies lie in {_range(forget)} and {_range(heldout)} (95%, by rows)"]
    if point.forget_quality is not None:
        clauses.append(
            "the test against the retrained model's truth ratios gives p = "
            f"{number(point.forget_quality)}"
        )
    if comparison.chosen is not None:
        clauses.append(
            f"the model is the best of {tried} tried on one seed, chosen by looking at the "
            "retrained one"
        )
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:.3g}–{100 * interval.high:.3g}%"

"""The rules by which an audit judges: a measure, a threshold with its source, and the sentences.

Intervals decide, not the numbers in their middle:

    at most     yes where the whole 95% interval is at or below the limit, no where all of it is
                above, else "cannot tell"
    at least    the other way round
    contains    no where the interval leaves the value out; yes where it contains the value and is
                narrow; "cannot tell" where it is so wide that it would contain much else too
    p-value     no at or below the limit, else yes; of fewer than 16 rows "cannot tell" for yes, for
                a test that finds nothing in so few says nothing

Fewer than five rows prove nothing, whatever the numbers.  What could not be measured is said so.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jedit.report.audit_results import Estimate, Finding, Outcome, Overall
from jedit.report.results import PASSING_QUALITY
from jedit.report.table import number
from jedit.report.verdict import BROUGHT_BACK, FORGOTTEN, KEPT_UTILITY, TELLING_GAP

MIN_ROWS = 5
MIN_TESTED = 16  # arbitrary; two samples of so many that differ by a half are told apart
# Half the width beyond which an interval of an area says nothing; some 16 rows on either side.
AREA_REACH = 0.2
ARBITRARY = "arbitrary"
TOLERANCE = round(1 - FORGOTTEN, 9)  # of what the original model alone knew, may be left
ALONE = "what the original model alone knew"
OF_VERDICTS = "arbitrary, as in jedit's reports"
REFERENCE = "nothing says what a model has that never saw these rows: give --retrained or --unseen"

Kind = Literal["at most", "at least", "contains", "p-value"]


class Rule(NamedTuple):
    """A rule of the table.

    Attributes:
        name: its name in the JSON.
        section: name of the section it belongs to.
        question: what it asks; yes is good.
        kind: how the interval decides, as this file's docstring says.
        limit: the threshold.
        said: the threshold in words.
        source: where the threshold comes from.
        passed: sentence of a yes, with {x} for the estimate and {n} for its rows.
        failed: sentence of a no.
    """

    name: str
    section: str
    question: str
    kind: Kind
    limit: float
    said: str
    source: str
    passed: str
    failed: str


def _left(name: str, question: str, what: str) -> Rule:
    said = f"at most {TOLERANCE:.0%} of what the original model alone knew"
    return Rule(
        name,
        "forgotten",
        question,
        "at most",
        TOLERANCE,
        said,
        OF_VERDICTS,
        f"Of {what}, {{x}} is left of what the original model alone had (0: as if the rows had "
        "never been seen, 1: as before).",
        f"Of {what}, {{x}} is still there of what the original model alone had (0: as if the rows "
        "had never been seen, 1: as before).",
    )


def _back(name: str, question: str, what: str) -> Rule:
    said = f"at most {BROUGHT_BACK:.0%} of {{of}}"
    return Rule(
        name,
        "comeback",
        question,
        "at most",
        BROUGHT_BACK,
        said,
        OF_VERDICTS,
        f"{what} brings back a share of {{x}} of {{of}}.",
        f"{what} brings back a share of {{x}} of {{of}}: it was hidden, not gone.",
    )


TABLE = (
    Rule(
        "known",
        "forgotten",
        "Did the original model know the rows?",
        "at least",
        TELLING_GAP,
        f"a probability at least {TELLING_GAP:g} above that of a model that never saw them",
        OF_VERDICTS,
        "The original model gives the answers a probability {x} higher than a model that never "
        "saw them does.",
        "The original model gives the answers a probability only {x} higher than a model that "
        "never saw them does: there was next to nothing to forget.",
    ),
    _left("probability", "Are the answers no likelier than unseen ones?", "the probability"),
    _left(
        "paraphrase",
        "Are the answers in other words no likelier than unseen ones?",
        "the probability of the answers in other words",
    ),
    _left(
        "rouge_greedy",
        "Is the model's first answer no nearer to the truth than for unseen rows?",
        "the words of the true answer in the model's own (ROUGE-L)",
    ),
    _left(
        "rouge_sampled",
        "Is the best of several drawn answers no nearer to the truth?",
        "the words of the true answer in the best of several drawn ones (ROUGE-L)",
    ),
    _left(
        "extraction_strength",
        "Does the beginning of an answer no longer bring the rest?",
        "the part of an answer that its beginning brings (extraction strength)",
    ),
    _left(
        "exact_memorization",
        "Are the answers' words no longer completed one by one?",
        "the share of words that come by themselves (exact memorisation)",
    ),
    Rule(
        "membership",
        "membership",
        "Do the rows look like rows that were never seen?",
        "contains",
        0.5,
        f"an area that contains 0.5 and is no wider than 0.5 ± {AREA_REACH:g}",
        f"0.5 is chance; the width is {ARBITRARY}",
        "The attack that tells the rows best from unseen ones, by {attack}, has an area of {x}: "
        "what chance has.",
        "By {attack} the rows can be told from unseen ones: the area is {x}, where chance has "
        "0.5{side}.",
    ),
    Rule(
        "membership_retrained",
        "membership",
        "Do the rows stand out no more than in the retrained model?",
        "contains",
        0.0,
        f"a difference of areas that contains 0 and is no wider than ± {AREA_REACH:g}",
        f"0 is the retrained model's; the width is {ARBITRARY}",
        "By {attack} the rows are told from unseen ones as well as in the retrained model: the "
        "areas differ by {x}.",
        "By {attack} the rows are told from unseen ones otherwise than in the retrained model: the "
        "areas differ by {x}{side}.",
    ),
    Rule(
        "losses",
        "membership",
        "Are the losses spread as a model's that never saw the rows?",
        "p-value",
        PASSING_QUALITY,
        f"p above {PASSING_QUALITY:g} (Kolmogorov-Smirnov)",
        "TOFU's significance",
        "The losses are spread as those of {other} (p = {x}).",
        "The losses are not spread as those of {other} (p = {x}).",
    ),
    Rule(
        "forget_quality",
        "membership",
        "Does it weigh right against wrong answers as the retrained model does?",
        "p-value",
        PASSING_QUALITY,
        f"p above {PASSING_QUALITY:g} (Forget Quality)",
        "TOFU, arXiv 2401.06121",
        "The truth ratios cannot be told from the retrained model's (Forget Quality {x}).",
        "The truth ratios can be told from the retrained model's (Forget Quality {x}).",
    ),
    Rule(
        "lens",
        "depth",
        "Do the inner layers no longer say it?",
        "at most",
        TOLERANCE,
        f"at most {TOLERANCE:.0%} of what the original model alone knew, at every layer",
        OF_VERDICTS,
        "The layer that says most of it ({layer}) says a share of {x} of what the original model "
        "alone knew.",
        "{layer} still says a share of {x} of what the original model alone knew.",
    ),
    Rule(
        "depth_score",
        "depth",
        "Has every layer lost it as far as by retraining?",
        "at least",
        FORGOTTEN,
        f"an Unlearning Depth Score of at least {FORGOTTEN:g}",
        OF_VERDICTS,
        "The Unlearning Depth Score is {x}; retraining has 1.",
        "The Unlearning Depth Score is {x}; retraining has 1, the original model 0.",
    ),
    _back(
        "relearning",
        "Does teaching some of the rows not bring back the others?",
        "Teaching some of the rows again ({best}), beyond what it does to a model that never knew,",
    ),
    _back(
        "benign",
        "Does training on other rows not bring them back?",
        "Training on rows to keep ({best})",
    ),
    _back("quantized_8_bits", "Does it last in 8 bits?", "Rounding the weights to 8 bits"),
    _back("quantized_4_bits", "Does it last in 4 bits?", "Rounding the weights to 4 bits"),
    _back(
        "prefix",
        "Does it last when asked insistently?",
        "The most telling of the stated prefixes ({best})",
    ),
    _back("other_words", "Does it last in other words?", "Asking in other words"),
    Rule(
        "retain_kl",
        "cost",
        "Did the rest stay within the stated budget?",
        "at most",
        math.nan,
        "at most {limit} nats per token of KL on the rows to keep",
        "--budget",
        "On the rows to keep the answers moved by {x} nats per token; {limit} were allowed.",
        "On the rows to keep the answers moved by {x} nats per token, where {limit} were allowed.",
    ),
    Rule(
        "retain_rouge",
        "cost",
        "Are the rows to keep still answered?",
        "at least",
        KEPT_UTILITY,
        f"at least {KEPT_UTILITY:.0%} of the original model's ROUGE-L",
        OF_VERDICTS,
        "The answers to the rows to keep have {x} times the original model's ROUGE-L.",
        "The answers to the rows to keep have only {x} times the original model's ROUGE-L.",
    ),
)
RULES = {rule.name: rule for rule in TABLE}
# By importance: the first section in which a rule fails gives the headline.
HEADLINES = {
    "forgotten": "Not all of it is forgotten.",
    "comeback": "It seems forgotten, but it can be brought back.",
    "membership": "It is no longer said, but the model does not look as if it had never seen it.",
    "depth": "It is no longer said, but it is still in the model.",
    "cost": "It is forgotten, but the rest paid more than was allowed.",
}
# The same where forgetting was not measured, or not all that was measured of it is a yes.
UNSURE = {
    "comeback": "It can be brought back; what was forgotten cannot be told.",
    "membership": "The model does not look as if it had never seen it; what was forgotten cannot "
    "be told.",
    "depth": "It is still in the model; what was forgotten cannot be told.",
    "cost": "The rest paid more than was allowed; what was forgotten cannot be told.",
}


def outcome_of(kind: Kind, limit: float, estimate: Estimate) -> Outcome:
    """Judge an estimate by one kind of rule."""
    low, high = estimate.low, estimate.high
    if estimate.num_rows < MIN_ROWS:
        return Outcome.UNDECIDED
    if kind == "p-value":
        if estimate.value <= limit:
            return Outcome.FAILED
        return Outcome.PASSED if estimate.num_rows >= MIN_TESTED else Outcome.UNDECIDED
    if kind == "at most" and estimate.value == math.inf:
        return Outcome.FAILED
    if not (math.isfinite(low) and math.isfinite(high)):
        return Outcome.UNDECIDED
    if kind == "contains":
        if low > limit or high < limit:
            return Outcome.FAILED
        is_narrow = low >= limit - AREA_REACH and high <= limit + AREA_REACH
        return Outcome.PASSED if is_narrow else Outcome.UNDECIDED
    if kind == "at most":
        is_kept, is_broken = high <= limit, low > limit
    else:
        is_kept, is_broken = low >= limit, high < limit
    if is_kept:
        return Outcome.PASSED
    return Outcome.FAILED if is_broken else Outcome.UNDECIDED


def judge(
    name: str,
    estimate: Estimate | None,
    *,
    reason: str = "",
    limit: float | None = None,
    **said: str,
) -> Finding:
    """Judge what was measured by the rule of that name.

    Args:
        name: name of a rule in `RULES`.
        estimate: what was measured; None: nothing, for the reason given.
        reason: why nothing was measured, as a clause.
        limit: threshold in place of the table's, where that is the user's.
        **said: what the rule's sentences name besides numbers.

    Returns:
        The finding.
    """
    rule = RULES[name]
    threshold = rule.limit if limit is None else limit
    words = {"limit": number(threshold), "of": ALONE, **said}
    shown = rule.said.format(**words)
    outcome = (
        Outcome.NOT_MEASURED if estimate is None else outcome_of(rule.kind, threshold, estimate)
    )
    if estimate is None:
        sentence = f"Not measured: {reason}."
    elif outcome is Outcome.UNDECIDED:
        sentence = _unsure(rule, estimate, shown)
    else:
        form = rule.passed if outcome is Outcome.PASSED else rule.failed
        x = number(estimate.value) if rule.kind == "p-value" else estimate.text
        below = estimate.high < threshold
        side = " (they look less known than unseen rows, which shows too)" if below else ""
        sentence = form.format(x=x, n=estimate.num_rows, side=side, **words)
        sentence = sentence[0].upper() + sentence[1:]
    return Finding(
        name, rule.section, rule.question, outcome, sentence, estimate, shown, rule.source
    )


def _unsure(rule: Rule, estimate: Estimate, limit: str) -> str:
    """Say why an estimate is neither a yes nor a no."""
    if estimate.num_rows < MIN_ROWS:
        return f"Cannot tell: {estimate.num_rows} rows prove nothing; there must be {MIN_ROWS}."
    begin = f"Cannot tell with {estimate.num_rows} rows:"
    if rule.kind == "p-value":
        p = number(estimate.value)
        return f"{begin} a test that finds no difference in so few (p = {p}) says nothing."
    if rule.kind == "contains":
        return f"{begin} the interval of {estimate.text} holds too much beside chance."
    return f"{begin} the interval of {estimate.text} reaches to both sides of the rule ({limit})."


def worst_of(name: str, shares: Mapping[Any, Estimate]) -> Any:
    """Return the key of the share that speaks most against an edit, by a rule of kind "at most".

    The one that is most surely above the limit; where none is, the one that may be highest.
    """

    def least(key: Any) -> float:
        low = shares[key].low
        return -math.inf if math.isnan(low) else low

    def most(key: Any) -> float:
        high = shares[key].high
        return math.inf if math.isnan(high) else high

    rule = RULES[name]
    failed = [
        key
        for key, share in shares.items()
        if outcome_of(rule.kind, rule.limit, share) is Outcome.FAILED
    ]
    return max(failed, key=least) if failed else max(shares, key=most)


def overall(findings: Sequence[Finding], notes: Sequence[str] = ()) -> Overall:
    """Return the verdict: the worst that any rule says, and what could not be said.

    That there was nothing to forget comes first, since all else is then beside the point; then the
    first section of `HEADLINES` in which a rule fails.

    Args:
        findings: what the rules say.
        notes: sentences that come before all else, such as that two folders are the same.
    """
    by_rule = {finding.rule: finding for finding in findings}
    judged = [finding for finding in findings if finding.rule != "known"]
    counts = {outcome: sum(finding.outcome is outcome for finding in judged) for outcome in Outcome}
    text = (
        f"Of {len(judged)} questions {counts[Outcome.PASSED]} are answered yes, "
        f"{counts[Outcome.FAILED]} no; {counts[Outcome.UNDECIDED]} cannot be told with these rows "
        f"and {counts[Outcome.NOT_MEASURED]} were not measured."
    )
    known = by_rule.get("known")
    if known is not None and known.outcome is Outcome.FAILED:
        headline = "There was next to nothing to forget."
        return Overall(Outcome.UNDECIDED, headline, _joined(*notes, known.sentence, text))
    failed = [finding for finding in judged if finding.outcome is Outcome.FAILED]
    answers = {finding.outcome for finding in judged if finding.section == "forgotten"}
    is_gone = answers - {Outcome.NOT_MEASURED} == {Outcome.PASSED}
    for section, headline in HEADLINES.items():
        worst = [finding for finding in failed if finding.section == section]
        if worst:
            # What is furthest beyond its limit stands for the section.
            worst.sort(key=_distance, reverse=True)
            if not is_gone:
                headline = UNSURE.get(section, headline)
            return Overall(Outcome.FAILED, headline, _joined(*notes, worst[0].sentence, text))
    first = _missing(judged, known)
    if counts[Outcome.PASSED] == len(judged) > 0 and not first:
        headline = "Forgotten, as far as these tests can tell."
        return Overall(Outcome.PASSED, headline, _joined(*notes, text))
    headline = "Nothing speaks against it, but not everything can be told."
    return Overall(Outcome.UNDECIDED, headline, _joined(*notes, first, text))


def _missing(judged: Sequence[Finding], known: Finding | None) -> str:
    """Say what weighs most of what is not known."""
    order = list(HEADLINES)
    if known is not None and known.outcome is Outcome.NOT_MEASURED:
        return f"What was forgotten cannot be judged: {REFERENCE}."
    if known is not None and known.outcome is Outcome.UNDECIDED:
        return f"Whether there was anything to forget is not sure. {known.sentence}"
    open_ = [f for f in judged if f.outcome in (Outcome.UNDECIDED, Outcome.NOT_MEASURED)]
    open_.sort(key=lambda f: (f.outcome is Outcome.NOT_MEASURED, order.index(f.section)))
    return f"{open_[0].question} {open_[0].sentence}" if open_ else ""


def _distance(finding: Finding) -> float:
    """Return how far a failed finding is beyond its limit, in its own units; for sorting alone."""
    rule, estimate = RULES[finding.rule], finding.estimate
    if estimate is None or rule.kind == "p-value":
        return 0.0
    distance = abs(estimate.value - rule.limit)
    return distance if math.isfinite(distance) else 0.0


def _joined(*texts: str) -> str:
    return " ".join(text for text in texts if text)

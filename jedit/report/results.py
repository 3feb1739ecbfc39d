"""The numbers of a comparison: what is measured at one model, along one curve, in one run.

These are plain values: what is shown, written as JSON and drawn is made from them alone.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jedit.core.checks import FINITE, NOT_NEGATIVE, SHARE, check_numbers
from jedit.report.evaluation_log import Evaluation

SCHEMA = "jedit.results/1"


class Point(NamedTuple):
    """Measurements of one model; losses and divergences are nats per counted output.

    Attributes:
        strength: how far the method was turned up, in the unit of its curve.
        edit_seconds: what the edit alone took, without fitting a curvature and without compiling.
        forget_nll: loss on the rows to be forgotten.
        forget_accuracy: share of the forget rows' counted outputs predicted right.
        retain_nll: loss on the retain rows that edits see.
        retain_accuracy: share of the retain rows' counted outputs predicted right.
        heldout_nll: loss on retain rows that the model was trained on and no edit sees.
        heldout_accuracy: share of the held-out retain rows' counted outputs predicted right.
        heldout_kl: KL(original || this model) on the held-out retain rows.
        forget_kl: KL(retrained || this model) on the rows to be forgotten.
        test_nll: loss on rows that no model was trained on, where there are any.
        test_accuracy: share of the test rows' counted outputs predicted right, where there are any.
        truth_ratio: mean truth ratio of the rows to be forgotten, where wrong answers exist.
        forget_quality: p-value of the Kolmogorov-Smirnov test between the truth ratios of this
            model and of the retrained one.
        model_utility: TOFU's Model Utility, where its question sets are at hand.
        predicted_kl: the retain KL that the second-order model predicts, on the rows the edit saw.
        true_kl: the true retain KL on the rows the edit saw.
    """

    strength: float
    edit_seconds: float
    forget_nll: float
    forget_accuracy: float
    retain_nll: float
    retain_accuracy: float
    heldout_nll: float
    heldout_accuracy: float
    heldout_kl: float
    forget_kl: float
    test_nll: float | None = None
    test_accuracy: float | None = None
    truth_ratio: float | None = None
    forget_quality: float | None = None
    model_utility: float | None = None
    predicted_kl: float | None = None
    true_kl: float | None = None


class Curve(NamedTuple):
    """The points of one method at one setting, by rising strength."""

    method: str
    setting: dict[str, float]
    points: tuple[Point, ...]


class Method(NamedTuple):
    """One method of a comparison, in words, and the settings it was tried at.

    Attributes:
        name: name as it is shown.
        description: description in one sentence: what the method does.
        strength: meaning of the method's strength, with its unit.
        grid: the settings that were tried; every one has a curve.
        fit_seconds: seconds that it takes once before any edit, without compiling.
        keeps_budget: whether its strength is a retain KL that it keeps in truth; shaded in figures.
    """

    name: str
    description: str
    strength: str
    grid: dict[str, tuple[float, ...]]
    fit_seconds: float = 0.0
    keeps_budget: bool = False


class Answer(NamedTuple):
    """One question, and what the untouched, the edited and the retrained model answer.

    `by_itself` is the answer of the model that `jedit.forget` edited, empty where none was.
    """

    kind: str
    question: str
    truth: str
    original: str
    edited: str
    retrained: str
    by_itself: str = ""


class Guess(NamedTuple):
    """The class that a classifier takes an image for, and the probability that it gives it."""

    label: str
    probability: float


class Picture(NamedTuple):
    """One image, and the class that each of three models takes it for.

    Attributes:
        kind: which rows it comes from, "forget" or "retain".
        pixels: values by row, from 0 to 1; 1 is ink.
        truth: name of the image's class.
        original: the untouched model's guess.
        edited: the guess of the comparison's chosen model.
        retrained: the retrained model's guess.
    """

    kind: str
    pixels: tuple[tuple[float, ...], ...]
    truth: str
    original: Guess
    edited: Guess
    retrained: Guess


class NumJudged(NamedTuple):
    """Numbers of rows that the accuracies of a point were counted on."""

    forget: int
    heldout: int


class Comparison(NamedTuple):
    """Methods compared on one model and one forget set.

    Attributes:
        name: the files' name, one word.
        title: title of the section, one line.
        notes: texts about what was run, a sentence each.
        num_rows: number of rows in each set.
        num_judged: numbers of the rows that judge a point.
        settings: settings of the model, the training and the edits.
        seconds: seconds that training, retraining and the rest took.
        kl_budget: the held-out retain KL under which a method's best point is chosen.
        utility_share: None, or the share of the untouched model's Model Utility that a best point
            has to keep: best points are then chosen by `QUALITY_RULE`.
        original: the untouched model's point.
        retrained: the point of the model trained without the forget set.
        methods: the methods that were compared.
        curves: every setting of every method.
        answers: a few questions with each model's answer; the edited model's are those of `chosen`.
        by_itself: the point of the model that `jedit.forget` edited, which stops by itself and is
            chosen by nothing; None where it was not run.
        pictures: a few images with each model's guess; the edited model's are those of `chosen`.
        leaderboard: by model (untouched, retrained, each method at its best point) and metric,
            further numbers; empty where none were measured.
        evaluations: by model, what the leaderboard's metrics are made of, row by row; written as
            files of their own.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    num_rows: dict[str, int]
    num_judged: NumJudged
    settings: dict[str, Any]
    seconds: dict[str, float]
    kl_budget: float
    original: Point
    retrained: Point
    methods: tuple[Method, ...]
    curves: tuple[Curve, ...]
    answers: tuple[Answer, ...] = ()
    by_itself: Point | None = None
    pictures: tuple[Picture, ...] = ()
    utility_share: float | None = None
    leaderboard: dict[str, dict[str, float]] = {}
    evaluations: dict[str, dict[str, Evaluation]] = {}

    @property
    def rule(self) -> str:
        """Say in words how best points are chosen."""
        if self.utility_share is None:
            return RULE.format(budget=self.kl_budget)
        return QUALITY_RULE.format(share=self.utility_share)

    @property
    def nothing(self) -> str:
        """Say what to write of a method that the rule finds no point of."""
        if self.utility_share is None:
            return f"no point within {self.kl_budget:g} nats"
        return f"no point keeps {self.utility_share:.0%} of the utility"

    def best(self, method: str | None) -> tuple[Curve, Point] | None:
        """Return a method's best point by the rule, or with None the best of all methods."""
        if self.utility_share is None:
            return best_point(self.curves, method, self.kl_budget)
        return best_quality(self.curves, method, self.utility_share, self.original)

    @property
    def chosen(self) -> tuple[Curve, Point] | None:
        """Return the best point of all by the rule: the edited model that the page is about."""
        return self.best(None)

    def nearest_in_loss(self, method: str) -> tuple[Curve, Point] | None:
        """Return the method's best point by `OTHER_RULE`."""
        return best_point(self.curves, method, self.kl_budget, self.retrained.forget_nll)


class Run(NamedTuple):
    """All that one call of a command made, with how and on what.

    Attributes:
        command: the command as it was typed.
        date: time at which it started, ISO 8601 with the zone.
        seed: the seed that every random key is made from.
        seconds: seconds of the whole run, compiling included.
        peak_memory_gib: the most memory that the process held, in GiB.
        versions: versions of Python, of jedit and of what it stands on.
        machine: description of the machine it ran on.
        comparisons: the comparisons that were made, one or several.
    """

    command: str
    date: str
    seed: int
    seconds: float
    peak_memory_gib: float
    versions: dict[str, str]
    machine: dict[str, Any]
    comparisons: tuple[Comparison, ...]


RULE = (
    "A method's best point is the one with the smallest KL to the retrained model on the forget "
    "rows, among all its settings and strengths whose KL to the original on held-out retain rows "
    "is at most {budget:g} nats per output."
)


OTHER_RULE = (
    "By the loss instead: the point whose loss on the forget rows is nearest to the retrained "
    "model's, within the same budget."
)


PASSING_QUALITY = 0.05
QUALITY_RULE = (
    "A method's best point is the one of the largest Model Utility among those whose Forget "
    f"Quality is above {PASSING_QUALITY:g}, where the test no longer tells the model from the "
    "retrained one; if there is none, the one of the largest Forget Quality. Points that keep less "
    "than {share:.0%} of the untouched model's Model Utility are left out."
)


def best_quality(
    curves: Iterable[Curve], method: str | None, share: float, original: Point
) -> tuple[Curve, Point] | None:
    """Return a method's best point by `QUALITY_RULE`, with its curve; None if all are left out.

    With None for a method it is the best of all methods.
    """
    check_numbers(SHARE, share=share)
    least = share * (original.model_utility or 0)
    pairs = [
        (curve, point)
        for curve in curves
        if method in (None, curve.method)
        for point in curve.points
        if (point.model_utility or 0) >= least
        and point.forget_quality is not None
        and math.isfinite(point.forget_quality)
    ]

    def rank(pair: tuple[Curve, Point]) -> tuple[bool, float]:
        quality, utility = pair[1].forget_quality or 0.0, pair[1].model_utility or 0.0
        # A p-value above the limit says no more the higher it is: from there on utility decides.
        is_passing = quality > PASSING_QUALITY
        return is_passing, utility if is_passing else quality

    return max(pairs, key=rank, default=None)


def best_point(
    curves: Iterable[Curve],
    method: str | None,
    kl_budget: float,
    forget_nll: float | None = None,
) -> tuple[Curve, Point] | None:
    """Return a method's best point by `RULE`, with its curve; None if none is within budget.

    With None for a method it is the best of all methods, with a `forget_nll` the best by
    `OTHER_RULE`. The retrained model is looked at to choose,
    for every method alike; whoever has none has to choose otherwise.
    """
    check_numbers(NOT_NEGATIVE, kl_budget=kl_budget)
    check_numbers(FINITE, forget_nll=forget_nll)

    def distance(pair: tuple[Curve, Point]) -> float:
        point = pair[1]
        return point.forget_kl if forget_nll is None else abs(point.forget_nll - forget_nll)

    within = [
        (curve, point)
        for curve in curves
        if method in (None, curve.method)
        for point in curve.points
        if point.heldout_kl <= kl_budget and math.isfinite(distance((curve, point)))
    ]
    return min(within, key=distance, default=None)


def to_json(run: Run) -> dict[str, Any]:
    """Return the run as plain JSON values, with every method's best points by both rules added.

    A number that is not finite (a model that an ascent has destroyed) becomes null.
    """
    # Row by row results are files of their own; in here they would be most of the file.
    bare = [comparison._replace(evaluations={}) for comparison in run.comparisons]
    out = plain(run._replace(comparisons=tuple(bare)))
    for part, comparison in zip(out["comparisons"], run.comparisons, strict=True):
        del part["evaluations"]
        part["rule"] = comparison.rule
        part["other_rule"] = OTHER_RULE
        for name, choose in (
            ("best", comparison.best),
            ("nearest_in_loss", comparison.nearest_in_loss),
        ):
            pairs = {method.name: choose(method.name) for method in comparison.methods}
            part[name] = {
                method: None if pair is None else {"setting": pair[0].setting, **plain(pair[1])}
                for method, pair in pairs.items()
            }
    return {"schema": SCHEMA, **out}


def plain(value: Any) -> Any:
    """Return the value as plain JSON values; a number that is not finite becomes None."""
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value

"""The table of a comparison: each method's best point, the untouched and the retrained model."""

import math
from collections.abc import Callable
from typing import NamedTuple

from rich.table import Table

from jedit.report.results import Comparison, Curve, Point


class Column(NamedTuple):
    """A column: a short heading, what it is in full, and the text of a point's cell."""

    heading: str
    meaning: str
    text: Callable[[Point], str]
    is_given: Callable[[Point], bool] = lambda _: True


def number(value: float | None) -> str:
    """About three digits; a dash for what was not measured, ∞ or NaN said as such."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size < 1e-12:
        return "0"
    if not 1e-3 <= size < 1e4:
        return f"{value:.1e}"
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def _two(first: float | None, second: float | None) -> str:
    return "–" if first is None else f"{number(first)}/{number(second)}"


COLUMNS = (
    Column(
        "forget\nNLL", "loss on the forget rows, nats per output", lambda p: number(p.forget_nll)
    ),
    Column("forget\nacc %", "accuracy on the forget rows", lambda p: share(p.forget_accuracy)),
    Column("retain\nNLL", "loss on retain rows that edits see", lambda p: number(p.retain_nll)),
    Column("retain\nacc %", "accuracy on the same", lambda p: share(p.retain_accuracy)),
    Column(
        "held-out\nacc %",
        "accuracy on retain rows that no edit sees",
        lambda p: share(p.heldout_accuracy),
    ),
    Column(
        "test\nacc %",
        "accuracy on rows that no model was trained on",
        lambda p: share(p.test_accuracy),
        lambda p: p.test_accuracy is not None,
    ),
    Column(
        "KL to\noriginal",
        "KL(original ‖ model) on held-out retain rows, nats per output",
        lambda p: number(p.heldout_kl),
    ),
    Column(
        "KL to\nretrained",
        "KL(retrained ‖ model) on the forget rows, nats per output",
        lambda p: number(p.forget_kl),
    ),
    Column(
        "KL pred.\n/ true",
        "retain KL as the second-order model predicts it, and the true one on the same rows, which "
        "are those the line search saw",
        lambda p: (
            "–" if p.predicted_kl is None else f"{number(p.predicted_kl)}/{number(p.true_kl)}"
        ),
        lambda p: p.predicted_kl is not None,
    ),
    Column(
        "truth\nratio",
        "mean truth ratio of the forget rows",
        lambda p: number(p.truth_ratio),
        lambda p: p.truth_ratio is not None,
    ),
    Column(
        "forget\nquality",
        "p-value of the Kolmogorov-Smirnov test of the truth ratios against the retrained model's",
        lambda p: number(p.forget_quality),
        lambda p: p.forget_quality is not None,
    ),
    Column(
        "model\nutility",
        "harmonic mean of probability, ROUGE-L recall and truth ratio on retain questions, real "
        "authors and world facts",
        lambda p: number(p.model_utility),
        lambda p: p.model_utility is not None,
    ),
)


class Row(NamedTuple):
    """A row of the table: who, at which setting, and the numbers (None: nothing within budget)."""

    name: str
    setting: str
    point: Point | None
    edit_seconds: str
    fit_seconds: str


def setting_text(comparison: Comparison, curve: Curve, point: Point) -> str:
    """A setting and a strength, in words."""
    method = next(m for m in comparison.methods if m.name == curve.method)
    parts = [f"{name} {value:g}" for name, value in curve.setting.items()]
    return ", ".join([*parts, f"{method.strength.split(' (')[0]} {point.strength:g}"])


def best_rows(comparison: Comparison, *, by_loss: bool = False) -> list[Row]:
    """The untouched and the retrained model, and the best point of each method by either rule."""
    choose = comparison.nearest_in_loss if by_loss else comparison.best
    retrain = comparison.seconds.get("retrain")
    rows = [
        Row("untouched", "", comparison.original, "–", "–"),
        Row("retrained", "", comparison.retrained, number(retrain), "–"),
    ]
    for method in comparison.methods:
        fit = number(method.fit_seconds) if method.fit_seconds else "–"
        best = choose(method.name)
        if best is None:
            text = comparison.nothing if not by_loss else "no point within budget"
            rows.append(Row(method.name, text, None, "–", fit))
        else:
            curve, point = best
            text = setting_text(comparison, curve, point)
            rows.append(Row(method.name, text, point, number(point.edit_seconds), fit))
    return rows


def all_rows(comparison: Comparison) -> list[Row]:
    """Every point of every curve."""
    fits = {m.name: number(m.fit_seconds) if m.fit_seconds else "–" for m in comparison.methods}
    return [
        Row(
            curve.method,
            setting_text(comparison, curve, point),
            point,
            number(point.edit_seconds),
            fits[curve.method],
        )
        for curve in comparison.curves
        for point in curve.points
    ]


def shown_columns(comparison: Comparison) -> list[Column]:
    """The columns for which some model has a number."""
    points = [comparison.original, *(p for c in comparison.curves for p in c.points)]
    return [column for column in COLUMNS if any(column.is_given(p) for p in points)]


def comparison_table(comparison: Comparison) -> Table:
    """The best points as a table for the terminal."""
    columns = shown_columns(comparison)
    table = Table(title=comparison.title, title_justify="left", header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("chosen setting", max_width=30)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    table.add_column("edit\ns", justify="right", no_wrap=True)
    table.add_column("fit\ns", justify="right", no_wrap=True)
    for row in best_rows(comparison):
        cells = ["–" if row.point is None else c.text(row.point) for c in columns]
        end = row.name == "retrained"
        table.add_row(
            row.name, row.setting, *cells, row.edit_seconds, row.fit_seconds, end_section=end
        )
    return table

"""The table of a comparison: each method's best point, the untouched and the retrained model."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jedit.report.results import Comparison, Curve, Method, Point

if TYPE_CHECKING:
    from rich.table import Table

REFERENCES = ("untouched", "retrained")


class Heading(NamedTuple):
    """A column's heading: short, in full, and whether a narrow screen shows the column."""

    text: str
    meaning: str
    is_main: bool = False


class Row(NamedTuple):
    """One row of a sheet: a model, the setting it was made at, and a text for each column."""

    name: str
    setting: str
    cells: tuple[str, ...]

    @property
    def is_reference(self) -> bool:
        """Say whether the model is one that no method has edited."""
        return self.name in REFERENCES


class Sheet(NamedTuple):
    """A table's content, which the terminal and the page each show in their way."""

    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    first: str = "model"  # what a row is

    @property
    def has_settings(self) -> bool:
        """Say whether any row tells at which setting its model was made."""
        return any(row.setting for row in self.rows)

    def only(self, places: Sequence[int]) -> "Sheet":
        """Return the sheet with the columns at these places alone."""
        rows = (row._replace(cells=tuple(row.cells[i] for i in places)) for row in self.rows)
        return Sheet(tuple(self.headings[i] for i in places), tuple(rows), self.first)

    def for_terminal(self, title: str) -> "Table":
        """Return the table in the form that rich prints."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column(self.first, no_wrap=True)
        if self.has_settings:
            table.add_column("chosen setting", max_width=30)
        for heading in self.headings:
            table.add_column(heading.text, justify="right", no_wrap=True)
        for row in self.rows:
            setting = (row.setting,) if self.has_settings else ()
            # A line under the models that no method has edited.
            table.add_row(row.name, *setting, *row.cells, end_section=row.name == REFERENCES[-1])
        return table


class Column(NamedTuple):
    """A column of points: its heading, the text of a point's cell, and whether a point has one."""

    heading: Heading
    text: Callable[[Point], str]
    is_given: Callable[[Point], bool] = lambda _: True


def number(value: float | None) -> str:
    """Write a number to about three digits; a dash for what was not measured, ∞ or NaN by name."""
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
    """Write a share in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def _prediction(point: Point) -> str:
    if point.predicted_kl is None:
        return "–"
    return f"{number(point.predicted_kl)}/{number(point.true_kl)}"


COLUMNS = (
    Column(
        Heading("forget\nNLL", "loss on the forget rows, nats per output", is_main=True),
        lambda p: number(p.forget_nll),
    ),
    Column(
        Heading("forget\nacc %", "accuracy on the forget rows", is_main=True),
        lambda p: share(p.forget_accuracy),
    ),
    Column(
        Heading("retain\nNLL", "loss on retain rows that edits see"), lambda p: number(p.retain_nll)
    ),
    Column(Heading("retain\nacc %", "accuracy on the same"), lambda p: share(p.retain_accuracy)),
    Column(
        Heading("held-out\nacc %", "accuracy on retain rows that no edit sees"),
        lambda p: share(p.heldout_accuracy),
    ),
    Column(
        Heading("test\nacc %", "accuracy on rows that no model was trained on"),
        lambda p: share(p.test_accuracy),
        lambda p: p.test_accuracy is not None,
    ),
    Column(
        Heading(
            "KL to\noriginal",
            "KL(original ‖ model) on held-out retain rows, nats per output",
            is_main=True,
        ),
        lambda p: number(p.heldout_kl),
    ),
    Column(
        Heading(
            "KL to\nretrained",
            "KL(retrained ‖ model) on the forget rows, nats per output",
            is_main=True,
        ),
        lambda p: number(p.forget_kl),
    ),
    Column(
        Heading(
            "KL pred.\n/ true",
            "retain KL as the second-order model predicts it, and the true one on the same rows, "
            "which are those the line search saw",
        ),
        _prediction,
        lambda p: p.predicted_kl is not None,
    ),
    Column(
        Heading("truth\nratio", "mean truth ratio of the forget rows"),
        lambda p: number(p.truth_ratio),
        lambda p: p.truth_ratio is not None,
    ),
    Column(
        Heading(
            "forget\nquality",
            "p-value of the Kolmogorov-Smirnov test of the truth ratios against the retrained "
            "model's",
            is_main=True,
        ),
        lambda p: number(p.forget_quality),
        lambda p: p.forget_quality is not None,
    ),
    Column(
        Heading(
            "model\nutility",
            "harmonic mean of probability, ROUGE-L recall and truth ratio on retain questions, "
            "real authors and world facts",
            is_main=True,
        ),
        lambda p: number(p.model_utility),
        lambda p: p.model_utility is not None,
    ),
)
SECONDS = (
    Heading("edit\ns", "seconds of the edit, compiling excluded; of training, for retrained"),
    Heading("fit\ns", "seconds of fitting the curvature, once for all edits, without compiling"),
)


def setting_text(comparison: Comparison, curve: Curve, point: Point) -> str:
    """Write a setting and a strength in words."""
    method = next(m for m in comparison.methods if m.name == curve.method)
    parts = [f"{name} {value:g}" for name, value in curve.setting.items()]
    return ", ".join([*parts, f"{method.strength.split(' (')[0]} {point.strength:g}"])


def best_sheet(comparison: Comparison, *, by_loss: bool = False) -> Sheet:
    """Lay out the untouched and the retrained model, and each method's best points by the rules."""
    choose = comparison.nearest_in_loss if by_loss else comparison.best
    nothing = "no point within budget" if by_loss else comparison.nothing
    columns = shown_columns(comparison)
    retrain = number(comparison.seconds.get("retrain"))
    rows = [
        _row("untouched", "", comparison.original, columns, ("–", "–")),
        _row("retrained", "", comparison.retrained, columns, (retrain, "–")),
    ]
    for method in comparison.methods:
        best = choose(method.name)
        setting = nothing if best is None else setting_text(comparison, *best)
        point = None if best is None else best[1]
        rows.append(_row(method.name, setting, point, columns, _seconds(method, point)))
    return Sheet((*(c.heading for c in columns), *SECONDS), tuple(rows))


def all_sheet(comparison: Comparison) -> Sheet:
    """Lay out every point of every curve."""
    columns = shown_columns(comparison)
    methods = {method.name: method for method in comparison.methods}
    rows = (
        _row(
            curve.method,
            setting_text(comparison, curve, point),
            point,
            columns,
            _seconds(methods[curve.method], point),
        )
        for curve in comparison.curves
        for point in curve.points
    )
    return Sheet((*(c.heading for c in columns), *SECONDS), tuple(rows))


def comparison_table(comparison: Comparison) -> "Table":
    """Make the terminal's table of the best points."""
    return best_sheet(comparison).for_terminal(comparison.title)


def shown_columns(comparison: Comparison) -> list[Column]:
    """Return the columns for which some model has a number."""
    points = [comparison.original, *(p for c in comparison.curves for p in c.points)]
    return [column for column in COLUMNS if any(column.is_given(p) for p in points)]


def _row(
    name: str, setting: str, point: Point | None, columns: list[Column], seconds: tuple[str, str]
) -> Row:
    cells = ("–" if point is None else column.text(point) for column in columns)
    return Row(name, setting, (*cells, *seconds))


def _seconds(method: Method, point: Point | None) -> tuple[str, str]:
    edit = "–" if point is None else number(point.edit_seconds)
    return edit, number(method.fit_seconds or None)

"""One self-contained HTML page: what happened to the model, and how that was found out."""

import base64
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jedit.report.figure import caption, save_png, tradeoff_figure
from jedit.report.leaderboard import leaderboard_sheet
from jedit.report.results import OTHER_RULE, Comparison, Point, Run
from jedit.report.table import Sheet, all_sheet, best_sheet, number, share
from jedit.report.verdict import Verdict, verdict

WIDE_DPI, NARROW_DPI = 130, 200  # small screens have fine pixels


class Section(NamedTuple):
    """The content of the page about one comparison, ready for the template.

    Attributes:
        comparison: the comparison, with its numbers.
        verdict: the verdict on the comparison's chosen model.
        glance: a name and a text of the untouched, the edited and the retrained model, by row;
            before the last that of `jedit.forget`, where it was run.
        wide: the figure for a wide screen, as a data URI.
        narrow: the figure for a narrow screen, as a data URI.
        caption: text that says how to read the figure.
        best: every method's best point by the rule.
        nearest: every method's point nearest to the retrained model in loss.
        leaderboard: every further metric of each model, if any was measured.
        everything: every point of every curve.
        facts: names and texts of the facts about what was run.
    """

    comparison: Comparison
    verdict: Verdict
    glance: list[tuple[str, ...]]
    wide: str
    narrow: str
    caption: str
    best: Sheet
    nearest: Sheet
    leaderboard: Sheet
    everything: Sheet
    facts: list[tuple[str, str]]


def page(run: Run) -> str:
    """Render the whole page as text; it asks the network for nothing.

    Raises:
        ImportError: jinja2 is not installed.
    """
    sections = [_section(comparison) for comparison in run.comparisons]
    template = environment().get_template("page.html")
    return template.render(run=run, sections=sections, other_rule=OTHER_RULE)


@functools.cache
def environment() -> Any:
    """Return jinja's environment of the pages.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report page needs jinja2: pip install 'jedit[demo]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jedit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": _picture, "text": _text}
    return environment


def _section(comparison: Comparison) -> Section:
    return Section(
        comparison=comparison,
        verdict=verdict(comparison),
        glance=_glance(comparison),
        wide=_figure(comparison, WIDE_DPI, is_narrow=False),
        narrow=_figure(comparison, NARROW_DPI, is_narrow=True),
        caption=caption(comparison),
        best=best_sheet(comparison),
        nearest=best_sheet(comparison, by_loss=True),
        leaderboard=leaderboard_sheet(comparison),
        everything=all_sheet(comparison),
        facts=_facts(comparison),
    )


def _glance(comparison: Comparison) -> list[tuple[str, ...]]:
    edited = None if comparison.chosen is None else comparison.chosen[1]
    alone = () if comparison.by_itself is None else (comparison.by_itself,)
    points = (comparison.original, edited, *alone, comparison.retrained)
    rows: list[tuple[str, Callable[[Point], str]]] = [
        ("loss on the forget rows, nats", lambda p: number(p.forget_nll)),
        ("accuracy there, %", lambda p: share(p.forget_accuracy)),
        ("accuracy on held-out retain rows, %", lambda p: share(p.heldout_accuracy)),
        ("KL to the untouched model there, nats", lambda p: number(p.heldout_kl)),
        ("Forget Quality (p-value)", lambda p: number(p.forget_quality)),
        ("Model Utility", lambda p: number(p.model_utility)),
    ]
    found = [
        (name, *("–" if point is None else text(point) for point in points)) for name, text in rows
    ]
    return [row for row in found if row[1] != "–"]


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    facts = [(f"rows, {name}", str(value)) for name, value in comparison.num_rows.items()]
    facts += [(name, _text(value)) for name, value in comparison.settings.items()]
    facts += [(f"seconds, {name}", number(value)) for name, value in comparison.seconds.items()]
    for method in comparison.methods:
        grid = "; ".join(
            f"{name} in {', '.join(f'{v:g}' for v in values)}"
            for name, values in method.grid.items()
        )
        text = f"{method.description} Curve over {method.strength}. Grid: {grid or 'none'}."
        facts.append((method.name, text))
    return facts


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figure(comparison: Comparison, dpi: int, *, is_narrow: bool) -> str:
    image = io.BytesIO()
    save_png(tradeoff_figure(comparison, is_narrow=is_narrow), image, dpi=dpi)
    return data_uri(image)


def _picture(pixels: tuple[tuple[float, ...], ...]) -> str:
    """Draw pixels as an image of one dot each, dark where they are 1."""
    from matplotlib.image import imsave

    image = io.BytesIO()
    look = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0, "metadata": {"Software": None}}
    imsave(image, np.asarray(pixels), format="png", **look)
    return data_uri(image)


def data_uri(image: io.BytesIO) -> str:
    """Return a PNG as text that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"

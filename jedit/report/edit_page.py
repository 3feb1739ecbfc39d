"""One page of one edit of a model folder: before and after, the path, what to know of it."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jedit.report.figure import save_png
from jedit.report.page import NARROW_DPI, WIDE_DPI, data_uri, environment
from jedit.report.table import number

TITLE = "What the model forgot"


class EditPage(NamedTuple):
    """The content of the page, ready for the template.

    Attributes:
        title: the page's title.
        sentences: what is to be said of the edit, the warnings among it.
        glance: name, number before and number after of each measurement.
        wide: the figure of the path, as a data URI; empty where the edit had none.
        narrow: the same for a narrow screen.
        facts: names and texts of the settings, rows, seconds and versions.
    """

    title: str
    sentences: Sequence[str]
    glance: list[tuple[str, str, str]]
    wide: str
    narrow: str
    facts: list[tuple[str, str]]


def edit_page(found: Mapping[str, Any], sentences: Sequence[str]) -> str:
    """Render the page as text; it asks the network for nothing.

    Args:
        found: the results: "before" and "after" with numbers of the same names, "settings", and
            maybe "path_kl" and "path_score", by look.
        sentences: what is to be said of them.

    Raises:
        ImportError: jinja2 is not installed.
    """
    after = found["after"]
    glance = [
        (name.replace("_", " "), number(before), number(after[name]))
        for name, before in found["before"].items()
    ]
    facts = []
    for group in ("num_rows", "num_cut_off", "settings", "seconds", "machine", "versions"):
        named = f"{group.replace('_', ' ')}, " if group in ("num_rows", "num_cut_off") else ""
        facts += [
            (f"{named}{name.replace('_', ' ')}", str(value))
            for name, value in found.get(group, {}).items()
            if value not in (None, [])
        ]
    wide = narrow = ""
    if len(found.get("path_kl", ())) > 1:
        wide, narrow = (_figure(found, size) for size in (WIDE_DPI, NARROW_DPI))
    content = EditPage(TITLE, sentences, glance, wide, narrow, facts)
    return environment().get_template("edit.html").render(page=content)


def _figure(found: Mapping[str, Any], dpi: int) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2) if dpi == WIDE_DPI else (4.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kls, scores = found["path_kl"], found["path_score"]
    is_shown = [math.isfinite(kl) and math.isfinite(x) for kl, x in zip(kls, scores, strict=True)]
    pairs = [p for p, shown in zip(zip(kls, scores, strict=True), is_shown, strict=True) if shown]
    axes.plot(*zip(*pairs, strict=True), marker="o", ms=4, color="#1b4f9c")
    axes.annotate("untouched", pairs[0], textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.annotate("edited", pairs[-1], textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xlabel("KL(original ‖ edited) on held-out retain rows, nats per token")
    axes.set_ylabel("loss on the forget rows, nats per token")
    axes.margins(0.12)
    image = io.BytesIO()
    save_png(figure, image, dpi=dpi)
    return data_uri(image)

"""What forgetting did to neighbouring domains: one table and one figure.

A domain is a group of rows; the nearer its hidden states to those of the rows forgotten, the higher
it stands in the table and the further to the right in the figure.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jedit.metrics import Change
from jedit.report.table import Heading, Row, Sheet, number, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Field of `Domain`, what it is called, and the style by which it is told apart in grey as well.
SCORES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("refusal", "refusals", {"marker": "s", "color": "#c2410c"}),
    ("probability", "probability of the answers", {"marker": "o", "color": "#1b4f9c"}),
    ("rouge", "ROUGE-L recall", {"marker": "^", "color": "#0a8f6c"}),
)


class Domain(NamedTuple):
    """A group of rows that no method was given to forget, before and after.

    Attributes:
        name: of the group.
        nearness: to the rows forgotten, as `metrics.nearness` has it.
        refusal: share of its questions that are refused.
        probability: mean probability of its rows' answers, per token; of a row whose answer is a
            refusal, the refusal's.
        rouge: ROUGE-L recall of the same answers by the model's likeliest ones.
    """

    name: str
    nearness: float
    refusal: Change
    probability: Change
    rouge: Change


def by_nearness(domains: Sequence[Domain]) -> list[Domain]:
    """Return the domains, the nearest first."""
    return sorted(domains, key=lambda domain: -domain.nearness)


def domain_sheet(domains: Sequence[Domain]) -> Sheet:
    """Return the table: refusals and utility of each domain before and after, the nearest first."""
    headings = [Heading("rows", "number of rows", True), Heading("near", "cosine", True)]
    for _, name, _ in SCORES:
        headings += [
            Heading(f"{name}\nbefore", f"{name} of the model before, percent", True),
            Heading("after", "the same of the model after", True),
            Heading("change", "after less before, with the 95% interval over the rows", True),
        ]
    return Sheet(tuple(headings), tuple(map(_row, by_nearness(domains))))


def _row(domain: Domain) -> Row:
    cells = [str(domain.refusal.num_rows), number(domain.nearness)]
    for field, *_ in SCORES:
        found: Change = getattr(domain, field)
        reach = f" ({share(found.low)} to {share(found.high)})" if found.low <= found.high else ""
        cells += [share(found.before), share(found.after), share(found.change) + reach]
    return Row(domain.name, "", tuple(cells))


def domain_figure(domains: Sequence[Domain]) -> "Figure":
    """Draw the changes of refusals and utility over the nearness, with their 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(SCORES), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (field, name, look) in enumerate(SCORES):
        axes = figure.add_subplot(1, len(SCORES), i + 1)
        x = [domain.nearness for domain in domains]
        changes = [getattr(domain, field) for domain in domains]
        y = [change.change for change in changes]
        # Of a single row there is no interval.
        reach = np.nan_to_num([[c.change - c.low, c.high - c.change] for c in changes]).T
        axes.errorbar(x, y, reach, ls="none", capsize=3, ms=5, **look)
        axes.axhline(0, color="0.4", lw=0.8, zorder=0)
        for domain, change in zip(domains, changes, strict=True):
            place = (domain.nearness, change.change)
            axes.annotate(domain.name, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set_xlabel("nearness to what was forgotten (cosine)")
        axes.set_ylabel(f"change of {name} (shares)")
        axes.spines[["top", "right"]].set_visible(False)
    return figure

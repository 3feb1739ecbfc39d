"""What forgetting did to neighbouring domains, as a figure.

A domain is a group of rows; the nearer its hidden states to those of the rows forgotten, the
further to the right it stands.  `jedit audit --group FIELD` shows it; of models and rows at hand
`jedit.recipes.neighbours.effects_by_domain` measures what it shows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jedit.metrics import Change

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

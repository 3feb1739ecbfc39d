"""The figures of an audit: losses, what each layer says, what teaching brings back, neighbours."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jedit.report.audit_results import COLUMNS, Estimate, Section
from jedit.report.domains import domain_figure
from jedit.report.figure import save_png
from jedit.report.page import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by line and marker, so that the figures also read in grey.
LOOKS: dict[str, dict[str, Any]] = {
    "base": {"color": "black", "ls": (0, (1, 1.2)), "marker": "s"},
    "edited": {"color": "#1b4f9c", "ls": "-", "marker": "o"},
    "retrained": {"color": "#0a8f6c", "ls": (0, (6, 1.5)), "marker": "^"},
    "unseen": {"color": "#6b6b6b", "ls": (0, (4, 1.5, 1, 1.5)), "marker": "v"},
}
DPI = 130


def figures_of(section: Section) -> list[tuple[str, str]]:
    """Return a section's figures, each as a data URI with a caption."""
    curves, found = section.curves, []
    if curves.get("losses"):
        caption = (
            "How the losses of the answers are spread: at each loss the share of rows at or below "
            "it. Where rows are forgotten, the edited model's line lies on that of the retrained "
            "model, or of the unseen rows, and not to its left or far to its right."
        )
        found.append((_drawn(losses_figure(curves["losses"])), caption))
    if curves.get("lens"):
        caption = (
            "What the models would say behind each layer: mean probability of the answers to the "
            "rows to forget, with 95% intervals. "
        )
        if curves.get("probe"):
            caption += "Right: how often a probe tells them from unseen rows; 0.5 is chance."
        found.append((_drawn(layers_figure(curves["lens"], curves.get("probe", {}))), caption))
    if curves.get("relearning") or curves.get("benign"):
        caption = (
            "Left: mean probability of the answers that are not taught, while others are; one line "
            "for each number of rows taught. Right: the same of all of them while rows to keep are "
            "taught. 95% intervals over the rows."
        )
        given = (curves.get("relearning", {}), curves.get("benign", {}))
        found.append((_drawn(relearning_figure(*given)), caption))
    if curves.get("neighbours"):
        caption = (
            "What the edit did to each group of rows to keep, over how near the group is to the "
            "rows to forget: changes of the shares with 95% intervals over the rows. Above 0, "
            "refusals rose; below 0, answers were lost."
        )
        found.append((_drawn(domain_figure(curves["neighbours"])), caption))
    return found


def losses_figure(losses: Mapping[str, Any]) -> "Figure":
    """Draw the distribution functions of the rows' losses, by role."""
    figure, (axes,) = _panels(1)
    finite = [x for values in losses.values() for x in np.asarray(values) if math.isfinite(x)]
    top = max(finite, default=1.0) * 1.05
    for role, values in losses.items():
        if role not in LOOKS:
            continue
        x = np.sort(np.nan_to_num(np.asarray(values, float), nan=top, posinf=top))
        y = np.arange(1, len(x) + 1) / len(x)
        look = {**LOOKS[role], "marker": None}
        axes.step([0, *x, top], [0, *y, 1], where="post", label=COLUMNS[role], lw=1.8, **look)
    axes.set_xlim(0, top)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("loss of the answer, nats per token")
    axes.set_ylabel("share of rows")
    axes.legend(frameon=False, fontsize=9)
    return figure


def layers_figure(
    lens: Mapping[str, Sequence[Estimate]], probe: Mapping[str, Sequence[Estimate]]
) -> "Figure":
    """Draw what each layer says and what a probe tells of it, by role."""
    figure, panels = _panels(2 if probe else 1)
    for role, estimates in lens.items():
        _line(panels[0], range(len(estimates)), estimates, role, COLUMNS[role])
    panels[0].set_ylabel("probability of the answers (lens)")
    panels[0].set_ylim(bottom=0)
    if probe:
        for role, estimates in probe.items():
            _line(panels[1], range(len(estimates)), estimates, role, COLUMNS[role])
        panels[1].axhline(0.5, color="black", lw=0.7, ls=(0, (2, 3)))
        panels[1].set_ylabel("rows told apart (probe)")
        panels[1].set_ylim(0, 1.02)
    for axes in panels:
        axes.set_xlabel("layers passed")
        axes.legend(frameon=False, fontsize=9)
    return figure


def relearning_figure(again: Mapping[str, Any], benign: Mapping[str, Any]) -> "Figure":
    """Draw the curves of relearning and of benign training, by role and number of rows taught."""
    figure, panels = _panels(2)
    figure.set_figheight(4.4)
    for axes, curves in zip(panels, (again, benign), strict=True):
        for role, curve in curves.items():
            last = len(curve["taught"]) - 1
            for i, taught in enumerate(curve["taught"]):
                label = f"{COLUMNS[role]}, {taught} taught"
                _line(axes, curve["steps"], curve["values"][i], role, label, is_thin=i < last)
        axes.set_xlabel("updates")
        axes.set_ylabel("probability of the answers")
        axes.set_ylim(bottom=0)
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2
        )
    panels[0].set_title("rows to forget are taught", fontsize=10)
    panels[1].set_title("rows to keep are taught", fontsize=10)
    return figure


def _line(
    axes: "Axes",
    x: Sequence[int],
    estimates: Sequence[Estimate],
    role: str,
    label: str,
    *,
    is_thin: bool = False,
) -> None:
    y = np.array([estimate.value for estimate in estimates])
    low, high = (np.array([getattr(e, end) for e in estimates]) for end in ("low", "high"))
    width, size = (0.9, 3) if is_thin else (1.8, 5)
    axes.plot(list(x), y, label=label, lw=width, ms=size, **LOOKS[role])
    if not is_thin:
        axes.fill_between(list(x), low, high, color=LOOKS[role]["color"], alpha=0.15, lw=0)


def _panels(number: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.9 * number + 1.2 * (number == 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, number, i + 1) for i in range(number)]
    for axes in panels:
        axes.grid(visible=True, which="major", color="0.9", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # layers and updates are counted
    return figure, panels


def _drawn(figure: "Figure") -> str:
    image = io.BytesIO()
    save_png(figure, image, dpi=DPI)
    return data_uri(image)

"""The trade-off figure: what was forgotten against what it cost the retain set."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.core.checks import COUNT, check_numbers
from jedit.report.results import Comparison, Curve, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by marker and line style, so that the figure also reads in grey; every second marker is
# larger and hollow, so that curves that lie on one another are both seen.
STYLES = (
    {"marker": "o", "ls": "-", "color": "#1b4f9c", "ms": 5.5},
    {"marker": "s", "ls": (0, (6, 1.5)), "color": "#0a8f6c", "ms": 8, "mfc": "none"},
    {"marker": "^", "ls": (0, (1, 1.2)), "color": "#6b6b6b", "ms": 6},
    {"marker": "v", "ls": (0, (4, 1.5, 1, 1.5)), "color": "#c2410c", "ms": 5.5},
    {"marker": "D", "ls": (0, (2, 1)), "color": "#8b2fa0", "ms": 8, "mfc": "none"},
    {"marker": "P", "ls": (0, (8, 2, 1, 2, 1, 2)), "color": "#a58a00", "ms": 6},
)
LEAST_KL = 1e-5
# Beyond this many times the budget of the rule a curve is cut off: it is of no use there.
SHOWN_BUDGETS = 30
# A number is as large in a small panel as in a large one: it takes a larger part of it.
NARROW_ROOM = 1.5


def tradeoff_figure(comparison: Comparison, *, is_narrow: bool = False) -> "Figure":
    """Draw the forget loss and the KL to the retrained model over the held-out retain KL.

    Each method is drawn over its strength at its best setting, its other settings thin behind it;
    the best point by the stated rule is ringed. Of more methods than there are styles, only the
    best points are drawn, each as a number. The retrained model is a star. The untouched model is a
    dot at the left edge, because its KL of zero has no place on a logarithmic axis.

    For a narrow screen the panels stand below each other, as wide as the screen, so that the
    letters keep their size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    numbered = is_numbered(comparison)
    size = (4.0, 9.6 if numbered else 7.8) if is_narrow else (11, 6.6 if numbered else 5.2)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(*((2, 1) if is_narrow else (1, 2)))
    break_ = "\n" if is_narrow else " "
    for axes, field in ((left, "forget_nll"), (right, "forget_kl")):
        _draw(axes, comparison, field, room=NARROW_ROOM if is_narrow else 1.0)
        axes.set_xlabel(f"KL(original ‖ edited) on held-out retain rows,{break_}nats per output")
    left.set_ylabel(f"loss on the forget rows,{break_}nats per output")
    left.set_title("How much was forgotten, and at what price", fontsize=10)
    right.set_ylabel(f"KL(retrained ‖ edited) on forget rows,{break_}nats per output")
    right.set_title(f"How near to a model that never saw it{break_}(lower is better)", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    if numbered:
        for i, method in enumerate(comparison.methods, 1):
            handles.append(Line2D([], [], ls="none"))
            none = "" if comparison.best(method.name) else " (none)"
            labels.append(f"{i}  {method.name}{none}")
    look: dict[str, Any] = {"ncols": 2 if is_narrow else 4}
    if numbered:
        look = {"ncols": 2 if is_narrow else 5, "fontsize": 9, "columnspacing": 1.2}
    figure.legend(handles, labels, loc="outside lower center", frameon=False, **look)
    return figure


def is_numbered(comparison: Comparison) -> bool:
    """Say whether there are too many methods to draw each as a curve."""
    return len(comparison.methods) > len(STYLES)


def caption(comparison: Comparison) -> str:
    """Say how to read the figure."""
    if is_numbered(comparison):
        shown = "A number stands at a method's best point, or as near as others leave room."
    else:
        shown = (
            "Bold: a method over its strength at its best setting; thin: its other settings; "
            "ringed: its best point."
        )
    return (
        f"{shown} Dotted line: the retrained model; dashed: the budget of the rule below. What "
        "leaves the panel has gone far beyond the retrained model, or has destroyed the retain "
        "rows; the list of all points has its numbers."
    )


def save_png(figure: "Figure", target: Path | io.BytesIO, *, dpi: int = 130) -> None:
    """Write a figure as PNG, without a date in it."""
    check_numbers(COUNT, dpi=dpi)
    figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})


def _draw(axes: "Axes", comparison: Comparison, field: str, *, room: float) -> None:
    original, retrained = comparison.original, comparison.retrained
    top = 1.5 * max(getattr(original, field), getattr(retrained, field), 1e-6)
    drawn = [p for curve in comparison.curves for p in curve.points if _is_drawn(p, field)]
    least = max(LEAST_KL, min([p.heldout_kl for p in drawn] + [retrained.heldout_kl]))
    edge = least / 2
    curved = [] if is_numbered(comparison) else comparison.methods
    for method, look in zip(curved, STYLES, strict=False):
        best = comparison.best(method.name)
        curves = [c for c in comparison.curves if c.method == method.name]
        chosen = best[0] if best else min(curves, key=_least_kl)
        for curve in curves:
            kept = [p for p in curve.points if _is_drawn(p, field)]
            x = [max(p.heldout_kl, edge) for p in kept]
            y = [getattr(p, field) for p in kept]
            if curve is chosen:
                axes.plot(x, y, **look, lw=1.8, label=method.name, zorder=5)
            else:
                axes.plot(x, y, **{**look, "ms": 2.5}, lw=0.7, alpha=0.45, zorder=2)
        if best and _is_drawn(best[1], field):
            at = (max(best[1].heldout_kl, edge), getattr(best[1], field))
            axes.plot(*at, "o", ms=14, mfc="none", mec="black", mew=1.1, zorder=6)
    star = {"marker": "*", "ms": 17, "mfc": "gold", "mec": "black", "ls": "none", "zorder": 4}
    at = (retrained.heldout_kl, getattr(retrained, field))
    axes.plot(*at, label="retrained", clip_on=False, **star)
    dot = {"marker": "o", "ms": 8, "color": "black", "ls": "none", "zorder": 6, "clip_on": False}
    axes.plot(edge, getattr(original, field), label="untouched (KL 0)", **dot)
    axes.axhline(getattr(retrained, field), color="black", lw=0.7, ls=(0, (2, 3)), zorder=1)
    if comparison.utility_share is None:  # else the rule knows no budget
        _draw_budget(axes, comparison.kl_budget)
    axes.set_xscale("log")
    # An ascent without a brake ends anywhere; what is far above the retrained model is cut off.
    axes.set_ylim(0, top)
    reached = max([p.heldout_kl for p in drawn] + [retrained.heldout_kl, comparison.kl_budget])
    axes.set_xlim(edge, min(1.5 * reached, SHOWN_BUDGETS * comparison.kl_budget))
    if is_numbered(comparison):
        _draw_numbers(axes, comparison, field, room)
    axes.grid(visible=True, which="major", color="0.9", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_budget(axes: "Axes", budget: float) -> None:
    axes.axvline(budget, color="black", lw=0.7, ls=(0, (6, 3)), zorder=1)
    axes.annotate(
        "budget of the rule",
        (budget, 0.985),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        va="top",
        fontsize=7.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        zorder=7,
    )


def _draw_numbers(axes: "Axes", comparison: Comparison, field: str, room: float) -> None:
    """Write each method's number at its best point, or at the nearest place that is free."""
    edge, right = axes.get_xlim()
    top = axes.get_ylim()[1]
    width = math.log(right / edge)
    taken: list[tuple[float, float]] = []
    for i, method in enumerate(comparison.methods, 1):
        best = comparison.best(method.name)
        if best is None or not _is_drawn(best[1], field):
            continue
        x, y = max(best[1].heldout_kl, edge), min(getattr(best[1], field), top)
        u, v = _free_place(math.log(x / edge) / width, y / top, taken, room)
        taken.append((u, v))
        at = (edge * math.exp(u * width), v * top)
        axes.plot([x, at[0]], [y, at[1]], "-", color="0.5", lw=0.7, zorder=3)
        axes.plot(x, y, ".", color="black", ms=3, zorder=3)
        shade = "0.8" if method.keeps_budget else "white"
        box = {"boxstyle": "circle,pad=0.2", "fc": shade, "ec": "black"}
        axes.annotate(str(i), at, ha="center", va="center", fontsize=7, bbox=box, zorder=6)


def _free_place(
    u: float, v: float, taken: list[tuple[float, float]], room: float
) -> tuple[float, float]:
    """Return the place nearest to (u, v) with no other number within a circle.

    Places are in parts of the panel; they are tried ring by ring, and (u, v) itself is the last
    resort.
    """
    for ring in range(40):
        for k in range(max(1, 8 * ring)):
            angle = 2 * math.pi * k / max(1, 8 * ring)
            place = (u + 0.02 * ring * math.cos(angle), v + 0.025 * ring * math.sin(angle))
            is_inside = all(0.02 <= c <= 0.98 for c in place) or ring == 0
            if is_inside and all(
                math.hypot((place[0] - a) / 0.042, (place[1] - b) / 0.052) >= room for a, b in taken
            ):
                return place
    return u, v


def _is_drawn(point: Point, field: str) -> bool:
    return math.isfinite(point.heldout_kl) and math.isfinite(getattr(point, field))


def _least_kl(curve: Curve) -> float:
    return min((p.heldout_kl for p in curve.points), default=math.inf)

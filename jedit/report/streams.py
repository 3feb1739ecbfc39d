"""Tasks learnt one after the other: the numbers, the table, the figure, and a page of them."""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jedit.report.figure import save_png
from jedit.report.page import NARROW_DPI, WIDE_DPI, data_uri, environment
from jedit.report.results import plain
from jedit.report.table import Heading, Row, Sheet, share
from jedit.report.writer import PAGE, RESULTS, check_destination, replace_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA = "jedit.streams/1"
# Field of a run, its heading, what it means.
MEASURES = {
    "final": ("at the\nend", "accuracy after the last task, mean over all tasks, percent"),
    "minimum": (
        "min-ACC",
        "lowest accuracy on a task at any update after it had been learnt, mean over the tasks but "
        "the last, percent",
    ),
    "worst_case": (
        "WC-ACC",
        "min-ACC and the accuracy on the last task at the end, the mean over all tasks, percent",
    ),
    "forgetting": (
        "WF10",
        "deepest fall of a task's accuracy within ten looks in a row, mean over the tasks, points; "
        "lower is better",
    ),
    "plasticity": (
        "WP10",
        "highest rise of a task's accuracy within ten looks in a row, mean over the tasks, points",
    ),
}
FIELDS = tuple(MEASURES)


class StreamRun(NamedTuple):
    """What came of one stream, one learner and one seed.

    Attributes:
        seed: of everything random.
        final: mean accuracy of all tasks at the end.
        minimum: min-ACC.
        worst_case: WC-ACC.
        forgetting: WF^10; lower is better.
        plasticity: WP^10.
        scores: the accuracy on each task after each update, the first row before any.
    """

    seed: int
    final: float
    minimum: float
    worst_case: float
    forgetting: float
    plasticity: float
    scores: tuple[tuple[float, ...], ...]


class StreamLearner(NamedTuple):
    """A learner on one stream.

    Attributes:
        name: of the learner.
        keeps: what it keeps of earlier tasks, in words.
        setting: its settings by name.
        runs: one for each seed that did not diverge.
        diverged: the seeds that did, which no number counts.
        spread: by measure the mean over the runs and the half width of its 95% interval, NaN where
            there is one run; without measures where there is none.
    """

    name: str
    keeps: str
    setting: dict[str, float]
    runs: tuple[StreamRun, ...]
    diverged: tuple[int, ...]
    spread: dict[str, tuple[float, float]]


class Stream(NamedTuple):
    """A stream of tasks, and every learner on it.

    Attributes:
        name: a short name, for files.
        title: a title.
        note: what was done, in whole sentences.
        tasks: what is new in each task.
        seeds: the seeds.
        steps: updates on each task.
        num_rows: numbers of rows by name.
        settings: what was alike for all learners.
        seconds: how long it took, compiling included.
        learners: the learners.
    """

    name: str
    title: str
    note: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    num_rows: dict[str, int]
    settings: dict[str, Any]
    seconds: float
    learners: tuple[StreamLearner, ...]


class StreamReport(NamedTuple):
    """All that one call of a command made, with how and on what, as `Run` has it.

    Attributes:
        command: the command as it was typed.
        date: time at which it started, ISO 8601 with the zone.
        seed: the first seed.
        seconds: seconds of the whole run, compiling included.
        peak_memory_gib: the most memory that the process held, in GiB.
        versions: versions of Python, of jedit and of what it stands on.
        machine: description of the machine it ran on.
        streams: the streams.
    """

    command: str
    date: str
    seed: int
    seconds: float
    peak_memory_gib: float
    versions: dict[str, str]
    machine: dict[str, Any]
    streams: tuple[Stream, ...]


def stream_sheet(stream: Stream) -> Sheet:
    """Return the table: what each learner keeps at the end and on the way."""
    headings = tuple(
        Heading(*words, is_main=field not in ("worst_case", "plasticity"))
        for field, words in MEASURES.items()
    )
    rows = []
    for learner in stream.learners:
        setting = [f"{name} {value:g}" for name, value in learner.setting.items()]
        if learner.diverged:
            setting.append(f"{len(learner.diverged)} of {len(stream.seeds)} seeds diverged")
        cells = (_spread(learner.spread.get(field)) for field in FIELDS)
        rows.append(Row(learner.name, ", ".join(setting), tuple(cells)))
    return Sheet(headings, tuple(rows), first="learner")


def _spread(found: tuple[float, float] | None) -> str:
    if found is None:
        return "–"
    mean, half = found
    return share(mean) if math.isnan(half) else f"{share(mean)} ± {share(half)}"


def stream_sentence(stream: Stream) -> str:
    """Say whose mean is highest at the end and on the way, which is not that it is certain."""
    measured = [learner for learner in stream.learners if learner.runs]
    if not measured:
        return "Every run diverged."
    end, way = (
        max(measured, key=lambda learner, field=field: learner.spread[field][0])
        for field in ("final", "minimum")
    )
    count = len(stream.seeds)
    over = f"the highest mean over {count} seeds" if count > 1 else "highest"
    found = (
        f"At the end the accuracy of {end.name} is {over} ({_spread(end.spread['final'])} %), on "
        f"the way that of {way.name} (min-ACC {_spread(way.spread['minimum'])} %)"
    )
    for learner in measured:
        if learner.name == "naive":
            found += (
                f"; where nothing is kept it is {_spread(learner.spread['final'])} % and "
                f"{_spread(learner.spread['minimum'])} %"
            )
    return f"{found}."


def stream_figure(stream: Stream, *, is_narrow: bool = False) -> "Figure":
    """Draw a panel for each learner: the accuracy on each task by update, and the mean.

    Thin lines are the first seed's tasks, each from when it was begun, the first task in colour;
    the bold one is the mean over the tasks begun and over the seeds, its band from the lowest seed
    to the highest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if is_narrow else 4
    lines = math.ceil(len(stream.learners) / columns)
    size = (4.4, 1.7 * lines + 0.9) if is_narrow else (11, 2.3 * lines + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    # At most as many panels in a line as there are learners.
    panels = figure.subplots(
        lines, min(columns, len(stream.learners)), sharex=True, sharey=True, squeeze=False
    ).flat
    for axes, learner in zip(panels, stream.learners, strict=False):
        _draw(axes, stream, learner)
    for axes in list(panels)[len(stream.learners) :]:
        axes.set_visible(False)
    figure.supxlabel(f"updates, {stream.steps} on each task", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    # A learner of which every run diverged has no lines.
    first = next((axes for axes in figure.axes if axes.get_legend_handles_labels()[0]), None)
    if first is not None:
        figure.legend(
            *first.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=1 if is_narrow else 3,
            frameon=False,
            fontsize=8,
        )
    return figure


def _draw(axes: "Axes", stream: Stream, learner: StreamLearner) -> None:
    axes.set_title(learner.name, fontsize=9)
    axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for task in range(1, len(stream.tasks)):
        axes.axvline(task * stream.steps, color="0.85", lw=0.7, zorder=0)
    if not learner.runs:
        axes.annotate("diverged", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=9)
        return
    of_tasks = np.asarray(learner.runs[0].scores)
    for task in reversed(range(of_tasks.shape[1])):
        first = task * stream.steps
        look: dict[str, Any] = {"color": "0.65", "lw": 0.7}
        if not task:
            look = {"color": "#c2410c", "lw": 1.0, "ls": (0, (4, 1.2))}
        label = {0: "the first task, first seed", 1: "later tasks, first seed"}.get(task)
        axes.plot(range(first, len(of_tasks)), of_tasks[first:, task], label=label, **look)
    means = np.asarray([mean_of_begun(run, stream.steps) for run in learner.runs])
    x = range(means.shape[1])
    axes.fill_between(x, means.min(0), means.max(0), color="#1b4f9c", alpha=0.2, lw=0)
    label = "mean over the tasks begun, all seeds"
    axes.plot(x, means.mean(0), color="#1b4f9c", lw=1.8, label=label)


def mean_of_begun(run: StreamRun, steps: int) -> list[float]:
    """Return the mean accuracy over the tasks begun, by update."""
    return [
        float(np.mean(row[: min(look // steps + 1, len(row))]))
        for look, row in enumerate(run.scores)
    ]


CAPTION = (
    "One panel for each learner. Bold: the accuracy, mean over the tasks begun and over the seeds, "
    "its band from the lowest seed to the highest. Thin: each task of the first seed from when it "
    "was begun, the first task dashed. Upright lines: a new task begins, which is not known and "
    "draws the bold line down; what is lost of earlier tasks is how far the thin lines fall there."
)


def stream_page(report: StreamReport) -> str:
    """Render the page as text; it asks the network for nothing.

    Raises:
        ImportError: jinja2 is not installed.
    """
    sections = [
        {
            "stream": stream,
            "sentence": stream_sentence(stream),
            "sheet": stream_sheet(stream),
            "wide": _image(stream, WIDE_DPI, is_narrow=False),
            "narrow": _image(stream, NARROW_DPI, is_narrow=True),
            "kept": [(learner.name, learner.keeps) for learner in stream.learners],
            "facts": _facts(stream),
        }
        for stream in report.streams
    ]
    template = environment().get_template("streams.html")
    return template.render(run=report, sections=sections, caption=CAPTION)


def write_stream_report(report: StreamReport, out: Path) -> Path:
    """Write results.json, a PNG for each stream and index.html, and return the page's path.

    An earlier report there is replaced, all of it at once.

    Raises:
        ValueError: a destination that `check_destination` refuses.
    """
    check_destination(out)

    def write(new: Path) -> None:
        found = {"schema": SCHEMA, **plain(report)}
        # Without line breaks: the accuracies after every update are tens of thousands of numbers.
        text = json.dumps(found, allow_nan=False, ensure_ascii=False)
        (new / RESULTS).write_text(text + "\n", encoding="utf-8")
        for stream in report.streams:
            save_png(stream_figure(stream), new / f"stream-{stream.name}.png")
        (new / PAGE).write_text(stream_page(report), encoding="utf-8")

    replace_folder(out, write)
    return out / PAGE


def _image(stream: Stream, dpi: int, *, is_narrow: bool) -> str:
    image = io.BytesIO()
    save_png(stream_figure(stream, is_narrow=is_narrow), image, dpi=dpi)
    return data_uri(image)


def _facts(stream: Stream) -> list[tuple[str, str]]:
    facts = [(f"rows, {name}", str(value)) for name, value in stream.num_rows.items()]
    facts += [(name, str(value)) for name, value in stream.settings.items()]
    facts += [
        ("updates on each task", str(stream.steps)),
        ("tasks, first seed", "; ".join(stream.tasks)),
        ("seeds", ", ".join(map(str, stream.seeds))),
        ("seconds", f"{stream.seconds:.0f}"),
    ]
    return facts

"""`jedit demo`: train, forget, compare and report on the scenes."""

import math
from typing import TYPE_CHECKING, NamedTuple

from jedit.cli.checks import UsageError
from jedit.cli.options import Demo
from jedit.cli.rows import check_option_numbers, option
from jedit.cli.stages import Stages, check_out, made, now, print_end, report, wide_console
from jedit.core.checks import COUNT

if TYPE_CHECKING:
    from jedit.data import Interactions


class Cost(NamedTuple):
    """The time and memory that a scene takes on two CPU cores that do nothing else."""

    seconds: float
    gib: float


# The minutes add up; the memory is that of the scene that needs most. The main methods were
# measured on free cores, the authors' last stage by its part of a run beside others; all methods on
# the authors beside other work and before three of them were added (29 minutes, a ninth put on),
# its memory is the main methods'; all methods on the digits is reckoned from the CPU time of its
# first 122 seconds; the recommendation's are reckoned from its claims' script, where a seed takes
# three minutes; the stream's from the CPU time of its main learners beside other work.
COSTS = {
    ("digits", "main"): Cost(92, 1.2),
    ("authors", "main"): Cost(455, 2.1),
    ("digits", "all"): Cost(240, 1.6),
    ("authors", "all"): Cost(1930, 1.8),
    ("recommendation", "main"): Cost(240, 1.5),
    ("recommendation", "all"): Cost(900, 1.8),
    ("stream", "main"): Cost(110, 1.3),
    ("stream", "all"): Cost(210, 1.5),
}

# Options of one scene alone.
OWN = {"interactions": "recommendation", "forgotten": "recommendation", "num_seeds": "stream"}


def demo(options: Demo, command: str) -> int:
    """Run the scenes, write their report; return the exit code."""
    check_out(options.out)
    check_option_numbers(options, {COUNT: ("num_seeds",)})
    _check_scene(options)
    log = _interactions(options)
    stages = Stages()
    scenes = ("digits", "authors") if options.scene == "all" else (options.scene,)
    costs = [COSTS[scene, options.methods] for scene in scenes]
    minutes = math.ceil(sum(cost.seconds for cost in costs) / 60)
    stages.console.print(
        f"This takes some {minutes} minute{'s' * (minutes > 1)} on two free CPU cores, and "
        f"{max(cost.gib for cost in costs):g} GiB of memory. The report goes to {options.out}.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    if options.scene == "stream":
        return _stream(options, stages, command)

    def comparisons() -> list:
        found = []
        if "digits" in scenes:
            from jedit.recipes.scenes.digits import ALL, GRID, digits

            grid = ALL if options.methods == "all" else GRID
            found += digits(seed=options.seed, say=stages, grid=grid)
        if "authors" in scenes:
            from jedit.recipes.scenes.authors import ALL, GRID, authors

            grid = ALL if options.methods == "all" else GRID
            found += authors(seed=options.seed, say=stages, grid=grid)
        if "recommendation" in scenes:
            from jedit.recipes.scenes.recommendation import ALL, GRID, recommendation

            found += recommendation(
                seed=options.seed,
                say=stages,
                interactions=log,
                forgotten=options.forgotten,
                grid=ALL if options.methods == "all" else GRID,
            )
        return found

    return report(comparisons, stages, options.out, options.seed, command)


def _stream(options: Demo, stages: Stages, command: str) -> int:
    """Learn the streams, print their tables, write their report."""
    from jedit.recipes.scenes.streams import ALL_LEARNERS, ALL_STREAMS, LEARNERS, STREAMS, streams
    from jedit.report import StreamReport, stream_sentence, stream_sheet, write_stream_report

    date, is_all = now(), options.methods == "all"
    with stages:
        found = streams(
            seed=options.seed,
            say=stages,
            names=ALL_STREAMS if is_all else STREAMS,
            chosen=ALL_LEARNERS if is_all else LEARNERS,
            num_seeds=options.num_seeds,
        )
    console = wide_console()
    for stream in found:
        console.print()
        console.print(stream_sheet(stream).for_terminal(stream.title))
        console.print(stream_sentence(stream), markup=False, highlight=False, soft_wrap=True)
    whole = StreamReport(**made(stages, date, options.seed, command), streams=found)
    print_end(console, stages, write_stream_report(whole, options.out), whole.peak_memory_gib)
    return 0


def _check_scene(options: Demo) -> None:
    """Refuse an option of another scene.

    Raises:
        UsageError: there is one.
    """
    for name, scene in OWN.items():
        if scene != options.scene and getattr(options, name) != getattr(Demo, name):
            raise UsageError(f"{option(name)} is only looked at with --scene {scene}.")


def _interactions(options: Demo) -> "Interactions | None":
    """Return the user's interactions; None: there are none.

    Raises:
        UsageError: a file that cannot be used.
    """
    if options.interactions is None:
        return None
    from jedit.data import DataError, read_interactions
    from jedit.recipes.scenes.recommendation import check_size

    try:
        log = read_interactions(options.interactions)
        check_size(log)
    except DataError as error:
        raise UsageError(str(error)) from None
    return log

"""`jedit demo`: train, forget, compare and report on the scenes."""

import math
from typing import TYPE_CHECKING, NamedTuple

from jedit.cli.checks import UsageError
from jedit.cli.options import Demo
from jedit.cli.stages import Stages, check_out, report

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
# three minutes.
COSTS = {
    ("digits", "main"): Cost(92, 1.2),
    ("authors", "main"): Cost(455, 2.1),
    ("digits", "all"): Cost(240, 1.6),
    ("authors", "all"): Cost(1930, 1.8),
    ("recommendation", "main"): Cost(240, 1.5),
    ("recommendation", "all"): Cost(900, 1.8),
}


def demo(options: Demo, command: str) -> int:
    """Run the scenes, write their report; return the exit code."""
    check_out(options.out)
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


def _interactions(options: Demo) -> "Interactions | None":
    """Return the user's interactions; None: there are none.

    Raises:
        UsageError: an option of another scene, or a file that cannot be used.
    """
    if options.scene != "recommendation":
        for name, is_given in (
            ("interactions", options.interactions is not None),
            ("forgotten", options.forgotten != Demo.forgotten),
        ):
            if is_given:
                raise UsageError(f"--{name} is only looked at with --scene recommendation.")
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

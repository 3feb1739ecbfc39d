"""The watcher and the report that all commands share: a line for each stage, and the end."""

import resource
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jedit.cli.checks import UsageError

if TYPE_CHECKING:
    from rich.console import Console


class Stages:
    """A watcher that says on stderr, in a line for each stage, what is being done.

    On a terminal a bar below it shows how far the stage is, once it has said so, and the time left.
    """

    def __init__(self, console: "Console | None" = None):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self.console = console or Console(stderr=True)
        self.start = time.perf_counter()
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=300,
        )
        self.stage = self.bar.add_task("starting", total=None)

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start

    def __enter__(self) -> "Stages":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, text: str) -> None:
        """Say what is done from now on."""
        self.console.print(
            f"{self.seconds:5.0f} s  {text}", highlight=False, soft_wrap=True, markup=False
        )
        # A task of its own, so that the speed of the last stage says nothing of this one.
        self.bar.remove_task(self.stage)
        self.stage = self.bar.add_task(text, total=None)

    def progress(self, done: int, total: int) -> None:
        """Say that so many of the stage's parts are done."""
        self.bar.update(self.stage, completed=done, total=total)


def report(make: Callable[[], Sequence], stages: Stages, out: Path, seed: int, command: str) -> int:
    """Make the comparisons, print their tables, write the report."""
    from jedit.report import Run, comparison_table, leaderboard_table, verdict, write_report

    date = now()
    with stages:
        comparisons = tuple(make())
    console = wide_console()
    for comparison in comparisons:
        console.print()
        console.print(comparison_table(comparison))
        if comparison.leaderboard:
            console.print(leaderboard_table(comparison))
        found = verdict(comparison)
        console.print(found.outcome.value, style="bold", highlight=False)
        console.print(found.sentence, markup=False, highlight=False, soft_wrap=True)
    run = Run(**made(stages, date, seed, command), comparisons=comparisons)
    print_end(console, stages, write_report(run, out), run.peak_memory_gib)
    return 0


def now() -> str:
    """Return the time, as reports state when they were begun."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def wide_console() -> "Console":
    """Return the console that tables go to; a file has room for whole lines."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=180)


def made(stages: Stages, date: str, seed: int, command: str) -> dict[str, Any]:
    """Return how and on what a report was made, in the fields that reports of all kinds have."""
    from jedit.recipes.environment import machine, versions

    return {
        "command": command,
        "date": date,
        "seed": seed,
        "seconds": stages.seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": versions(),
        "machine": machine(),
    }


def print_end(console: "Console", stages: Stages, page: Path, memory: float) -> None:
    """Say how long it took and where the report is."""
    console.print(
        f"\n{stages.seconds:.0f} s, peak memory {memory:.1f} GiB. Report: {page} "
        f"(numbers: {page.parent / 'results.json'})",
        soft_wrap=True,
        highlight=False,
    )


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier report.

    Raises:
        UsageError: the folder holds something else.
    """
    from jedit.report import check_destination

    try:
        check_destination(out)
    except ValueError as error:
        raise UsageError(str(error)) from None

"""What the commands share: a line for each stage, and the report at the end."""

import resource
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from jedit.cli.checks import UsageError


class Stages:
    """Says on stderr what is being done: a line for each stage, and on a terminal what runs now."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(stderr=True)
        self.start = time.perf_counter()
        self.status = self.console.status("starting")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def __enter__(self) -> "Stages":
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def __call__(self, text: str) -> None:
        """Say what is done from now on."""
        self.console.print(f"{self.seconds:5.0f} s  {text}", highlight=False, soft_wrap=True)
        self.status.update(text)


def report(make: Callable[[], Sequence], stages: Stages, out: Path, seed: int, command: str) -> int:
    """Make the comparisons, print their tables, write the report."""
    from rich.console import Console

    from jedit.recipes.environment import machine, versions
    from jedit.report import Run, comparison_table, leaderboard_table, write_report

    date = datetime.now().astimezone().isoformat(timespec="seconds")
    with stages:
        comparisons = tuple(make())
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    for comparison in comparisons:
        console.print()
        console.print(comparison_table(comparison))
        if comparison.leaderboard:
            console.print(leaderboard_table(comparison))
    run = Run(
        command=command,
        date=date,
        seed=seed,
        seconds=stages.seconds,
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        versions=versions(),
        machine=machine(),
        comparisons=comparisons,
    )
    page = write_report(run, out)
    console.print(
        f"\n{stages.seconds:.0f} s, peak memory {run.peak_memory_gib:.1f} GiB. Report: {page} "
        f"(numbers: {out / 'results.json'})",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def check_out(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier report.

    Raises:
        UsageError: it is such a folder.
    """
    from jedit.report import check_destination

    try:
        check_destination(out)
    except ValueError as error:
        raise UsageError(str(error)) from None

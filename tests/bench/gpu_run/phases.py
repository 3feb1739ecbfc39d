"""Seconds and memory of a program's phases, of the process and of its device."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from jedit.recipes.stopwatch import Stopwatch
from tests.bench.gpu_run.rates import peak_gib


def status_gib(field: str) -> float:
    """A line of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 2**20


class Phases:
    """Seconds, those of them that compile, and peaks of each phase.

    The process's peak is the phase's own, where the system lets it begin again; the device's never
    falls: it is that of all phases so far, None where the device does not tell.
    """

    def __init__(self, keep: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._keep = keep

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with suppress(OSError):  # some containers do not let it
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
        start = time.perf_counter()
        with Stopwatch() as computing:
            yield
        seconds = time.perf_counter() - start
        self.found[name] = {
            "seconds": seconds,
            "of them compiling": seconds - computing.seconds,
            "peak GiB": status_gib("VmHWM"),
            "after GiB": status_gib("VmRSS"),
            "arrays after GiB": sum(x.nbytes for x in jax.live_arrays()) / 2**30,
            "device's peak GiB so far": peak_gib(),
        }
        print(name, self.found[name], file=sys.stderr, flush=True)
        self._keep(self.found)

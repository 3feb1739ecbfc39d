"""Time a job beside the machine's matmul rate, and read the process's peak memory."""

import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any

import jax

from jedit.recipes.environment import matmul_rate


@dataclasses.dataclass(frozen=True)
class Work:
    """A job, ready to run.

    Attributes:
        start: makes the state that `step` carries.
        step: `step(state, batch) -> state`.
        batches: what one pass gives it.
        segment: how many steps lie between two measurements of the matmul rate.
    """

    start: Callable[[], Any]
    step: Callable[[Any, Any], Any]
    batches: list
    segment: int = 8


def measure(work: Work, floor: float, repeats: int, size: int = 2048) -> dict:
    """Run the job `repeats` times after a segment that compiles and warms up.

    Returns:
        "seconds": of every pass; "multiples": of every segment of a pass, its time in units of what
        `floor` flops a step take at the mean of the rates just before and after; "rates": those;
        "peak_gib": the most memory the process held, before the first of the rate's own products.
    """
    state = work.start()
    for batch in work.batches[: work.segment]:
        state = work.step(state, batch)
    jax.block_until_ready(state)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds, multiples, rates = [], [], []
    for _ in range(repeats):
        state, total = jax.block_until_ready(work.start()), 0.0
        for first in range(0, len(work.batches), work.segment):
            batches = work.batches[first : first + work.segment]
            before = matmul_rate(size)
            begin = time.perf_counter()
            for batch in batches:
                state = work.step(state, batch)
            jax.block_until_ready(state)
            elapsed = time.perf_counter() - begin
            after = matmul_rate(size)
            # What is proportional to time is the inverse of a rate, so that is what is averaged.
            rate = 2 / (1 / before + 1 / after)
            multiples.append(elapsed * rate / (floor * len(batches)))
            rates += [before, after]
            total += elapsed
        seconds.append(total)
    return {"seconds": seconds, "multiples": multiples, "rates": rates, "peak_gib": peak}

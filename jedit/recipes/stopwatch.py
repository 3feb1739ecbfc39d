"""Seconds of a piece of work without those of the compiler, which a second run would not need."""

import time
from typing import Any

import jax


class Stopwatch:
    """A context that counts seconds, and not those in which JAX traces, lowers or compiles.

    JAX reports each of these when it ends, and those of a function inside another one too, so what
    is left out is their union. Work that is still under way on a device when the context ends is
    not counted: block on it inside.

    Attributes:
        seconds: what was counted, when the context has ended.
    """

    seconds: float = 0.0

    def __enter__(self) -> "Stopwatch":
        """Begin to count."""
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        end = time.perf_counter()
        jax.monitoring.unregister_event_duration_listener(self._hear)
        self.seconds = end - self._start - _union(self._spans)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            self._spans.append((max(end - duration_secs, self._start), end))


def _union(spans: list[tuple[float, float]]) -> float:
    """Return the length of what any of the spans covers."""
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total

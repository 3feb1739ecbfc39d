"""Stages of a run: each in a process of its own, with a time of its own, and a file of numbers.

What a stage found is read from its file whatever became of it, so that a stage that fails, or is
stopped, keeps what it had written, and ends no other. This module imports no JAX: the device's
memory belongs to the stage alone.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
LEAST = 5.0  # seconds: with less left of the whole run no stage is begun
TAIL = 2000  # characters of a stage's complaint that are kept


class Stage(NamedTuple):
    """One stage.

    Attributes:
        name: what it is called in the table.
        seconds: after which it is stopped.
        arguments: of the interpreter.
        result: the file that it writes, in the run's folder.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    result: str


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    found: dict[str, Any],
    *,
    seconds: float,
    say: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run them one after another, and write `out`/gpu.json after each.

    Args:
        stages: in their order; what the time does not reach is cut short or left out, and named.
        out: the run's folder.
        found: what is known of the run beforehand; the stages are added to it.
        seconds: of all together.
        say: told how each stage ended.
        environment: added to this process's.

    Returns:
        `found` with "stages", by name: "state" ("done", "failed", "stopped", "skipped", and of what
        the time of all did not reach "cut short" or "left out"), "seconds", "budget", "message"
        and "found", what the stage wrote.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    found["stages"] = {}
    for stage in stages:
        left = seconds - (time.perf_counter() - begin)
        if left < min(LEAST, stage.seconds):
            row = {"state": "left out", "seconds": 0.0, "message": "no time was left for it"}
        else:
            row = run_one(stage, out, min(stage.seconds, left), environment or {})
            if row["state"] == "stopped" and left < stage.seconds:
                row["state"] = "cut short"  # its own time was not over
        found["stages"][stage.name] = row | {"budget": stage.seconds}
        found["seconds"] = time.perf_counter() - begin
        write_json(out / "gpu.json", found)
        say(f"{stage.name}: {row['state']} in {row['seconds']:.0f} s {row['message']}".rstrip())
    return found


def run_one(
    stage: Stage, out: Path, seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run one stage in a process group of its own, which is ended with it."""
    path, log = out / stage.result, out / f"{stage.name.replace(' ', '-')}.log"
    path.unlink(missing_ok=True)  # an earlier run's
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    begin, state, message = time.perf_counter(), "done", ""
    with log.open("w") as opened:
        child = subprocess.Popen(
            [sys.executable, *stage.arguments],
            cwd=ROOT,
            env=env,
            stdout=opened,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if code := child.wait(seconds):
                lines = log.read_text(errors="replace")[-TAIL:].strip().splitlines()
                state, message = "failed", (lines or [f"exit status {code}"])[-1]
        except subprocess.TimeoutExpired:
            state, message = "stopped", f"after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    row = {"state": state, "seconds": time.perf_counter() - begin, "message": message}
    if path.exists():
        row["found"] = json.loads(path.read_text())
        if state == "done" and "skipped" in row["found"]:
            row |= {"state": "skipped", "message": row["found"]["skipped"]}
    return row


def write_json(path: Path, found: Any) -> None:
    """Write a file whole or not at all: a reader, or a later stage, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(_plain(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""The run on an accelerator: all that waits for one, in one go, in under eight minutes.

    python -m tests.bench.gpu [--toy] [--out out/gpu] [--only kernels,requests] [--data tofu/]

Stages one after another, each in a process of its own with a time of its own: the kernels' checks
and speed; the 100M GPT on TOFU's 4,000 rows; a random folder of Llama-3.2-1B's shape, fitted by
groups, edited and saved; decompositions at the two largest of five sizes, which have their time
even where all stages before take all of theirs; many requests at once beside a loop; the other
sizes; and, where time is left, the folder planned, the GPT in float32 and kfac-jax's factors. It
writes gpu.json after each stage, a log of each, and at the end table.md. It exits with 1 where a
stage failed or took longer than its own time, with 2 where nothing could be run, and with 3 where
the time of all together cut one short or left one out.
"""

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.gpu_run.stages import Stage, run_stages
from tests.bench.gpu_run.summary import markdown

SECONDS = 450.0  # of all stages: under eight minutes with what is around them
SIZES = (4096, 8192, 14336, 16385, 28672)  # 28,672 is Llama-70B's, beyond cuSOLVER's syevd
TOY_SIZES = (48, 65)
GPU = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# A toy is compiled, not timed.
TOY = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


class Options(NamedTuple):
    """What is to be run."""

    is_toy: bool
    data: str | None
    seed: int


def stages_of(options: Options, out: Path) -> list[Stage]:
    """Every stage, in the order in which time is given to them."""
    toy = ("--toy",) if options.is_toy else ()

    def stage(name: str, seconds: float, module: str, *more: str) -> Stage:
        result = f"{name.replace(' ', '-')}.json"
        where = ("--json", str((out / result).resolve()))
        return Stage(name, seconds, ("-m", f"tests.bench.{module}", *where, *toy, *more), result)

    def gpt(dtype: str, seconds: float) -> Stage:
        folder = f"gpt-{dtype}"
        more = ["--dtype", dtype, "--out", str((out / folder).resolve())]
        more += ["--seed", str(options.seed)]
        more += [] if options.data is None else ["--data", options.data]
        arguments = ("-m", "tests.bench.gpu_run", "--toy" if toy else "--gpu", *more)
        return Stage(f"gpt {dtype}", seconds, arguments, f"{folder}/bench.json")

    folder = ("--folder", str((out / "llama").resolve()))
    sizes = [
        stage(f"decompose {d}", 12 + d / 500, "gpu_run.decompositions", "--size", str(d))
        for d in reversed(TOY_SIZES if toy else SIZES)
    ]
    return [
        stage("machine", 30, "gpu_run.machine"),
        stage("kernels", 60, "kernels"),
        gpt("bfloat16", 130),
        stage("write a folder", 25, "gpu_run.folder", "--do", "write", *folder),
        stage("edit the folder", 90, "gpu_run.folder", "--do", "edit", *folder),
        *sizes[:2],  # beyond what the libraries are known to take, and asked for before the rest
        stage("requests", 35, "gpu_run.many_requests"),
        *sizes[2:],
        stage("plan the folder", 55, "gpu_run.folder", "--do", "plan", *folder),
        *(() if toy else (gpt("float32", 90),)),  # of a toy nothing else than the other
        stage("peers", 60, "gpu_run.peers"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run it; return 1 where a stage failed, 2 where nothing could be run, 3 where time was short.

    A stage that is skipped, since what it needs is not there, is no failure.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the numbers: out/gpu, out/gpu-toy")
    parser.add_argument("--only", help="beginnings of the stages' names, with commas between them")
    parser.add_argument("--data", help="TOFU's folder; without it invented rows stand in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all stages together")
    given = parser.parse_args(arguments)
    out = given.out or Path("out/gpu-toy" if given.toy else "out/gpu")
    if out.exists() and not out.is_dir():
        return _refuse(f"{out}: is a file; --out names a folder")
    stages = stages_of(Options(given.toy, given.data, given.seed), out)
    wanted = tuple(given.only.split(",")) if given.only else ("",)
    first, rest = stages[0], [stage for stage in stages[1:] if stage.name.startswith(wanted)]
    if not rest:
        names = ", ".join(stage.name for stage in stages[1:])
        return _refuse(f"--only {given.only}: no stage's name begins so; they are {names}")
    found: dict[str, Any] = {
        "schema": "jedit.gpu/1",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "is_toy": given.toy,
        "data": given.data or "invented authors, in place of TOFU",
        "seed": given.seed,
    }
    environment = TOY if given.toy else GPU
    how = {"say": _say, "environment": environment}
    known = run_stages([first], out, dict(found), seconds=first.seconds, **how)
    machine = known["stages"]["machine"]
    if machine["state"] != "done":
        return _refuse(f"JAX finds no device: {machine['message']} ({out / 'machine.log'})")
    if machine["found"]["platform"] == "cpu" and not given.toy:
        return _refuse("JAX sees no accelerator here; --toy runs tiny sizes on the CPU")
    found["machine"] = machine["found"]
    found = run_stages(rest, out, found, seconds=given.seconds, **how)
    text = markdown(found)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Numbers: {out / 'gpu.json'}")
    states = {name: row["state"] for name, row in found["stages"].items()}
    short = [name for name, state in states.items() if state in ("cut short", "left out")]
    if short:
        names = ", ".join(f"{name} ({states[name]})" for name in short)
        print(f"Not reached in {given.seconds:g} s: {names}. --only runs them alone.")
    return 1 if {"failed", "stopped"} & set(states.values()) else 3 if short else 0


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"python -m tests.bench.gpu: {sentence}\n")
    return 2


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

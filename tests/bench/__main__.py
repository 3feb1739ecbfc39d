"""`make bench`: measure every job of every contender and say which claims hold.

    python -m tests.bench [--toy] [--case mlp gpt] [--job ...] [--contender ...]
                          [--repeats N] [--rounds N] [--output out/bench.json]

This process imports no JAX and only waits: every measurement runs in a fresh child, round after
round, so that a machine whose speed drifts is met by all contenders. The contenders in torch
run under the interpreter that the environment variable JEDIT_BENCH_TORCH names, or under that of
.venv-peers, which `make bench` makes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.bench.cases import CASES, JOBS, TOYS
from tests.bench.child import request
from tests.bench.table import claims, table

CONTENDERS = {
    "jedit": JOBS,
    "by hand": ("factors", "eigenvalues"),
    "kfac-jax": ("factors",),
    "kronfluence": ("factors", "eigenvalues"),
    "curvlinops": ("factors", "eigenvalues"),
}
TIME_LIMIT = 900
# XLA's CPU client gets its buffers from malloc and gives them back after every call: in small pages
# the kernel spends a tenth of a step on zeroing them. Set for every contender alike, unless the
# caller has set it; with ":glibc.malloc.arena_max=1" after it everybody needs a tenth less memory
# and a twentieth more time.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
HERE = Path(__file__).resolve().parent
IN_TORCH = ("kronfluence", "curvlinops")
PEERS = HERE.parent.parent / ".venv-peers" / "bin" / "python"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--job", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=2, help="passes a child")
    parser.add_argument("--rounds", type=int, default=2, help="children a measurement")
    parser.add_argument("--output", type=Path, default=Path("out/bench.json"))
    options = parser.parse_args(arguments)
    rows: dict[tuple[str, str, str], dict] = {}
    results: list[dict] = []
    held: list[dict] = []
    for number in range(options.rounds):
        for name in options.case:
            case = (TOYS if options.toy else CASES)[name]
            for job in options.job:
                for contender in options.contender:
                    if job not in CONTENDERS[contender]:
                        continue
                    where = (name, job, contender)
                    if "skipped" in rows.get(where, {}):
                        continue
                    print(f"round {number + 1}: {name}, {job}, {contender}", file=sys.stderr)
                    merge(rows, where, measured(request(case, contender, job, options.repeats)))
                    # Written each time: a run that is stopped keeps what it has measured.
                    results = [summary(*at, row) for at, row in rows.items()]
                    held = [] if options.toy else claims(results)
                    write(options.output, results, held)
    print(table(results, held))
    print(f"\nwritten to {options.output}")
    return 0


def write(path: Path, results: list[dict], held: list[dict]) -> None:
    """All of it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": results, "claims": held}, indent=1) + "\n")


def measured(asked: dict) -> dict:
    """What a child measured, or `{"skipped": reason}`."""
    command = [sys.executable, "-m", "tests.bench.child"]
    contender = asked["contender"]
    if contender in IN_TORCH:
        default = str(PEERS) if PEERS.exists() else sys.executable
        python = os.environ.get("JEDIT_BENCH_TORCH", default)
        probe = [python, "-c", f"import torch, {contender}"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            reason = (
                f"no torch and {contender} in {python}; `make .venv-peers/.done` makes a python"
            )
            return {"skipped": f"{reason} that has them, JEDIT_BENCH_TORCH names another"}
        command = [python, str(HERE / f"{contender}_peer.py")]
    environment = {**MALLOC, **os.environ, "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [*command, json.dumps(asked)],
            capture_output=True,
            text=True,
            check=False,
            cwd=HERE.parent.parent,
            env=environment,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done within {TIME_LIMIT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": f"exit code {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def merge(rows: dict, where: tuple[str, str, str], row: dict) -> None:
    """Put a round's measurement with those of the rounds before."""
    old = rows.get(where)
    if old is None or "skipped" in row:
        rows[where] = row
        return
    for name in ("seconds", "multiples", "rates"):
        old[name] = old[name] + row[name]
    old["peak_gib"] = max(old["peak_gib"], row["peak_gib"])


def summary(case: str, job: str, contender: str, row: dict) -> dict:
    """Medians, with the quartiles that say how noisy it was, and all that was measured."""
    named = {"case": case, "job": job, "contender": contender}
    if "skipped" in row:
        return {**named, **row}
    return {
        **named,
        "multiple": statistics.median(row["multiples"]),
        "quartiles": _quartiles(row["multiples"]),
        "seconds": statistics.median(row["seconds"]),
        "rate_gflops": [statistics.median(row["rates"][k::2]) / 1e9 for k in (0, 1)],
        "peak_gib": row["peak_gib"],
        "measured": {k: row[k] for k in ("seconds", "multiples", "rates")},
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


if __name__ == "__main__":
    sys.exit(main())

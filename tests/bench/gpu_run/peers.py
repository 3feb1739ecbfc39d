"""The factors of the run's GPT by jedit and by kfac-jax, on an accelerator.

    python -m tests.bench.gpu_run.peers --json FILE [--toy] [--dtype both]

For each dtype jedit and kfac-jax on tokens drawn at random, the parameters in that dtype. In
float32 kfac-jax multiplies its moments at the device's default precision, jedit at full, so that
their seconds are not those of one thing there. This process imports no JAX: each measurement is
made in a process of its own, which has the device's memory to itself and a peak of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from tests.bench.cases import TOYS, Case
from tests.bench.gpu_run.stages import ROOT, write_json

CONTENDERS = ("jedit", "kfac-jax")
SIZES = {  # of the recipe, and of its square products
    False: (Case("gpt", (8192, 768, 12, 12), 160, num_examples=640, batch=32), 8192),
    True: (TOYS["gpt"], 64),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_run.peers")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--dtype", choices=("both", "bfloat16", "float32"), default="both")
    parser.add_argument("--json", type=Path, required=True, help="file of the numbers")
    options = parser.parse_args(arguments)
    found = []
    for dtype in ("bfloat16", "float32") if options.dtype == "both" else (options.dtype,):
        for contender in CONTENDERS:
            asked = {"dtype": dtype, "contender": contender, "is_toy": options.toy}
            found.append(asked | in_a_child(asked))
            print(line(found[-1]))
            write_json(options.json, {"peers": found})
    return 0


def in_a_child(asked: dict) -> dict:
    """What a process of its own measured, or why it did not."""
    code = (
        "import sys, json; from tests.bench.gpu_run import peers; "
        "print(peers.child(json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(asked: dict) -> str:
    """One pass of the factors, as JSON: seconds, share of the matmul rate, GiB at the peak.

    Raises:
        ValueError: there is no accelerator, and it was not a toy that was asked for.
    """
    import jax

    from jedit.models import cast_params
    from tests.bench import contenders
    from tests.bench.gpu_run.bench_steps import timed
    from tests.bench.gpu_run.rates import factor_flops, matmul_rates, peak_gib
    from tests.bench.models import make

    if not asked["is_toy"] and jax.default_backend() == "cpu":
        raise ValueError("there is no accelerator; --toy runs tiny sizes on any device")
    case, size = SIZES[asked["is_toy"]]
    problem = make(case)
    cast = {k: cast_params(getattr(problem, k), asked["dtype"]) for k in ("params", "matrices")}
    prepare, _ = contenders.CONTENDERS[asked["contender"]]
    work = prepare(problem._replace(**cast), "factors")

    def add(state, batches):
        for batch in batches:
            state = work.step(state, batch)
        return state

    first = timed(lambda: add(work.start(), work.batches[:1]))[0]
    peak = peak_gib()  # before the square products, which take memory as well
    _, zero = timed(work.start)
    before = matmul_rates(asked["dtype"], size)
    seconds, _ = timed(lambda: add(zero, work.batches))
    rates = before.between(matmul_rates(asked["dtype"], size))
    flops = case.num_batches * case.batch * case.positions * factor_flops(case.matrices).all
    return json.dumps(
        {
            "first_seconds": first,
            "seconds": seconds,
            "share": flops / rates.peak / seconds,
            "peak_gib": peak,
            "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
    )


def line(row: dict) -> str:
    """One measurement for people."""
    name = f"{row['dtype']}, {row['contender']}"
    if "skipped" in row:
        return f"{name}: skipped: {row['skipped']}"
    peak = "not told" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
    share = f"{row['share']:.1%} of the matmul rate"
    return f"{name}: {row['seconds']:.3f} s, {share}, peak memory of the device {peak}"


if __name__ == "__main__":
    sys.exit(main())

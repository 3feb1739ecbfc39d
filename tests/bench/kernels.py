"""The kernels of `jedit_kernels` beside XLA: `python -m tests.bench.kernels [--toy] [--check]`.

On a GPU all of it, in bfloat16 at Llama-8B's shapes, after a check of every kernel against XLA on
that GPU at every shape of shapes.py, ragged ones among them: an operation whose kernel is wrong
somewhere is named, its kernel is not timed, and the exit status is 1. `--check` stops there. On a
CPU the XLA programs alone, in float32 at shapes that take seconds. Times are medians; memory is
what the compiled program needs beside its arguments and its result, by XLA's own account. `--json
FILE` keeps the numbers, written after each shape.
"""

import argparse
import datetime
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jedit_kernels import moment, shapes, squared_gradient_sum
from jedit_kernels.choice import OLDEST_JAX, is_jax_new_enough

from tests.bench.gpu_run.stages import write_json

SUMS = 1e-4  # largest error of a float32 sum over 8,192 rows, relative to the largest entry
LEAST = 0.03  # seconds of one timing


class Race(NamedTuple):
    """One operation at one shape.

    Attributes:
        name: operation and shape.
        operands: what every contender is called with.
        contenders: by name; the first is what the others are measured in.
        tolerance: of the kernel's agreement with XLA.
        is_lower: whether only the lower triangle counts.
    """

    name: str
    operands: tuple
    contenders: dict[str, Callable]
    tolerance: float
    is_lower: bool = False


def whole_product(total, rows, mask=None):
    """What one would write: both triangles."""
    if mask is not None:
        rows = jnp.where(mask[..., None], rows, jnp.zeros((), rows.dtype))
    square = jnp.einsum("lni,lnj->lij", rows, rows, preferred_element_type=total.dtype)
    return total + square


def all_gradients(total, a, g):
    """What one would write: every example's gradient at once."""
    gradients = jnp.einsum("lnsi,lnso->lnio", a, g, preferred_element_type=total.dtype)
    return total + jnp.sum(gradients**2, axis=1)


def normal(seed: int, shape: tuple[int, ...], dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def races(size: str, dtype) -> Iterator[Race]:
    """Every operation at every shape of one size: "LLAMA", "CPU" or "TOY"."""
    is_kernel = jax.default_backend() == "gpu" and is_jax_new_enough()

    def contenders(function, **peers):
        ours = {"XLA, jedit_kernels": functools.partial(function, implementation="xla")}
        kernel = (
            {"kernel": functools.partial(function, implementation="mosaic")} if is_kernel else {}
        )
        return {**peers, **ours, **kernel}

    for shape in getattr(shapes, f"{size}_MOMENTS"):
        layers, n, d = shape
        found = contenders(moment, **{"XLA, whole product": whole_product})
        operands = jnp.zeros((layers, d, d), jnp.float32), normal(0, shape, dtype)
        yield Race(f"moment {tuple(shape)}", operands, found, SUMS, True)
        # Padding at the ends of sequences of 500: whole, mixed and empty stretches of rows.
        mask = jnp.broadcast_to(jnp.arange(n) % 500 < 300, (layers, n))
        rows = jnp.where(mask[..., None], operands[1], jnp.asarray(jnp.nan, dtype))
        operands = operands[0], rows, mask
        yield Race(f"moment {tuple(shape)}, masked", operands, found, SUMS, True)
    for shape in getattr(shapes, f"{size}_GRADIENTS"):
        layers, n, s, d_in, d_out = shape
        a, g = normal(1, (layers, n, s, d_in), dtype), normal(2, (layers, n, s, d_out), dtype)
        operands = jnp.zeros((layers, d_in, d_out), jnp.float32), a, g
        peers = {"XLA, all gradients": all_gradients}
        found = contenders(squared_gradient_sum, **peers)
        yield Race(f"squared_gradient_sum {tuple(shape)}", operands, found, SUMS)


def error(race: Race) -> float:
    """How far the kernel is from XLA, relative to the largest entry; NaN where either is."""
    kernel = jax.jit(race.contenders["kernel"])(*race.operands)
    expected = jax.jit(race.contenders["XLA, jedit_kernels"])(*race.operands)
    if race.is_lower:
        kernel, expected = jnp.tril(kernel), jnp.tril(expected)
    if not jnp.all(jnp.isfinite(kernel) & jnp.isfinite(expected)):
        return float("nan")  # a maximum may pass over NaN: XLA's does on the CPU
    return float(jnp.max(jnp.abs(kernel - expected)) / jnp.max(jnp.abs(expected)))


def check(sizes: tuple[str, ...], keep: Callable[[dict], None] = lambda _: None) -> bool:
    """Print every kernel's error on this GPU, and keep it; whether all are right.

    One that cannot be compiled or run is wrong, and the others are checked all the same.
    """
    is_right = True
    for size in sizes:
        for race in races(size, jnp.bfloat16):
            try:
                wrong, why = error(race), ""
            except Exception as failure:  # noqa: BLE001 - the compiler's complaint is the finding
                wrong, why = float("nan"), f" ({str(failure).strip().splitlines()[0][:300]})"
            is_good = wrong <= race.tolerance  # False for NaN
            is_right &= is_good
            print(f"{'right' if is_good else 'WRONG'}  {race.name}: error {wrong:.1e}{why}")
            keep({"name": race.name, "error": wrong, "is_right": is_good, "why": why.strip(" ()")})
    return is_right


def measure(function: Callable, operands: tuple, repeats: int) -> dict[str, Any]:
    """Median seconds a call, and bytes of temporary memory."""
    compiled = jax.jit(function).lower(*operands).compile()
    analysis = compiled.memory_analysis()
    jax.block_until_ready(compiled(*operands))

    def run(calls):
        begin = time.perf_counter()
        for _ in range(calls):
            result = compiled(*operands)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    # Enough calls at a time that starting them does not count.
    calls = max(1, min(100, round(LEAST / run(1))))
    seconds = [run(calls) for _ in range(repeats)]
    return {
        "seconds": statistics.median(seconds),
        "temporary": analysis.temp_size_in_bytes if analysis else float("nan"),
    }


def report(
    size: str,
    dtype,
    repeats: int,
    *,
    wrong: Collection[str] = (),
    keep: Callable[[dict], None] = lambda _: None,
) -> None:
    """The table: every contender of every race, but the kernels of operations that are wrong."""
    print("| operation (shape) | contender | ms | times the first's speed | memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    for race in races(size, dtype):
        first = None
        for name, function in race.contenders.items():
            if name == "kernel" and race.name.split()[0] in wrong:
                continue
            row = measure(function, race.operands, repeats)
            first = first or row["seconds"]
            speed, memory = first / row["seconds"], row["temporary"] / 1e6
            keep({"name": race.name, "contender": name, **row, "speed": speed})
            cells = (
                race.name,
                name,
                f"{row['seconds'] * 1e3:.3g}",
                f"{speed:.2f}",
                f"{memory:.3g}",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--check", action="store_true", help="on a GPU: check the kernels, no more")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file of the numbers")
    options = parser.parse_args(arguments)
    is_gpu = jax.default_backend() == "gpu"
    kind = jax.devices()[0].device_kind if is_gpu else f"CPU ({platform.machine()})"
    dtype = jnp.bfloat16 if is_gpu else jnp.float32
    when = datetime.datetime.now(datetime.UTC).date()
    print(f"{kind}, jax {jax.__version__}, {jnp.dtype(dtype)}, {when}")
    found = {"kind": kind, "jax": jax.__version__, "dtype": str(jnp.dtype(dtype))}
    found |= {"checks": [], "times": []}

    def keep(rows: str) -> Callable[[dict], None]:
        def add(row: dict) -> None:
            found[rows].append(row)
            if options.json:
                write_json(options.json, found)

        return add

    if not is_gpu:
        found["unchecked"] = "the kernels need a GPU; tests/kernels interprets them"
    elif not is_jax_new_enough():
        found["unchecked"] = f"the kernels need jax >= {'.'.join(map(str, OLDEST_JAX))}"
    else:
        check(("TOY",) if options.toy else ("TOY", "CPU", "LLAMA"), keep("checks"))
    if "unchecked" in found:
        print(f"nothing to check: {found['unchecked']}")
    wrong = {row["name"].split()[0] for row in found["checks"] if not row["is_right"]}
    if not options.check:
        size = "TOY" if options.toy else "LLAMA" if is_gpu else "CPU"
        report(size, dtype, options.repeats, wrong=wrong, keep=keep("times"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

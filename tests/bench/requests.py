"""`batch_unlearn` beside the floor of its own arithmetic.

    python -m tests.bench.requests [--toy] [--repeats N] [--chunks 16 100] [--ranks 0 8]

Requests of one row, answered by a random GPT of the authors scene's size, which costs what a
trained one does. Every line is a chunk and a rank (0: all): requests a second, beside how many the
flop floor (`tests.bench.request_floor`) would allow at the matmul rate measured before and after,
and their ratio. Medians over the repeats, which go round the lines.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time

import jax

from jedit import Batch, batch_unlearn, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.models import gpt
from jedit.recipes.environment import matmul_rate
from jedit.requests import Solver
from tests.bench.request_floor import request_floor

SELECT = r"/(attn|mlp)/\w+/(kernel|bias)$"


@dataclasses.dataclass(frozen=True)
class Size:
    """The GPT, and how many requests of one row of `positions` tokens."""

    vocab: int
    width: int
    layers: int
    positions: int
    number: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of every matrix that is edited."""
        wide = 4 * self.width
        layer = [(self.width, self.width)] * 4 + [(self.width, wide), (wide, self.width)]
        return layer * self.layers


AUTHORS = Size(vocab=1024, width=96, layers=2, positions=96, number=200)
TOY = Size(vocab=11, width=8, layers=1, positions=5, number=6)


def prepare(size: Size):
    """The function that answers all requests once, given a solver."""
    model_key, data_key, retain_key, label_key = jax.random.split(jax.random.key(0), 4)
    apply, params = gpt(
        key=model_key,
        vocab=size.vocab,
        width=size.width,
        num_layers=size.layers,
        num_heads=4,
        max_len=size.positions,
    )
    shape = (size.number, 1, size.positions)
    tokens = jax.random.randint(data_key, shape, 0, size.vocab)
    retain = Batch(jax.random.randint(retain_key, (32, size.positions), 0, size.vocab))
    curvature = estimate(kfac(apply, Categorical(), select=SELECT), params, [retain], key=label_key)
    return functools.partial(
        batch_unlearn, apply, params, curvature, Batch(tokens, tokens), damping=0.1
    )


def measure(size: Size, chunks: list[int], ranks: list[int], repeats: int) -> list[dict]:
    """Every chunk and rank: requests a second, those of the floor, and the ratio."""
    answer = prepare(size)
    lines = {
        (chunk, rank): functools.partial(answer, solver=Solver(rank=rank or None, chunk=chunk))
        for chunk in chunks
        for rank in ranks
    }
    for run in lines.values():
        jax.block_until_ready(run())
    ratios, seconds, rates = ({line: [] for line in lines} for _ in range(3))
    for _ in range(repeats):
        for line, run in lines.items():
            before = matmul_rate()
            begin = time.perf_counter()
            jax.block_until_ready(run())
            elapsed = time.perf_counter() - begin
            rate = 2 / (1 / before + 1 / matmul_rate())
            flops = size.number * request_floor(size.matrices, size.positions, line[1] or None)
            ratios[line].append(elapsed * rate / flops)
            seconds[line].append(elapsed)
            rates[line].append(rate)
    return [
        {
            "chunk": chunk,
            "rank": rank or "all",
            "a second": size.number / statistics.median(seconds[chunk, rank]),
            "floor": statistics.median(rates[chunk, rank])
            / request_floor(size.matrices, size.positions, rank or None),
            "times the floor": statistics.median(ratios[chunk, rank]),
            "GFLOP/s": statistics.median(rates[chunk, rank]) / 1e9,
        }
        for chunk, rank in lines
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.requests")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 100])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 8])
    options = parser.parse_args(arguments)
    size = TOY if options.toy else AUTHORS
    found = measure(size, options.chunks, options.ranks, options.repeats)
    print("| chunk | rank | requests a second | at the floor | times the floor | GFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found:
        cells = (
            row["chunk"],
            row["rank"],
            f"{row['a second']:.0f}",
            f"{row['floor']:.0f}",
            f"{row['times the floor']:.2f}",
            f"{row['GFLOP/s']:.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

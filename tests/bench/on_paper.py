"""Memory and seconds to fit and to edit Llama-3 by K-FAC, on paper: the README's table.

    python -m tests.bench.on_paper [--tokens 1e6] [--rate 790e12] [--float32-rate 60e12]

For a layer's matrices (d_in, d_out), P their entries, summed over layers; inputs that several
matrices read (query, key, value; gate, up) are captured once:

    sums            4 bytes · (Σ_inputs d_in² + Σ d_out²)
    factors         twice that: each matrix and its eigenbasis; the sums besides, until all are made
    eigenvalues     4 bytes · P, EK-FAC's
    fit             T · (4 P + Σ_inputs 2 d_in² + Σ 2 d_out²) flops for T positions, times 1.38
    decomposition   Σ 2 d³, times 10, in float32
    edit            Σ 4 d_in² d_out + 4 d_in d_out², times 1.38, in float32; and T_f · 6 P flops

divided by the devices, as on a mesh whose axes all split every weight (one that splits none holds
copies). The factors 1.38 and 10 are what `make bench` measured for a GPT on two CPU
cores over those floors; no accelerator has been measured, and a decomposition there may well be
further from the rate of its products. The rates are the nominal ones of an H200.
"""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

OVER_FLOOR, OVER_FLOOR_EIGH = 1.38, 10.0


class Layer(NamedTuple):
    """Matrices that read one input, of a width, and write these widths."""

    d_in: int
    d_outs: tuple[int, ...]


class Model(NamedTuple):
    """Layers of one kind, so many."""

    name: str
    number: int
    layer: tuple[Layer, ...]


def llama(name: str, number: int, width: int, key_value: int, hidden: int) -> Model:
    return Model(
        name,
        number,
        (
            Layer(width, (width, key_value, key_value)),
            Layer(width, (width,)),
            Layer(width, (hidden, hidden)),
            Layer(hidden, (width,)),
        ),
    )


MODELS = (
    llama("Llama-3-8B", 32, 4096, 1024, 14336),
    llama("Llama-3-70B", 80, 8192, 1024, 28672),
)


class Sums(NamedTuple):
    """Of one model: entries of weights and of factors, Σ d³ over factors, a solve's flops."""

    weights: int
    factors: int
    cubes: int
    solve: int


def sums(model: Model) -> Sums:
    weights = factors = cubes = solve = 0
    for d_in, d_outs in model.layer:
        factors += d_in**2 + sum(d**2 for d in d_outs)
        cubes += d_in**3 + sum(d**3 for d in d_outs)
        weights += sum(d_in * d for d in d_outs)
        solve += sum(4 * d_in**2 * d + 4 * d_in * d**2 for d in d_outs)
    return Sums(*(model.number * x for x in (weights, factors, cubes, solve)))


class Cost(NamedTuple):
    """Gigabytes on each device, and seconds."""

    sums: float
    factors: float
    fit: float
    decomposition: float
    edit: float


def cost(model: Model, devices: int, tokens: float, rate: float, float32_rate: float) -> Cost:
    weights, factors, cubes, solve = sums(model)
    fit = tokens * (4 * weights + 2 * factors) * OVER_FLOOR / rate
    edit = 0.1 * tokens * 6 * weights * OVER_FLOOR / rate + solve * OVER_FLOOR / float32_rate
    decomposition = 2 * cubes * OVER_FLOOR_EIGH / float32_rate
    gigabytes = (4 * factors / 1e9, 8 * factors / 1e9)
    return Cost(*(x / devices for x in (*gigabytes, fit, decomposition, edit)))


def table(rows: Iterable[tuple[str, int, Cost]]) -> str:
    lines = ["| model | devices | sums, GB | factors, GB | fit, s | decompose, s | edit, s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, devices, found in rows:
        numbers = " | ".join(f"{x:.3g}" for x in found)
        lines.append(f"| {name} | {devices} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=float, default=1e6, help="of retain; a tenth are forgotten"
    )
    parser.add_argument("--rate", type=float, default=790e12, help="flops a second, bfloat16")
    parser.add_argument("--float32-rate", type=float, default=60e12, help="flops a second, float32")
    given = parser.parse_args()
    rates = (given.tokens, given.rate, given.float32_rate)
    print(table((m.name, n, cost(m, n, *rates)) for m in MODELS for n in (8, 64)))


if __name__ == "__main__":
    main()

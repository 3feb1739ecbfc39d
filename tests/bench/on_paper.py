"""Memory and seconds to fit and to edit Llama-3 by K-FAC, on paper: the README's table.

    python -m tests.bench.on_paper [--tokens 1e6] [--constants out/gpu/gpu.json]

For a layer's matrices (d_in, d_out), P their entries, summed over layers; inputs that several
matrices read (query, key, value; gate, up) are captured once:

    sums            4 bytes · (Σ_inputs d_in² + Σ d_out²)
    factors         twice that: each matrix and its eigenbasis; the sums besides, until all are made
    eigenvalues     4 bytes · P, EK-FAC's
    fit             T · (4 P + Σ_inputs 2 d_in² + Σ 2 d_out²) flops for T positions, times f
    decomposition   Σ 2 d³, times e, in float32
    factorisation   Σ d³ / 3, times c, in float32: Cholesky's, which factored damping does with
    edit            Σ 4 d_in² d_out + 4 d_in d_out², times f, in float32; and T_f · 6 P flops

divided by the devices, as on a mesh whose axes all split every weight (one that splits none holds
copies). The rates and the factors f, e and c over those floors are what `make gpu` measured, where
its gpu.json is there. Until then they are stated ones: f = 1.38 and e = 10 are what `make bench`
measured for a GPT on two CPU cores, c = 5.4 is Cholesky's of 2,048 columns on one CPU core (`python
-m tests.bench.gpu_run.decompositions --size 2048`), and the rates and the memory are the nominal
ones of an H200.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RUN = Path("out/gpu/gpu.json")


class Constants(NamedTuple):
    """What a device does, and how far from its floors.

    Attributes:
        rate: flops a second in bfloat16.
        float32_rate: flops a second in float32 at full precision.
        fit: seconds of a fit over those of its floor in bfloat16, f.
        eigh: of an eigendecomposition over those of 2 d³ in float32, e.
        cholesky: of a Cholesky factor over those of d³ / 3 in float32, c.
        memory: bytes of a device.
        source: where they are from, a sentence's end.
    """

    rate: float = 790e12
    float32_rate: float = 60e12
    fit: float = 1.38
    eigh: float = 10.0
    cholesky: float = 5.4
    memory: float = 141e9
    source: str = "stated: an H200's nominal rates and memory, factors over the floors of CPU cores"


STATED = Constants()


def constants(path: Path | None = None) -> Constants:
    """The constants of a run that was made, each that it has; else the stated ones.

    A toy's are no constants. Of decompositions the largest that ended speaks, since what matters on
    paper is large.

    Args:
        path: gpu.json of `make gpu`; None: where it writes it, if it did.

    Raises:
        ValueError: a file was named that is no such run, or a toy.
    """
    is_named, path = path is not None, path or RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_run = found.get("schema") == "jedit.gpu/1" and not found["is_toy"]
    except (OSError, ValueError, AttributeError, KeyError):
        is_run = False
    if not is_run:
        if is_named:
            raise ValueError(f"{path}: is no gpu.json of a whole run; `make gpu` writes one")
        return STATED
    measured = {k: v for k, v in _measured(found).items() if v}
    missing = [k for k in ("rate", "float32_rate", "fit", "eigh", "cholesky") if k not in measured]
    source = f"measured on {found['machine']['kind']}, {found['date'][:10]} ({path})"
    source += f"; stated, since the run has no number of them: {', '.join(missing)}" * bool(missing)
    return Constants(**measured, source=source)


def _measured(found: dict[str, Any]) -> dict[str, float | None]:
    stages = {name: row.get("found", {}) for name, row in found["stages"].items()}
    known: dict[str, float | None] = {"memory": found["machine"].get("bytes")}
    for run in stages.get("gpt bfloat16", {}).get("runs", ()):
        if "matmul_rates" in run:
            known["rate"] = run["matmul_rates"]["peak"]
            known["float32_rate"] = run["matmul_rates"]["full"]
            shares = [step["share"] for step in run["steps"] if step["name"] == "factors"]
            known["fit"] = 1 / shares[0] if shares and shares[0] else None
    sizes = [row for name, row in stages.items() if name.startswith("decompose") and row]
    for row in sorted(sizes, key=lambda row: row["size"]):
        for way in ("eigh", "cholesky"):
            # The rate of a product of that size is another than the nominal: seconds count.
            if "seconds" in row["ways"].get(way, {}) and "float32_rate" in known:
                one = row["ways"][way]
                known[way] = one["seconds"] * known["float32_rate"] / one["flops"]
    return known


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
    factorisation: float
    edit: float


def cost(model: Model, devices: int, tokens: float, of: Constants = STATED) -> Cost:
    weights, factors, cubes, solve = sums(model)
    fit = tokens * (4 * weights + 2 * factors) * of.fit / of.rate
    edit = 0.1 * tokens * 6 * weights * of.fit / of.rate + solve * of.fit / of.float32_rate
    decomposition = 2 * cubes * of.eigh / of.float32_rate
    factorisation = cubes / 3 * of.cholesky / of.float32_rate
    gigabytes = (4 * factors / 1e9, 8 * factors / 1e9)
    return Cost(*(x / devices for x in (*gigabytes, fit, decomposition, factorisation, edit)))


def table(rows: Iterable[tuple[str, int, Cost]]) -> str:
    heads = ("model", "devices", "sums, GB", "factors and bases, GB")
    heads += ("fit, s", "decompose, s", "or by Cholesky, s", "edit, s")
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, devices, found in rows:
        numbers = " | ".join(f"{x:.3g}" for x in found)
        lines.append(f"| {name} | {devices} | {numbers} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--tokens", type=float, default=1e6, help="of retain; a tenth are forgotten"
    )
    parser.add_argument("--constants", type=Path, help="gpu.json of a run; out/gpu's, if there")
    given = parser.parse_args(arguments)
    try:
        known = constants(given.constants)
    except ValueError as error:
        parser.error(str(error))
    print(table((m.name, n, cost(m, n, given.tokens, known)) for m in MODELS for n in (8, 64)))
    print(f"\nConstants {known.source}.")


if __name__ == "__main__":
    main()

"""Claims: on real images, by the field's protocol (UA, RA, TA, MIA against a retrained model),
(1) every method is nearer to the retrained model than the untouched one is, at random and on a
class; (2) ROSU is nearer than UAM; (3) SalUn's mask brings random labels nearer.

    python -m tests.bench.claims.vision [--data ../shared/data/mnist] [--rows 4000] [--seeds 5]
    python -m tests.bench.claims.vision --cifar FOLDER --seeds 5          # with an accelerator

A residual network learns MNIST's first rows, or CIFAR-10, or scikit-learn's digits where --data is
no folder, and is to forget a random tenth, or class s for seed s. What is run, and kept run by run
in OUT/vision, is `jedit vision`: each method at four to six strengths on a seed of its own, the one
nearest to retrained on the seeds reported. Printed are the differences of the average gaps, in
percentage points, seed by seed: of each method from the untouched model, and of the pairs.
"""

import argparse
from pathlib import Path

from jedit.recipes.sweep import UNTOUCHED
from jedit.recipes.vision.presets import PRESETS, load_images
from jedit.recipes.vision.run import Protocol, Runs, vision
from tests.bench.claims.evidence import interval, parser, shown, write

MNIST = Path("../shared/data/mnist")
METHODS = (
    "fine-tune",
    "gradient ascent",
    "GradDiff",
    "random label",
    "SalUn",
    "l1-sparse",
    "UAM",
    "ROSU",
    "engram",
    "K-FADE (K-FAC)",
)
PAIRS = (("ROSU", "UAM"), ("SalUn", "random label"))


def differences(gaps: dict[str, dict[int, float]]) -> dict[str, dict]:
    """Intervals over the seeds: of the gap less the untouched model's, and within the pairs.

    Args:
        gaps: average gap by method and seed.
    """
    against = [(name, UNTOUCHED) for name in METHODS if name in gaps]
    pairs = [pair for pair in PAIRS if set(pair) <= set(gaps)]
    return {
        f"{first} less {second}": interval([gaps[first][s] - gaps[second][s] for s in gaps[first]])
        for first, second in [*against, *pairs]
    }


def gaps_of(records) -> dict[str, dict[int, float]]:
    """The average gap by method and seed."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        of = found.setdefault(record["method"], {})
        of[record["seed"]] = record["numbers"]["average_gap"]["value"]
    return found


def options() -> argparse.ArgumentParser:
    """The options."""
    given = parser(__doc__)
    given.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's four files")
    given.add_argument("--cifar", type=Path, help="folder of CIFAR-10, in MNIST's place")
    given.add_argument("--rows", type=int, default=4000, help="training rows, the first ones")
    given.add_argument("--epochs", type=float, default=2.0, help="of a method that trains")
    given.add_argument("--methods", nargs="+", default=METHODS)
    given.add_argument("--quick", action="store_true", help="a few rows of the digits, one method")
    return given


def said(text: str) -> None:
    """Say a stage at once, for whoever reads along."""
    print(text, flush=True)


def main() -> None:
    """Run the protocol and write what came out."""
    given = options().parse_args()
    source = "cifar10" if given.cifar else "mnist" if given.data.is_dir() else "digits"
    protocol: Protocol = PRESETS[source]._replace(epochs=given.epochs)
    methods, rows = tuple(given.methods), None if given.cifar else given.rows
    if given.quick:
        source, rows, methods = "digits", 200, ("fine-tune", "engram")
        protocol = PRESETS["digits"]
        model, recipe = protocol.model, protocol.recipe._replace(epochs=2)
        protocol = protocol._replace(
            model=model._replace(width=4, blocks=(1,)), recipe=recipe, epochs=0.5, fitted_rows=50
        )
    images = load_images(source, given.cifar or given.data, rows)
    runs = Runs(methods, "grid", range(given.seeds))
    out = given.out / "vision"
    found, tables = {}, {}
    for what, records, mine in vision(images, protocol, runs, out, say=said):
        found[what], tables[what] = differences(gaps_of(records)), mine
        print(f"\n| {what}: difference of the average gaps | points |\n| --- | --- |")
        for name, over in found[what].items():
            print(f"| {name} | {shown(over)} |")
    numbers = {"source": source, "rows": rows, "protocol": str(protocol), "differences": found}
    write("vision", given.out, {**numbers, "tables": tables})


if __name__ == "__main__":
    main()

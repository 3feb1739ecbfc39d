"""Claim: on TOFU a method in the metric of the outputs passes Forget Quality 0.05 at the smallest
loss of Model Utility, and in less time than NPO.

    python -m tests.bench.claims.tofu --data DIR [--seeds 3] [--methods NPO RMU ...]

Each seed trains a full and a retrained model of its own at the cpu preset, tries every method at
the same number of evaluations, and takes each method's best point by the recipe's rule.  Seconds
are of the edit alone, compiling left out; the curvature's fit stands apart. Points are judged by 40
questions of each set.
"""

import sys

import jax
import numpy as np

from jedit.recipes.comparison.compare import Judged, compare
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import compare_key, prepare, read_sets
from jedit.report.results import PASSING_QUALITY
from tests.bench.claims.evidence import interval, parser, shown, write

METHODS = (
    "K-FADE (K-FAC)",
    "NPO (natural, beta 0.04)",
    "NPO",
    "NPO (beta 0.04)",
    "SimNPO",
    "GradDiff",
    "RMU",
    "IdkDPO",
    "UNDIAL",
)
COLUMNS = ("forget_quality", "model_utility", "heldout_kl", "edit_seconds", "fit_seconds")


def best_points(judged: Judged) -> dict[str, dict[str, float]]:
    """By method the numbers of its best point; utility as a share of the untouched model's."""
    found = {}
    for method in judged.methods:
        best = judged.best[method.name]
        if best is not None:
            point = best[1]
            row = {name: getattr(point, name, method.fit_seconds) for name in COLUMNS}
            row["model_utility"] /= judged.original.model_utility
            found[method.name] = row | {"passes": float(point.forget_quality > PASSING_QUALITY)}
    return found


def main() -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--data", required=True, help="TOFU's folder, or its name on the hub")
    options.add_argument("--methods", nargs="+", default=list(METHODS))
    options.add_argument("--first", type=int, default=0, help="the first seed")
    given = options.parse_args()
    preset = PRESETS["cpu"]
    grid = preset.grid._replace(methods=tuple(given.methods))
    preset = preset._replace(grid=grid)
    sets = read_sets(given.data, preset)
    runs = []
    for seed in range(given.first, given.first + given.seeds):

        def say(text: str, seed: int = seed) -> None:
            print(f"seed {seed}: {text}", file=sys.stderr, flush=True)

        task = prepare(sets, preset, seed=seed, say=say).task
        judged, _ = compare(task, preset.grid, key=compare_key(seed), say=say, hold=jax.device_get)
        runs.append(best_points(judged))
        say(str(runs[-1]))
    print(
        "| method | passes | forget quality (geometric) | utility kept | held-out KL | s | fit s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    summary = {}
    for name in {name: None for run in runs for name in run}:
        rows = [run[name] for run in runs if name in run]
        summary[name] = {c: interval([row[c] for row in rows]) for c in COLUMNS}
        logs = np.log10([max(row["forget_quality"], 1e-300) for row in rows])
        passes = f"{sum(row['passes'] for row in rows):.0f} of {len(runs)}"
        rest = " | ".join(shown(summary[name][c]) for c in COLUMNS[1:])
        print(f"| {name} | {passes} | {10 ** logs.mean():.2g} | {rest} |")
    write(
        "tofu",
        given.out,
        {"seeds": given.seeds, "first": given.first, "runs": runs, "summary": summary},
    )


if __name__ == "__main__":
    main()

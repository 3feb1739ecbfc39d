"""Claim: how near each method comes to a retrained classifier, by the field's own four numbers.

    python -m tests.bench.claims.vision [--data ../shared/data/mnist] [--rows 10000] [--seeds 5]

A small CNN is trained on MNIST, or on scikit-learn's digits where --data is no folder, and is to
forget a random tenth of its rows, or a class (class s for seed s). Every method has four settings;
the one with the smallest average gap on a seed of its own, 100, with class 9, is run on the seeds
reported. UA, RA, TA and MIA in percent and the gap to the retrained model in percentage points,
mean and 95% t-interval over the seeds; `behind` is the gap less that of the method with the
smallest mean, seed by seed. Seconds leave compilation out and depend on what else the machine does.
"""

import json
from pathlib import Path

import jax
import numpy as np

from jedit.data import Digits, forget_class, load_digits, load_mnist, split_digits
from jedit.metrics import average_gap, tug_of_war
from jedit.models import cnn
from jedit.recipes.fitting import Recipe
from tests.bench.claims.evidence import interval, parser, shown, write
from tests.bench.vision_protocol.vision import (
    Judged,
    Protocol,
    Setting,
    Task,
    fit_model,
    forget_random,
    judge,
    make_task,
    tune,
    unlearn_and_judge,
)
from tests.bench.vision_protocol.vision_methods import CLASS_GRIDS, METHODS

MNIST = Path("../shared/data/mnist")
TUNING_SEED, TUNING_CLASS = 100, 9
FRACTION = 0.1
TASKS = ("random", "class")
COLUMNS = ("UA", "RA", "TA", "MIA", "gap", "Tug-of-War", "seconds", "attack")


def load(folder: Path, num_rows: int) -> tuple[Digits, Digits]:
    """Training rows, the first ones, and all test rows."""
    if folder.is_dir():
        train, test = load_mnist(folder)
        return train.take(np.arange(min(num_rows, len(train.labels)))), test
    return split_digits(load_digits(), seed=0)


def scenes(apply, rows: Digits, test: Digits, protocol: Protocol, shape, *, seed: int, label: int):
    """Yields each task of a seed with its retrained model and the seconds it took."""
    init_key, order_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
    _, initial = cnn(key=init_key, **shape)
    original, _ = fit_model(apply, initial, rows, protocol, key=order_key)
    chosen = (forget_random(rows, FRACTION, seed=seed), forget_class(rows, label))
    for name, parts in zip(TASKS, chosen, strict=True):
        task = make_task(apply, original, rows, parts, test, protocol, seed=seed)
        kept = rows.take(parts[1])
        yield name, task, fit_model(apply, initial, kept, protocol, key=order_key)


def grid_of(task: str, method: str) -> list[Setting]:
    """What a method is tried at."""
    return list((CLASS_GRIDS if task == "class" else {}).get(method, METHODS[method].grid))


def try_grids(task: Task, retrained, grids, tried: dict[str, list], protocol, *, key) -> None:
    """Write the average gap of every setting to `tried`, but for grids that were tried before."""
    reference = judge(task, *retrained)
    for name, grid in grids.items():
        if [setting for setting, _ in tried.get(name, [])] != grid:
            _, gaps = tune(task, reference, METHODS[name]._replace(grid=grid), protocol, key=key)
            tried[name] = list(zip(grid, gaps, strict=True))
            print(f"tuning: {name}: {tried[name]}", flush=True)


def measured(judged: Judged, retrained: Judged) -> dict[str, float]:
    """The columns of one row of one seed."""
    percent = [100 * share for share in judged.scores]
    gap = average_gap(judged.scores, retrained.scores)
    war = tug_of_war(judged.scores, retrained.scores)
    accuracy = 100 * judged.attack.balanced_accuracy
    return dict(zip(COLUMNS, [*percent, gap, war, judged.seconds, accuracy], strict=True))


def summary(seeds: list[dict[str, dict[str, float]]], settings) -> dict[str, dict]:
    """Intervals over the seeds by row and column, and how far each method is behind the best."""
    gaps = {name: np.array([seed[name]["gap"] for seed in seeds]) for name in seeds[0]}
    best = min(METHODS, key=lambda name: gaps[name].mean())
    return {
        name: {
            "setting": settings.get(name),
            "behind": interval(gaps[name] - gaps[best]),
            **{column: interval([seed[name][column] for seed in seeds]) for column in COLUMNS},
        }
        for name in gaps
    }


def show(task: str, rows: dict[str, dict]) -> None:
    """Print a task's table."""
    print(f"\n| {task} | setting | UA | RA | TA | MIA | gap | behind | Tug-of-War | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        setting = ", ".join(f"{k} {v}" for k, v in (row["setting"] or {}).items())
        cells = [shown(row[column], 4) for column in ("UA", "RA", "TA", "MIA")]
        cells += [shown(row["gap"]), shown(row["behind"]), shown(row["Tug-of-War"])]
        print(f"| {name} | {setting} | {' | '.join(cells)} | {row['seconds']['mean']:.2g} |")


def main() -> None:
    """Tune on one seed, run over the others, write what came out."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=MNIST, help="folder of MNIST's four files")
    options.add_argument("--rows", type=int, default=10_000, help="training rows, the first ones")
    options.add_argument("--epochs", type=int, default=8, help="of the models, batches of 64")
    options.add_argument("--channels", type=int, nargs=2, default=(8, 16))
    options.add_argument("--tuned", type=Path, help="an earlier vision.json: grids in it are kept")
    options.add_argument("--hidden", type=int, default=64)
    given = options.parse_args()
    rows, test = load(given.data, given.rows)
    protocol = Protocol(Recipe((given.epochs,), 64, 1e-3))
    shape = {"channels": given.channels, "hidden": given.hidden}
    shape["image_shape"] = rows.images.shape[1:]
    apply, _ = cnn(key=jax.random.key(0), **shape)  # one function for all seeds compiles once

    def edit_key(seed: int):
        return jax.random.fold_in(jax.random.key(seed), 2)

    tried = {name: {} for name in TASKS}
    if given.tuned:
        tried = json.loads(given.tuned.read_text())["tuning"]
    grids = {name: {m: grid_of(name, m) for m in METHODS} for name in TASKS}
    if any([s for s, _ in tried[n].get(m, [])] != grids[n][m] for n in TASKS for m in METHODS):
        tuning = scenes(apply, rows, test, protocol, shape, seed=TUNING_SEED, label=TUNING_CLASS)
        for name, task, retrained in tuning:
            try_grids(
                task, retrained, grids[name], tried[name], protocol, key=edit_key(TUNING_SEED)
            )
    settings = {
        name: {m: min(tried[name][m], key=lambda pair: pair[1])[0] for m in METHODS}
        for name in TASKS
    }
    print("settings:", settings, flush=True)
    found = {name: [] for name in TASKS}
    for seed in range(given.seeds):
        runs = scenes(apply, rows, test, protocol, shape, seed=seed, label=seed % 10)
        for name, task, retrained in runs:
            chosen = [(m, METHODS[m], settings[name][m]) for m in METHODS]
            judged = unlearn_and_judge(task, retrained, chosen, protocol, key=edit_key(seed))
            found[name].append({m: measured(j, judged["retrained"]) for m, j in judged.items()})
            gaps = {m: round(row["gap"], 2) for m, row in found[name][-1].items()}
            print(f"seed {seed}, {name}: gaps {gaps}", flush=True)
        # After each seed, so that a run broken off has its numbers too.
        tables = {name: summary(found[name], settings[name]) for name in TASKS}
        sizes = {"training rows": len(rows.labels), "test rows": len(test.labels)}
        numbers = {**sizes, "protocol": str(protocol), "tables": tables, "tuning": tried}
        write("vision", given.out, numbers)
    for name in TASKS:
        show(name, tables[name])


if __name__ == "__main__":
    main()

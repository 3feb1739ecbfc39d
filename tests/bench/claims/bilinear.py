"""Claims: bilinear structure cures the reversal curse, and edits propagate (arXiv 2509.21993).

    python -m tests.bench.claims.bilinear [--seeds 3] [--quick]

A GPT of two blocks learns a hundred families by heart, of half of which no father and no mother is
ever named. Asked for are these, whose reverse it has seen; relational probes of its states on
families they were not fitted to; and what follows from a fact that is rewritten, by every method at
the strength that brings the new fact to a loss of 0.2 (`bilinear_edits`). By weight decay, each at
two learning rates, and of the cure by reversed text.

Numbers of one seed and one training are kept in out/claims/bilinear-SEED-TRAINING.json, and are not
made again at the same settings.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jedit.data.invented.families import BROTHER, HUSBAND, SISTER, WIFE
from jedit.recipes.scenes.families import LAYERS, RIDGES, Room, Size, Training, probed, room
from tests.bench.claims import bilinear_edits
from tests.bench.claims.bilinear_edits import edits, measured, sets_of
from tests.bench.claims.evidence import kept, known_interval, parser, shown, write

NAME = "bilinear"
LOW, HIGH = 3e-3, 6e-3
TRAININGS = {
    "decay 0": Training(0.0, HIGH),
    "decay 3": Training(3.0, HIGH),
    "decay 0, reversed text": Training(0.0, HIGH, both_ways=True),
    "decay 0, rate 0.003": Training(0.0, LOW),
    "decay 3, rate 0.003": Training(3.0, LOW),
    "decay 1": Training(1.0, HIGH),
}
EDITED = ("decay 0", "decay 3")
PLAIN, DECAYED = "decay 0", "decay 3"
CASES = 10
QUICK = Size(families=8, width=32, layers=2, steps=300, batch_size=64)
ONE_TO_ONE = (HUSBAND, WIFE, SISTER, BROTHER)  # whose transposed operators have one answer
SCORES = ("generalisation", "reverse", "onto new", "of others", "locality", "elsewhere", "price")


def of_training(seed: int, name: str, *, quick: bool, out: Path) -> dict[str, Any]:
    """All numbers of one seed and one training, made or read."""
    size, training = (QUICK if quick else Size()), TRAININGS[name]
    cases = (2 if quick else CASES) if name in EDITED else 0
    settings = settings_of(size, training, cases)
    stem = "".join(c if c.isalnum() else "-" for c in name)
    path = out / f"{NAME}-{seed}-{stem}{'-quick' * quick}.json"
    return kept(path, settings, lambda: numbers_of(seed, training, size, cases))


def settings_of(size: Size, training: Training, cases: int) -> dict[str, Any]:
    """All that decides a training's numbers."""
    return {
        "size": size,
        "training": training,
        "cases": cases,
        "edits": [
            *(bilinear_edits.TARGET, bilinear_edits.STRENGTHS, bilinear_edits.RATES),
            *(bilinear_edits.STEPS, bilinear_edits.ENERGY, bilinear_edits.DAMPING),
            *(bilinear_edits.SAMPLES, bilinear_edits.TEMPERATURES, str(bilinear_edits.SEARCH)),
            bilinear_edits.DOWN,
        ],
        "probes": [LAYERS, RIDGES, ONE_TO_ONE],
    }


def numbers_of(seed: int, training: Training, size: Size, cases: int) -> dict[str, Any]:
    """Train one model, ask it, probe it and edit it."""
    found = room(seed, training, size)
    record = asked(found)
    print(f"seed {seed}, {training}: {record}", file=sys.stderr, flush=True)
    if not cases:
        return record
    sets = sets_of(found, cases, seed=seed)
    record["edits"] = {}
    key = jax.random.fold_in(jax.random.key(seed), 9)
    for name, made in edits(found, sets, key=key):
        record["edits"][name] = measured(found, sets, made)
        print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
    return record


def asked(found: Room) -> dict[str, Any]:
    """What a model says of trained and withheld facts, and what its best probe finds."""
    families = found.families
    probe = probed(found)
    structure = probe.structure
    return {
        "trained": found.said(families.facts[~families.is_withheld]),
        "reversal": found.said(families.facts[families.is_withheld]),
        "direct": float(structure.direct.mean()),
        "transposed": float(structure.transposed[list(ONE_TO_ONE)].mean()),
        "composed": float(np.mean(list(structure.composed.values()))),
        "probe": [probe.layer, probe.ridge],
    }


def of_method(record: dict[str, Any], method: str) -> dict[str, float]:
    """One method's means over the cases that it brought to the target."""
    made = record["edits"][method]
    means = {f: float(np.mean(made["cases"][f])) if made["cases"] else np.nan for f in SCORES}
    return {"reached": made["reached"], **means}


def over_seeds(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The interval of every number over the seeds that have one, and how many these are."""
    return {field: known_interval([row[field] for row in rows]) for field in rows[0]}


def summary(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Intervals over seeds: by training, by method, and of the paired gain by weight decay."""
    numbers = ("trained", "reversal", "direct", "transposed", "composed")
    models = {
        name: over_seeds([{n: record[n] for n in numbers} for record in rows])
        for name, rows in records.items()
    }
    methods = list(records[PLAIN][0]["edits"])
    by_method = {
        name: {m: over_seeds([of_method(record, m) for record in records[name]]) for m in methods}
        for name in EDITED
    }
    gained = {
        "reversal": _paired(records, lambda record: record["reversal"]),
        "direct": _paired(records, lambda record: record["direct"]),
        "transposed": _paired(records, lambda record: record["transposed"]),
        "composed": _paired(records, lambda record: record["composed"]),
    }
    for m in methods:
        for score in ("generalisation", "of others", "locality"):
            number = functools.partial(_of_all_cases, method=m, score=score)
            gained[f"{score}: {m}"] = _paired(records, number)
    return {"models": models, "edits": by_method, "gained by decay": gained}


def _paired(records: dict[str, list], number: Callable[[dict], float]) -> dict[str, Any]:
    """The difference between decay 3 and decay 0, over the seeds that have both."""
    pairs = zip(records[DECAYED], records[PLAIN], strict=True)
    return known_interval([number(a) - number(b) for a, b in pairs])


def _of_all_cases(record: dict[str, Any], method: str, score: str) -> float:
    """A method's mean where it brought every case to the target; of other cases it is no pair."""
    found = of_method(record, method)
    return found[score] if found["reached"] == 1 else np.nan


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print("| training | trained facts | withheld facts | direct | transposed | composed |")
    print("|---" * 6 + "|")
    for name, row in found["models"].items():
        print(f"| {name} | {' | '.join(shown(cell, 2) for cell in row.values())} |")
    for name, methods in found["edits"].items():
        print(f"\n{name}\n")
        print(f"| method | reached | {' | '.join(SCORES)} |")
        print("|---" * (2 + len(SCORES)) + "|")
        for method, row in methods.items():
            cells = [shown(cell, 2) if cell["seeds"] else "-" for cell in row.values()]
            print(f"| {method} | {' | '.join(cells)} |")
    print("\n| decay 3 less decay 0 | difference | seeds |\n|---|---|---|")
    for name, cell in found["gained by decay"].items():
        print(f"| {name} | {shown(cell, 2) if cell['seeds'] else '-'} | {cell['seeds']} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds, print the tables, write the numbers."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, for the test alone")
    options.add_argument("--only", type=int, help="make this seed's numbers and no table")
    given = options.parse_args(arguments)
    seeds = range(given.seeds) if given.only is None else [given.only]
    records = {
        name: [of_training(seed, name, quick=given.quick, out=given.out) for seed in seeds]
        for name in TRAININGS
    }
    if given.only is not None:
        return 0
    found = summary(records)
    show(found)
    print(write(NAME, given.out, found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

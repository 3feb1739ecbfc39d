"""Claim: relearning undoes a natural edit. In which directions does the knowledge come back?

    python -m tests.bench.claims.persistence --data DIR [--first 1 --seeds 3] [--strict]

The natural edit of `grids.py`, at 48 falling steps of 1e-4, is attacked as TOFU's models are: every
sixth row is taught for 20 updates of Adam at 3e-4 (harmful), or rows of world facts are (benign).
Edit Δ and attack δ are taken apart in the eigenbasis of the retain curvature, into four bands of
coordinates by their eigenvalue: the top hundredth, the next tenth, the next two fifths, the lower
half.  By band, as shares of the whole:

    length, price   of the edit: |Δ_b|² and Δ_bᵀ F Δ_b
    attack          |δ_b|²; undone: -⟨δ_b, Δ_b⟩ / |Δ_b|², 1 where the attack takes the edit back
    edit alone      probability of the forget answers under θ₀ + Δ_b
    attack alone    the same under θ₀ + Δ + δ_b: what this part of the attack brings back
    edit without    the same under θ₀ + Δ - Δ_b, and attacked: when that model is taught

`not covered` is of the parameters that the curvature leaves out; the last rows are of the whole
edit and of the retrained model under the same attacks.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit import Edit, apply_edit
from jedit.attacks import relearn
from jedit.curvature import Curvature, eigenvalues, rotate
from jedit.edits import edit_between
from jedit.recipes.tofu.attacks import RELEARN_STEPS, RELEARNING_RATE, lessons_of, probability_of
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import read_sets
from tests.bench.claims.evidence import interval, shown, write
from tests.bench.claims.grids import LOOKS, NATURAL, Setup
from tests.bench.claims.natural import tofu_parser

BANDS = {"top hundredth": 0.01, "next tenth": 0.11, "next two fifths": 0.51, "lower half": 1.0}
OUTSIDE = "not covered"  # parameters that the curvature, and so the edit, leaves alone
SETTING, RATE = 0.04, 1e-4
Coordinates = dict[str, np.ndarray]


class Bands:
    """The eigenbasis of a curvature, cut by eigenvalue into bands of coordinates."""

    def __init__(self, curvature: Curvature):
        self.curvature = curvature
        self.values = {name: np.asarray(eigenvalues(curvature, name)) for name in curvature.blocks}
        rising = np.sort(np.concatenate([v.ravel() for v in self.values.values()]))[::-1]
        ends = [rising[max(round(share * len(rising)), 1) - 1] for share in BANDS.values()]
        bounds = zip([np.inf, *ends[:-1]], ends, strict=True)
        self.masks = {
            band: {name: (v < high) & (v >= low) for name, v in self.values.items()}
            for band, (high, low) in zip(BANDS, bounds, strict=True)
        }

    def coordinates(self, change: Mapping[str, Array]) -> Coordinates:
        """Return a change of parameters, by path, in the eigenbasis."""
        found = {}
        for name, block in self.curvature.blocks.items():
            matrix = block.weight.gather(change)
            found[name] = np.asarray(rotate(self.curvature, name, matrix))
        return found

    def part(self, coordinates: Coordinates, band: str) -> dict[str, Array]:
        """Return what of a change lies in a band, by path."""
        change = {}
        for name, block in self.curvature.blocks.items():
            kept = jnp.asarray(np.where(self.masks[band][name], coordinates[name], 0))
            change |= block.weight.scatter(rotate(self.curvature, name, kept, back=True))
        return change

    def dot(self, x: Coordinates, y: Coordinates, band: str, *, priced: bool = False) -> float:
        """Return the inner product within a band, in the metric of the curvature if priced."""
        weights = self.values if priced else dict.fromkeys(self.values, 1)
        return sum(
            float(np.sum(np.where(mask, x[name] * y[name] * weights[name], 0)))
            for name, mask in self.masks[band].items()
        )


class Attack:
    """Relearning of a sixth of the forget rows, or of other rows, and what the others come to."""

    def __init__(self, setup: Setup):
        lessons, others = lessons_of(setup.scene.asked)
        self.lessons = {
            kind: setup.model.encode([(row.question, row.answer) for row in rows])
            for kind, rows in lessons.items()
        }
        self.known = probability_of(setup.model, others)
        self.apply, self.seed = setup.model.apply, setup.seed
        self.optimizer = optax.adam(RELEARNING_RATE)

    def __call__(self, params: PyTree, kind: str = "harmful") -> PyTree:
        """Return the parameters after the attack."""
        return relearn(
            self.apply,
            params,
            self.lessons[kind],
            optimizer=self.optimizer,
            looks=(RELEARN_STEPS,),
            measure=lambda _: 0,
            key=jax.random.fold_in(jax.random.key(self.seed), 3),
        ).params


def measured(setup: Setup) -> dict[str, dict[str, float]]:
    """Take the edit and the attack of a seed apart."""
    original = setup.task.original
    ((_, edited),) = setup.models(NATURAL, SETTING, RATE, LOOKS[-1:])
    attack = Attack(setup)
    again = attack(edited)
    curvature = setup.material("NPO (natural)").curvature
    assert curvature is not None
    bands = Bands(curvature)
    change = edit_between(edited, again).blocks
    edit = bands.coordinates(edit_between(original, edited).blocks)
    back = bands.coordinates(change)
    covered = {path for block in curvature.blocks.values() for path in block.weight.paths}
    outside = {path: x for path, x in change.items() if path not in covered}
    sums = {
        "length": {band: bands.dot(edit, edit, band) for band in BANDS},
        "price": {band: bands.dot(edit, edit, band, priced=True) for band in BANDS},
        "attack": {band: bands.dot(back, back, band) for band in BANDS},
    }
    away = sum(float(np.sum(np.square(x))) for x in outside.values())
    sums["attack"] |= {OUTSIDE: away}
    found: dict[str, dict[str, float]] = {}
    for band in BANDS:
        mine, theirs = (Edit(bands.part(x, band)) for x in (edit, back))
        less = apply_edit(edited, mine, -1.0)
        found[band] = {name: by[band] / sum(by.values()) for name, by in sums.items()} | {
            "undone": -bands.dot(back, edit, band) / sums["length"][band],
            "edit alone": attack.known(apply_edit(original, mine)),
            "attack alone": attack.known(apply_edit(edited, theirs)),
            "edit without": attack.known(less),
            "attacked": attack.known(attack(less)),
        }
    found[OUTSIDE] = {
        "attack": away / sum(sums["attack"].values()),
        "attack alone": attack.known(apply_edit(edited, Edit(outside))),
    }
    undone = -sum(bands.dot(back, edit, band) for band in BANDS) / sum(sums["length"].values())
    for name, params in (("whole", edited), ("retrained", setup.task.retrained)):
        found[name] = {
            "edit alone": attack.known(params),
            "attacked": attack.known(attack(params)),
            "benign": attack.known(attack(params, "benign")),
        }
    found["whole"]["undone"] = undone
    return found


COLUMNS = ("length", "price", "attack", "undone", "edit alone", "attack alone", "edit without")
COLUMNS += ("attacked", "benign")


def main() -> None:
    """Run the seeds and write what came out."""
    options = tofu_parser(__doc__, seeds=3)
    options.add_argument("--strict", action="store_true", help="hold six authors out of all")
    given = options.parse_args()
    sets, runs = read_sets(given.data, PRESETS["cpu"]), []
    for seed in range(given.first, given.first + given.seeds):
        runs.append(measured(Setup(sets, seed, given.out, is_strict=given.strict)))
        print(json.dumps({"seed": seed, **runs[-1]}), flush=True)
    summary: dict[str, Any] = {}
    print("|  | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (1 + len(COLUMNS)) + "|")
    for name, first in runs[0].items():
        summary[name] = {c: interval([run[name][c] for run in runs]) for c in first}
        cells = [shown(summary[name][c]) if c in first else "" for c in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    write("persistence", given.out, {"runs": runs, "summary": summary})


if __name__ == "__main__":
    main()

"""Claim: of nine methods at 27 points each, which pass TOFU's Forget Quality, and at what cost?

    python -m tests.bench.claims.grids choose --data DIR [--methods NPO ...]
    python -m tests.bench.claims.grids report --data DIR [--first 1 --seeds 5] [--strict] [--quick]

`choose` runs three settings at three rates with looks after 12, 24 and 48 steps on a validation
seed, 0, in the field's protocol, in which methods see all retain rows.  `report` takes each
method's best point by the recipe's rule (the greatest utility above Forget Quality 0.05, of the
points that keep four fifths of the untouched model's; the greatest Forget Quality where none
passes) and measures it on other seeds in full; `--strict` holds six authors out of their sight,
`--quick` measures only what points are chosen by.
Points are appended to `out/claims/grids.jsonl`, and what stands there is not run again, so that
several processes can share the work.  The models are those of `natural.py`.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jedit import Natural, Recovery, apply_edit, metrics
from jedit.data import batches
from jedit.methods import natural
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Material, Need
from jedit.objectives import GA, NPO, RMU, UNDIAL, RetainStates, SimNPO, with_retain
from jedit.recipes.comparison.compare import fit_material, material_of
from jedit.recipes.comparison.trajectories import destroyed, start_at
from jedit.recipes.tofu.attacks import attack
from jedit.recipes.tofu.depth import Three, depth_of
from jedit.recipes.tofu.evaluation import truth_ratios
from jedit.recipes.tofu.log import aggregates
from jedit.recipes.tofu.membership import Answers, encode_answers, reference_of
from jedit.recipes.tofu.presets import PRESETS
from jedit.recipes.tofu.run import Sets, compare_key, evaluate, read_sets
from jedit.recipes.tofu.sweep import best_of
from jedit.report.results import PASSING_QUALITY
from jedit.tracing import Entering
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from jedit.training.watch import History
from jedit.transforms import falling
from tests.bench.claims.evidence import interval, shown, write
from tests.bench.claims.natural import product, rewinding, scene_of, tofu_parser

LOOKS = (12, 24, 48)
SHARE = 0.8  # of the untouched utility, that a point has to keep
LOST_KL = 2.0  # nats; no point that far off kept four fifths
VALIDATION = 0
UNTOUCHED = "untouched"
# Beside the chosen points, natural NPO and its recovery by the product, alone and after a rewind:
# its share of the way, and its part of retraining's steps.
PRODUCTS = {"forget": None, "forget, rewound": (0.3, 0.2), "forget, rewound far": (0.6, 0.4)}
FULL, QUICK = "report", "quick"  # kinds of records
ADAM, LENGTH, PRICE = (1e-4, 3e-4, 1e-3), (0.03, 0.1, 0.3), (5e-5, 1e-4, 2e-4)


class Tried(NamedTuple):
    """A method's settings and rates, and how it is made of a task's material at one of each."""

    row: str
    settings: tuple[float, ...]
    rates: tuple[float, ...]
    make: Callable[[Material, float, float], TrainingMethod]


def _adam(objective) -> Callable[[Material, float, float], TrainingMethod]:
    return lambda material, setting, _: TrainingMethod(objective(setting), material.optimizer)


def _natural(material: Material, beta: float, rate: float) -> TrainingMethod:
    # Steps of one length walk around; these fall to nothing over the longest run.
    price = falling(rate, LOOKS[-1])
    curvature = material.take(Need.CURVATURE)
    return natural(with_retain(NPO(beta=beta)), curvature, predicted_kl=price)


def _rmu(material: Material, steering: float, rate: float) -> TrainingMethod:
    del rate
    hidden = Entering(material.take(Need.HIDDEN_SITE))
    objective = with_retain(RMU(hidden, seed=0, steering=steering), RetainStates(hidden))
    return TrainingMethod(objective, material.optimizer)


def _of(row: str, name: str) -> Callable[[Material, float, float], Any]:
    return lambda material, setting, _: CATALOGUE[row].of(material, **{name: setting})


NATURAL = "natural NPO"
METHODS = {
    NATURAL: Tried("NPO (natural)", (0.02, 0.04, 0.1), PRICE, _natural),
    "NPO": Tried("NPO", (0.02, 0.04, 0.1), ADAM, _of("NPO", "beta")),
    "AltPO": Tried("AltPO", (0.05, 0.1, 0.5), ADAM, _of("AltPO", "beta")),
    "SimNPO": Tried("SimNPO", (2.5, 4.5, 9.0), ADAM, _adam(lambda b: with_retain(SimNPO(beta=b)))),
    "GradDiff": Tried(
        "GradDiff", (0.1, 0.3, 1.0), ADAM, _adam(lambda w: with_retain(GA(), forget_weight=w))
    ),
    "UNDIAL": Tried(
        "UNDIAL", (3.0, 10.0, 30.0), ADAM, _adam(lambda b: with_retain(UNDIAL(beta=b)))
    ),
    "RMU": Tried("RMU", (2.0, 5.0, 10.0), ADAM, _rmu),
    "RepSelect": Tried("RepSelect", (0.03, 0.125, 0.3), LENGTH, _of("RepSelect", "share")),
    "PDU": Tried("PDU", (0.3, 0.6, 1.2), ADAM, _of("PDU", "tolerance")),
}


class Setup:
    """A scene with what its methods are made of, and what judges their models."""

    def __init__(self, sets: Sets, seed: int, out: Path, *, is_strict: bool):
        self.sets, self.seed, self.is_strict = sets, seed, is_strict
        self.scene, _ = scene_of(sets, seed, out)
        self.model, self.task = self.scene.model, self.scene.task
        if not is_strict:
            rows = self.model.encode([(r.question, r.answer) for r in sets.kept])
            self.task = self.task._replace(retain=rows)
        self.reference = truth_ratios(self.model, self.task.retrained, self.scene.asked["forget"])
        assert self.task.pack is not None
        self.held = list(batches(self.task.pack(self.task.heldout), self.model.chunk))
        self.unseen = encode_answers(self.model, sets.holdout)

    @functools.cache  # noqa: B019 - as many as there are seeds
    def material(self, row: str) -> Material:
        """What a row of the catalogue is made of."""
        grid = PRESETS["cpu"].grid._replace(looks=LOOKS)
        key = jax.random.fold_in(compare_key(self.seed), 0)
        found = fit_material(self.task, grid, [CATALOGUE[row]], key=key, say=_say)
        return material_of(self.task, grid, found)

    def models(
        self, name: str, setting: float, rate: float, looks: tuple[int, ...]
    ) -> list[tuple[int, PyTree]]:
        """The number of steps and the model at each look of one run."""
        tried, task = METHODS[name], self.task
        row, material = CATALOGUE[tried.row], self.material(tried.row)
        method = tried.make(material, setting, rate)._replace(batch_size=16)
        found = []

        def look(state: LoopState, history: History) -> None:
            del history
            if state.step in looks:
                found.append((state.step, jax.tree.map(jnp.copy, state.params)))

        forget = jax.tree.map(jnp.asarray, row.forget_rows(material))
        start = start_at(method, task.original, rate)
        key = jax.random.fold_in(compare_key(self.seed), 1)
        watch = Watch(look, math.gcd(*looks))
        try:
            steps = looks[-1]
            unlearn(
                method, task.apply, start, forget, task.retain, steps=steps, key=key, watch=watch
            )
        except FloatingPointError:  # the rate was too large
            lost = destroyed(task.original)
            found += [(steps, lost) for steps in looks[len(found) :]]
        return found

    def product(self, rewind: tuple[float, float] | None = None) -> PyTree:
        """The model that `forget` makes."""
        where, how = (self.scene, self.sets, self.seed), {}
        if rewind is not None:
            after = Natural(
                predicted_kl=3e-4,
                batch_size=8,
                recovery=Recovery(24),
                rewind=rewinding(*where, *rewind),
            )
            how = {"method": after, "steps": 24}
        edit, _ = product(*where, is_strict=self.is_strict, **how)
        return jax.tree.map(jnp.asarray, apply_edit(self.task.original, edit))

    def cheaply(self, params) -> dict[str, float]:
        """What chooses a point; no utility of a model that is lost."""
        ratios = truth_ratios(self.model, params, self.scene.asked["forget"])
        kl = float(metrics.output_kl(self.model.apply, self.task.original, params, self.held))
        is_lost = not kl < LOST_KL
        assert self.task.utility is not None
        return {
            "quality": 0.0 if is_lost else metrics.forget_quality(ratios, self.reference),
            "utility": 0.0 if is_lost else self.task.utility(params),
            "kl": kl,
        }

    def wholly(self, params) -> dict[str, float]:
        """Every number of the leaderboard, with the depth score and the attacks."""
        model, asked, task = self.model, self.scene.asked, self.task
        reference = reference_of(model, task.retrained, asked["forget"], self.unseen)
        found, log = evaluate(model, params, asked, self.unseen, reference)
        found["paraphrased_probability"] = log["forget_Q_A_PARA_Prob"].aggregate or 0.0
        three = Three(task.original, params, task.retrained)
        known = Answers(self.sets.forget, asked["forget"].answers)
        depth = depth_of(model, three, known, self.scene.stream).aggregate
        key = jax.random.fold_in(jax.random.key(self.seed), 3)
        kl = float(metrics.output_kl(model.apply, task.original, params, self.held))
        attacked = attack(model, params, task, asked, key=key)
        return found | attacked | {"depth_score": depth or 0.0, "kl": kl}


def _say(text: str, *_: Any, **__: Any) -> None:
    print(text, file=sys.stderr, flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    _say(json.dumps(record))


def choose(setup: Setup, methods: list[str], path: Path) -> None:
    """Run what of the grid does not stand in the file yet."""
    grid = [r for r in _read(path) if r["kind"] == "grid"]
    # A run that was broken off is made again.
    known = {(r["method"], r["setting"], r["rate"]) for r in grid if r["steps"] in (0, LOOKS[-1])}
    if (UNTOUCHED, None, None) not in known:
        where = {"method": UNTOUCHED, "setting": None, "rate": None, "steps": 0}
        _append(path, {"kind": "grid", **where, **setup.cheaply(setup.task.original)})
    for name in methods:
        tried = METHODS[name]
        for setting in tried.settings:
            for rate in tried.rates:
                if (name, setting, rate) in known:
                    continue
                for steps, params in setup.models(name, setting, rate, LOOKS):
                    where = {"method": name, "setting": setting, "rate": rate, "steps": steps}
                    _append(path, {"kind": "grid", **where, **setup.cheaply(params)})


def report(
    setup: Setup, names: list[str], chosen: dict[str, dict], protocol: str, path: Path, kind: str
) -> None:
    """Measure methods at their points, and two references, on a seed; quickly, or in full."""
    known = {(r["method"], r["seed"], r["protocol"]) for r in _read(path) if r["kind"] == kind}
    for name in (UNTOUCHED, "retrained", *names):
        if (name, setup.seed, protocol) in known:
            continue
        if name in chosen:
            setup.material(METHODS[name].row)  # the fit is not in a method's seconds
        start = time.perf_counter()
        if name in PRODUCTS:
            params = setup.product(PRODUCTS[name])
        elif name in chosen:
            point = chosen[name]
            looks = (point["steps"],)
            ((_, params),) = setup.models(name, point["setting"], point["rate"], looks)
        else:
            params = setup.task.original if name == UNTOUCHED else setup.task.retrained
        where = {"kind": kind, "method": name, "seed": setup.seed, "protocol": protocol}
        jax.block_until_ready(params)
        if name in (*chosen, *PRODUCTS):
            where["seconds"] = time.perf_counter() - start
        _append(path, {**where, **(setup.cheaply if kind == QUICK else setup.wholly)(params)})


COLUMNS = {
    "quality": "forget_quality",
    "utility": "model_utility",
    "KL": "kl",
    "extraction strength": "extraction_strength",
    "paraphrased probability": "paraphrased_probability",
    "free recall": "forget_Q_A_ROUGE",
    "depth": "depth_score",
    "memorisation": "memorization_score",
    "privacy": "privacy_score",
    "overall": "overall_score",
    "relearned": "relearned_harmful",
    "benign": "relearned_benign",
    "probe": "probe_accuracy",
    "seconds": "seconds",
}


def quick_table(records: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    """Print what points are chosen by, over the seeds; return it."""
    rows = [r for r in records if r["kind"] == QUICK and r["protocol"] == protocol]
    print("| method | passes | quality of each seed | median | utility | KL |")
    print("| --- | --- | --- | --- | --- | --- |")
    summary = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((r for r in rows if r["method"] == name), key=lambda r: r["seed"])
        qualities = [row["quality"] for row in mine]
        found = {c: interval([row[c] for row in mine]) for c in ("utility", "kl")}
        passes = sum(quality > PASSING_QUALITY for quality in qualities)
        median = float(np.median(qualities))
        each = " / ".join(f"{quality:.2g}" for quality in qualities)
        cells = f"{median:.2g} | {shown(found['utility'])} | {shown(found['kl'])}"
        print(f"| {name} | {passes} of {len(mine)} | {each} | {cells} |")
        summary[name] = found | {"qualities": qualities, "median": median}
    return summary


def table(records: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    """Print mean and 95% interval of every column by method; return them."""
    rows = [r for r in records if r["kind"] == FULL and r["protocol"] == protocol]
    by = {
        (r["method"], r["seed"]): {name: x for name, x in r.items() if isinstance(x, float)}
        for r in rows
    }
    for (_, seed), row in by.items():
        row |= aggregates(row, by[UNTOUCHED, seed], by["retrained", seed])
    print("|  | passes | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    summary = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for (method, _), row in by.items() if method == name]
        passes = sum(row["forget_quality"] > PASSING_QUALITY for row in mine)
        summary[name] = {
            title: interval([row[column] for row in mine if column in row])
            for title, column in COLUMNS.items()
            if any(column in row for row in mine)
        }
        median = float(np.median([row["forget_quality"] for row in mine]))
        summary[name] |= {"passes": passes, "median quality": median}
        found = [shown(summary[name][c]) if c in summary[name] else "" for c in COLUMNS]
        found[0] = f"{median:.2g}"
        print(f"| {name} | {passes} of {len(mine)} | " + " | ".join(found) + " |")
    return summary


def main() -> None:
    """Choose, or report."""
    options = tofu_parser(__doc__)
    options.add_argument("what", choices=("choose", "report"))
    every = [*METHODS, *PRODUCTS]
    options.add_argument("--methods", nargs="+", default=every, choices=every)
    options.add_argument("--strict", action="store_true", help="hold six authors out of all")
    options.add_argument("--quick", action="store_true", help="only what points are chosen by")
    given = options.parse_args()
    sets, path = read_sets(given.data, PRESETS["cpu"]), given.out / "grids.jsonl"
    if given.what == "choose":
        setup = Setup(sets, VALIDATION, given.out, is_strict=given.strict)
        choose(setup, [name for name in given.methods if name in METHODS], path)
        return
    points = (r for r in _read(path) if r["kind"] == "grid")
    # The last of those that a broken-off run left twice.
    grid = list({(r["method"], r["setting"], r["rate"], r["steps"]): r for r in points}.values())
    untouched = next(r["utility"] for r in grid if r["method"] == UNTOUCHED)
    chosen = {
        name: best_of([r for r in grid if r["method"] == name], untouched, SHARE)
        for name in given.methods
        if name in METHODS
    }
    protocol = "strict" if given.strict else "field"
    kind = QUICK if given.quick else FULL
    for seed in range(given.first, given.first + given.seeds):
        setup = Setup(sets, seed, given.out, is_strict=given.strict)
        report(setup, given.methods, chosen, protocol, path, kind)
    summary = (quick_table if given.quick else table)(_read(path), protocol)
    write(f"grids-{kind}-{protocol}", given.out, {"chosen": chosen, "summary": summary})


if __name__ == "__main__":
    main()

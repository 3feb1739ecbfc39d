"""Claims: how narrow is the unlearning of one task, of many that a small language model answers?

    python -m tests.bench.claims.narrow [--seeds 3] [--quick]

A GPT of a tenth of a million parameters answers twelve invented tasks by yes or no
(`jedit.data.invented.token_tasks`). 512 of a task's 2,000 rows are unlearned; what is said below is
of rows that nobody trained on. Tasks that were not learnt to 60% are left out.

    generalises   Random labels, each yes or no by a coin, on which 64 steps of Adam are taken at
                  1e-3 without anything that protects others (arXiv 2409.02228), make some tasks
                  forgotten on unseen rows and hardly others: over the tasks the forget ratio ranges
                  from below 0.1 to above 0.5. A task counts where the whole 95% interval of its
                  ratio over the rows lies there.
    predictors    The forget ratio falls with the model's confidence and with the trace of its
                  hidden states' covariance: both rank correlations over the tasks are below 0. The
                  states are those that enter the head, and, beside them, those that enter the last
                  matrix of the last block, which no norm holds at one length.
    probe         After random labels a linear probe of the hidden states still reads the task,
                  better than the model says it.
    nearness      (ours) Other tasks lose the more, the nearer their hidden states are to those of
                  the task unlearned.
    geometry      (ours) Where half of a task is forgotten, K-FADE and natural steps cost the other
                  tasks less than random labels, NPO and random labels with the retain loss do.
                  Each is tried at 15 settings; of those that forget half of the task on rows for
                  choosing the one is taken that costs others least there, and judged on the rest.

Each seed's numbers are kept in `out`, and a second run takes them from there. `--tasks-only` leaves
the last claim out, which takes most of the time.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

import jedit
from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import choose_temperature, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data.invented.token_tasks import TASKS
from jedit.edits import apply_edit
from jedit.methods import CATALOGUE, Material
from jedit.methods.row import ADAM, BySteps
from jedit.objectives import RandomLabel, with_retain
from jedit.recipes.comparison.trajectories import ascend
from jedit.recipes.fitting import Recipe
from jedit.recipes.scenes import token_tasks as scene
from jedit.training import TrainingMethod, run_method
from tests.bench.claims.evidence import interval, kept, parser, shown, write

PRIMARY = 1e-3
BATCH = 64
TEMPERATURES = (1.0, 4.0)
HALF = 0.5
LEAST_LEARNT = 0.6
LOW, HIGH = 0.1, 0.5  # forget ratios below and above which a task is spared, or forgotten
NATURAL, KFADE = "NPO (natural)", "K-FADE (K-FAC)"


class Plan(NamedTuple):
    """What is tried: `FULL`, or `QUICK` for a test."""

    size: scene.Size = scene.Size(judged=200)
    looks: tuple[int, ...] = (4, 8, 16, 32, 64)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    step_kl: float = 1e-5
    budgets: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    compared: tuple[str, ...] = ("first", "majority", "repeat", "by heart")


FULL = Plan()
QUICK = Plan(
    size=scene.Size(32, 20, 16, 4, 16, 1, Recipe((2,), 32, 2e-3)),
    looks=(1, 2),
    rates=(1e-3,),
    budgets=(0.1,),
    dampings=(0.1,),
    compared=("first",),
)
Models = Iterator[tuple[str, PyTree]]


@functools.cache
def _estimator(apply: Any, temperature: float) -> Any:
    return kfac(apply, Categorical(temperature), select=scene.SELECT)


class Judged:
    """One seed's model, and what it knows after an edit."""

    def __init__(self, seed: int, plan: Plan):
        self.plan, self.room = plan, scene.room(seed, plan.size)
        self.key = jax.random.fold_in(jax.random.key(seed), 7)
        self.before = {part: self.room.hits(self.room.params, part) for part in ("choice", "test")}
        shares = self.before["choice"].mean(axis=1)
        # Of a toy nothing is asked.
        least = LEAST_LEARNT if plan is FULL else 0.0
        self.learnt = [t for t, share in zip(TASKS, shares, strict=True) if share > least]

    def key_of(self, task: str, purpose: int) -> Any:
        """A key of a task, by what it is for."""
        return jax.random.fold_in(jax.random.fold_in(self.key, TASKS.index(task)), purpose)

    def intervals(self, params: PyTree, part: str) -> dict[str, metrics.ForgetRatio]:
        """Forget ratios of the tasks that were learnt, with their intervals over the rows."""
        found = scene.forget_ratios(self.before[part], self.room.hits(params, part))
        return {task: found[task] for task in self.learnt}

    def ratios(self, params: PyTree, part: str) -> dict[str, float]:
        """Forget ratios of the tasks that were learnt."""
        return {task: found.value for task, found in self.intervals(params, part).items()}

    def says_coins(self, params: PyTree, task: str) -> float:
        """How many of the random labels a model says; 0.5 of them are right by chance."""
        rows = scene.by_random_labels(self.room, task, ADAM, key=self.key_of(task, 0))[1]
        return metrics.accuracy(self.room.apply, params, rows)

    def point(self, params: PyTree, task: str) -> dict[str, float]:
        """How much of a task is gone, and of the others on average, on both sets."""
        found = {}
        for part in ("choice", "test"):
            ratios = self.ratios(params, part)
            found[part] = ratios.pop(task)
            found[f"{part} others"] = float(np.mean(list(ratios.values())))
        return found

    def random_labels(self, task: str, rates: tuple[float, ...]) -> Iterator[list]:
        """The paper's method at some rates: at each look the steps, the seconds, the params."""
        room = self.room
        method, rows = scene.by_random_labels(
            room, task, ADAM, key=self.key_of(task, 0), batch_size=BATCH
        )
        return self._ascended(method, rows, room.sets(task)[1], task, rates)

    def _ascended(
        self, method: TrainingMethod, rows: Any, retain: Batch, task: str, rates: Any
    ) -> Iterator[list]:
        return ascend(
            method._replace(batch_size=BATCH),
            self.room.apply,
            self.room.params,
            rows,
            retain,
            learning_rates=rates,
            looks=self.plan.looks,
            key=self.key_of(task, 1),
        )

    def by_method(self, name: str, task: str) -> Models:
        """Every model that a method makes, with its setting."""
        plan, (forget, retain) = self.plan, self.room.sets(task)
        if name == "random labels":
            yield from _named(plan.rates, self.random_labels(task, plan.rates))
            return
        if name == "random labels, retain":
            rows = scene.by_random_labels(self.room, task, ADAM, key=self.key_of(task, 0))[1]
            method = TrainingMethod(with_retain(RandomLabel()), ADAM)
            yield from _named(plan.rates, self._ascended(method, rows, retain, task, plan.rates))
            return
        row = CATALOGUE[name]
        material = Material(self.room.apply, self.room.params, forget, retain=retain)
        if row.needs:
            curvature = self._curvature(retain, task)
            material = dataclasses.replace(material, curvature=curvature)
        if name == NATURAL:
            # One length of the steps, of which as many are taken as there are looks, by damping.
            for damping in plan.dampings:
                method, rates = row.of(material, damping=damping), (plan.step_kl,)
                found = self._ascended(method, forget, retain, task, rates)
                yield from ((f"{damping:g}, {at}", p) for at, p in _named(rates, found))
            return
        if isinstance(row, BySteps):
            method = row.of(material)
            yield from _named(plan.rates, self._ascended(method, forget, retain, task, plan.rates))
            return
        for damping in plan.dampings:
            for budget in plan.budgets:
                method = row.of(material, budget=budget, damping=damping)
                edit, _ = run_method(method, self.room.apply, self.room.params, forget, retain)
                yield f"{damping:g}, {budget:g}", apply_edit(self.room.params, edit)

    def _curvature(self, retain: Batch, task: str) -> jedit.Curvature:
        given = (self.room.apply, self.room.params, retain)
        temperature = choose_temperature(*given, among=TEMPERATURES)
        estimator = _estimator(self.room.apply, temperature)
        return jedit.estimate(estimator, self.room.params, [retain], key=self.key_of(task, 2))


def _named(rates: tuple[float, ...], found: Iterator[list]) -> Models:
    for rate, looks in zip(rates, found, strict=True):
        for steps, _, params in looks:
            yield f"{rate:g}, {steps} steps", params


METHODS = ("random labels", "random labels, retain", "NPO", NATURAL, KFADE)


def of_tasks(judged: Judged) -> dict[str, Any]:
    """What random labels do to each task, and what is known of it before."""
    room, plan = judged.room, judged.plan
    accuracy = dict(zip(TASKS, judged.before["test"].mean(axis=1).tolist(), strict=True))
    free = scene.predictors(room, hidden=scene.unnormed(plan.size))
    tasks = {}
    for task, about in scene.predictors(room).items():
        if task not in judged.learnt:
            continue
        ends = {}
        for rate, looks in zip(plan.rates, judged.random_labels(task, plan.rates), strict=True):
            ends[f"{rate:g}"] = looks[-1][2]
        params = ends[f"{PRIMARY:g}"]
        others = {
            name: parts["train"]
            for name, parts in room.rows.items()
            if name != task and name in judged.learnt
        }
        near = metrics.nearness(
            room.apply, room.params, room.sets(task)[0], others, hidden=scene.HIDDEN
        )
        readings = [scene.read_by_probe(room, p, task) for p in (room.params, params)]
        tasks[task] = {
            "accuracy": accuracy[task],
            **about._asdict(),
            "unnormed_variance": free[task].hidden_variance,
            "ratios": judged.ratios(params, "test"),
            "by rate": {r: judged.intervals(p, "test")[task] for r, p in ends.items()},
            "coins": {r: judged.says_coins(p, task) for r, p in ends.items()},
            "nearness": near,
            "probe": [reading.probe.accuracy for reading in readings],
            "said": [reading.said for reading in readings],
        }
        print(task, round(tasks[task]["ratios"][task], 3), flush=True)
    return {"accuracy": accuracy, "tasks": tasks}


def of_points(judged: Judged) -> dict[str, Any]:
    """What every setting of every method does to a task and to the others."""
    plan, points = judged.plan, {}
    for task in (task for task in plan.compared if task in judged.learnt):
        for name in METHODS:
            made = [(at, judged.point(p, task)) for at, p in judged.by_method(name, task)]
            points[f"{name}: {task}"] = made
            print(name, task, chosen(made), flush=True)
    return {"points": points}


def chosen(points: list) -> tuple[str, dict[str, float]] | None:
    """The point that forgets half of the task at the least cost of the others, by choice rows."""
    enough = [p for p in points if p[1]["choice"] >= HALF]
    return min(enough, key=lambda p: p[1]["choice others"]) if enough else None


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every claim's numbers, as intervals over the seeds."""
    found: dict[str, Any] = {"tasks": {}, "claims": {}, "methods": {}}
    for task in TASKS:
        of_task = [run["tasks"][task] for run in runs if task in run["tasks"]]
        if not of_task:
            continue
        columns = {
            "accuracy": [x["accuracy"] for x in of_task],
            "confidence": [x["confidence"] for x in of_task],
            "hidden variance": [x["hidden_variance"] for x in of_task],
            "forget ratio": [x["ratios"][task] for x in of_task],
            **{f"at {r}": [x["by rate"][r][0] for x in of_task] for r in of_task[0]["by rate"]},
            "others": [_others(x, task) for x in of_task],
            "said after": [x["said"][1] for x in of_task],
            "probe after": [x["probe"][1] for x in of_task],
            "probe before": [x["probe"][0] for x in of_task],
        }
        found["tasks"][task] = {name: interval(values) for name, values in columns.items()}
    claims: dict[str, list[float]] = {}
    for run in runs:
        for name, value in claims_of(run).items():
            claims.setdefault(name, []).append(value)
    found["claims"] = {name: interval(values) for name, values in claims.items()}
    runs = [run for run in runs if "points" in run]
    costs = {name: [_cost(run, name) for run in runs] for name in METHODS}
    for name, values in costs.items():
        told = {k: [v[k] for v in values if k in v] for k in ("others", "task", "reached")}
        found["methods"][name] = {k: interval(v) for k, v in told.items() if v}
    found["differences"] = _differences(runs)
    return found


def claims_of(run: dict[str, Any]) -> dict[str, float]:
    """One seed's numbers of the claims about random labels."""
    tasks = run["tasks"]
    ratios = [x["ratios"][task] for task, x in tasks.items()]
    rates = next(iter(tasks.values()))["by rate"]
    by_rate = {rate: np.array([x["by rate"][rate] for x in tasks.values()]) for rate in rates}
    pairs = [
        metrics.rank_correlation([*near.values()], [x["ratios"][other] for other in near])
        for x in tasks.values()
        for near in [x["nearness"]]
    ]
    beyond = [x["probe"][1] - x["said"][1] for x in tasks.values()]
    read = [x["probe"][1] - x["probe"][0] for x in tasks.values()]
    found = {
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
        "probe less said, after": float(np.mean(beyond)),
        "probe after less before": float(np.mean(read)),
        "nearness with damage": float(np.mean(pairs)),
    }
    for rate, (value, low, high) in ((rate, x.T) for rate, x in by_rate.items()):
        # By their values, and by the whole interval of each.
        for what, least, most in (("", value, value), (", told from it", low, high)):
            found[f"tasks below {LOW} at {rate}{what}"] = float(np.sum(most < LOW))
            found[f"tasks above {HIGH} at {rate}{what}"] = float(np.sum(least > HIGH))
        coins = [x["coins"][rate] for x in tasks.values()]
        found[f"coins said at {rate}"] = float(np.mean(coins))
    for name in ("confidence", "hidden_variance", "unnormed_variance", "accuracy"):
        values = [x[name] for x in tasks.values()]
        for rate, other in by_rate.items():
            found[f"ratio at {rate} with {name}"] = metrics.rank_correlation(other[:, 0], values)
        sure = [x["accuracy"] > 0.95 for x in tasks.values()]
        few = [np.array(v)[sure] for v in (ratios, values)]
        found[f"ratio with {name}, tasks above 95%"] = metrics.rank_correlation(*few)
    confidence, free = ([x[n] for x in tasks.values()] for n in ("confidence", "unnormed_variance"))
    found["confidence with unnormed_variance"] = metrics.rank_correlation(confidence, free)
    return found


def _others(of_task: dict[str, Any], task: str) -> float:
    return float(np.mean([x for name, x in of_task["ratios"].items() if name != task]))


def _cost(run: dict[str, Any], name: str) -> dict[str, float]:
    """A method's chosen points, over the tasks that it forgets to the half."""
    found = [chosen(p) for key, p in run["points"].items() if key.startswith(f"{name}: ")]
    reached = [point for point in found if point is not None]
    told = {"reached": len(reached) / max(len(found), 1)}
    if reached:
        told["others"] = float(np.mean([p["test others"] for _, p in reached]))
        told["task"] = float(np.mean([p["test"] for _, p in reached]))
    return told


def _differences(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What each geometric method costs others less each of the rest, paired by task and seed."""
    found = {}
    for name in (NATURAL, KFADE):
        for other in METHODS:
            if other in (NATURAL, KFADE) or name not in METHODS:
                continue
            by_seed = []
            for run in runs:
                pairs = [
                    (chosen(run["points"][f"{name}: {t}"]), chosen(run["points"][f"{other}: {t}"]))
                    for t in dict.fromkeys(key.split(": ")[1] for key in run["points"])
                ]
                apart = [a[1]["test others"] - b[1]["test others"] for a, b in pairs if a and b]
                if apart:
                    by_seed.append(float(np.mean(apart)))
            if by_seed:
                found[f"{name} less {other}"] = interval(by_seed)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Intervals as a table in Markdown."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for name, row in rows.items():
        cells = [shown(row[c]) if c in row else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and write what came out."""
    options = parser(__doc__, seeds=3)
    options.add_argument("--quick", action="store_true", help="a toy, to see that it runs")
    options.add_argument("--tasks-only", action="store_true", help="leave the last claim out")
    given = options.parse_args(arguments)
    plan = QUICK if given.quick else FULL
    settings = {"plan": str(plan), "rate": PRIMARY, "batch": BATCH, "methods": METHODS}
    settings |= {"least learnt": LEAST_LEARNT, "temperatures": TEMPERATURES}
    settings |= {"hidden": str((scene.HIDDEN, scene.unnormed(plan.size))), "select": scene.SELECT}
    settings |= {"of methods": {n: dict(CATALOGUE[n].settings) for n in METHODS if n in CATALOGUE}}
    parts = {"tasks": of_tasks} if given.tasks_only else {"tasks": of_tasks, "points": of_points}
    runs = []
    for seed in range(given.seeds):
        judged = functools.cache(lambda seed=seed: Judged(seed, plan))  # trained where needed
        run: dict[str, Any] = {}
        for part, measure in parts.items():
            path = given.out / f"narrow-{part}-{'quick-' * given.quick}{seed}.json"
            run |= kept(path, settings, lambda measure=measure, made=judged: measure(made()))
        runs.append(run)
    found = summary(runs)
    for name in ("tasks", "methods"):
        print(table(found[name]), end="\n\n")
    for name in ("claims", "differences"):
        for what, value in found[name].items():
            print(f"{what}: {shown(value)} {np.round(value['values'], 3).tolist()}")
    write("narrow", given.out, {"summary": found})


if __name__ == "__main__":
    main()

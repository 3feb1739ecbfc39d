"""Claims on learning on: what keeps earlier tasks, on the way and at the end.

    python -m tests.bench.claims.consolidation [--seeds 5] [--quick]
    python -m tests.bench.claims.consolidation --mnist FOLDER --seeds 1 \\
        --scenes class domain noise --learners naive replay "null space"

Handwritten digits, or a part of MNIST, in five tasks: two new classes each, or all classes with the
pixels in another order, or all classes turned further, or all under more noise.  A perceptron of
64-64-32-10 (784-64-32-10 for MNIST) learns each by 60 updates and all
test sets are looked at after every one.  Every learner is tuned alike: the same learning rates,
four strengths where it has one, the best by final accuracy, mean over two seeds that are not
measured.  Claims, each over paired seeds:

    1  K-FAC's EWC keeps more at the end than the diagonal's
    2  Refresh learning keeps more at the end than the replay it is built on
    3  InTAct keeps more at the end than learning with nothing kept
    4  OGD's worst moment (min-ACC) is better than that of learning with nothing kept
    5  Steps off the inputs of earlier tasks: their worst moment is better than replay's
    6  and better than that of joint learning
    7  and they keep more at the end than replay

5 to 7 were thought of when seeds 0 to 2 had been seen, so that measured seeds are others.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jedit.curvature import diagonal, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import Images, by_class, by_domain, load_digits, load_mnist, split_digits
from jedit.data.task_streams import Guise
from jedit.models import mlp
from jedit.recipes import learners
from jedit.recipes.learning_on import Learner, accuracies, learn_on, stability
from jedit.report.figure import STYLES, save_png
from tests.bench.claims import evidence

SITES = ("layers/1/kernel", "layers/2/kernel")
HEAD = SITES[-1:]
FIRST_SEED = 10
REFRESH_WEIGHT = 2.0  # of the kept rows beside the new ones; replay's own is tuned
TUNING_SEEDS = (1000, 1001)  # two, since one that happens not to diverge recommends what does
SCENES = {
    "class": "two new classes a task",
    "domain": "all classes, pixels in another order",
    "rotation": "all classes, turned further",
    "noise": "all classes, under more noise",
}
GUISES: dict[str, Guise] = {"domain": "permutation", "rotation": "rotation", "noise": "noise"}
FIELDS = ("final", "minimum", "worst_case", "forgetting 10", "forgetting 100", "plasticity 10")


class Size(NamedTuple):
    """How large all is; the defaults are the claim's."""

    steps: int = 60
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    memory: int = 50
    rank: int = 200
    strengths: int = 4
    inputs: int = 64
    rows: tuple[int, int] | None = None  # of MNIST, to train and to test on; None: the digits


QUICK = Size(steps=4, rates=(0.1,), memory=10, rank=8, strengths=1)


MNIST = {"inputs": 784, "rows": (1500, 500)}  # about as many as there are digits


class Way(NamedTuple):
    """A learner, made for an optimizer and a strength, and the strengths it is tuned over."""

    make: Callable[..., Learner]
    strengths: tuple[float, ...] = (0.0,)


@functools.cache
def network(inputs: int) -> Callable:
    """The network's function, one for all seeds."""
    return started(inputs, 0)[0]


def started(inputs: int, seed: int) -> tuple[Callable, Any]:
    """The network, with the initial parameters of a seed."""
    return mlp(key=jax.random.key(seed), sizes=(inputs, 64, 32, 10))


def images(size: Size, folder: Path | None, seed: int) -> tuple[Images, Images]:
    """What is learnt and what is tested on: another draw for each seed."""
    if size.rows is None:
        return split_digits(load_digits(), seed=seed)
    assert folder is not None
    rng = np.random.default_rng(seed)
    train, test = (
        part.take(rng.permutation(len(part.labels))[:count])
        for part, count in zip(whole_mnist(folder), size.rows, strict=True)
    )
    return train, test


@functools.cache
def whole_mnist(folder: Path) -> tuple[Images, Images]:
    """MNIST, read once."""
    return load_mnist(folder)


@functools.cache
def ways(size: Size, scene: str) -> dict[str, Way]:
    """The learners by name; those of one curvature share its estimator."""
    unheld = HEAD if scene == "class" else ()  # as InTAct's code has it
    apply = network(size.inputs)
    by_diagonal, by_kfac = (f(apply, Categorical()) for f in (diagonal, kfac))
    per_task = size.rank // 4
    found = {
        "naive": Way(lambda o, _: learners.naive(o)),
        "joint": Way(lambda o, _: learners.joint(o)),
        "replay": Way(
            lambda o, s: learners.replay(o, size=size.memory, weight=s), (1.0, 2.0, 4.0, 8.0)
        ),
        "EWC, diagonal": Way(
            lambda o, s: learners.ewc(o, by_diagonal, strength=s), (1.0, 3.0, 10.0, 30.0)
        ),
        "EWC, K-FAC": Way(
            lambda o, s: learners.ewc(o, by_kfac, strength=s), (0.01, 0.1, 1.0, 10.0)
        ),
        "OGD": Way(lambda o, _: learners.orthogonal(o, rank=size.rank, samples=per_task)),
        "null space": Way(
            lambda o, s: learners.null_space(o, by_kfac, energy=s), (0.01, 0.03, 0.1, 0.3)
        ),
        "InTAct": Way(
            lambda o, s: learners.intact(o, SITES, strength=s, unheld=unheld),
            (0.01, 0.1, 1.0, 10.0),
        ),
        "refresh": Way(
            lambda o, s: learners.refresh(
                o, by_diagonal, size=size.memory, rate=s, weight=REFRESH_WEIGHT
            ),
            (1e-10, 1e-9, 1e-8, 1e-7),
        ),
    }
    return {
        name: way._replace(strengths=way.strengths[: size.strengths]) for name, way in found.items()
    }


@functools.cache
def sgd(rate: float) -> optax.GradientTransformation:
    """One optimizer a rate, so that a program is compiled once."""
    return optax.sgd(rate)


def run(
    scene: str,
    name: str,
    point: tuple[float, float],
    seed: int,
    size: Size,
    folder: Path | None,
) -> dict:
    """One stream: what it comes to, and the mean accuracy of tasks begun, by update."""
    train, test = images(size, folder, seed)
    if scene == "class":
        tasks = by_class(train, test, seed=seed)
    else:
        tasks = by_domain(train, test, guise=GUISES[scene], seed=seed)
    apply, params = network(size.inputs), started(size.inputs, seed)[1]
    rate, strength = point
    learner = ways(size, scene)[name].make(sgd(rate), strength)
    try:
        learnt = learn_on(
            learner,
            apply,
            params,
            [task.train.as_batch() for task in tasks],
            steps=size.steps,
            evaluate=accuracies(apply, [task.test.as_batch() for task in tasks]),
            key=jax.random.key(seed + 1),
        )
    except FloatingPointError:
        # It diverged, and knows nothing any more; a fall of 1 is the worst there is.
        return dict.fromkeys(FIELDS, 0.0) | {
            "forgetting 10": 1.0,
            "forgetting 100": 1.0,
            "curve": [0.0] * (5 * size.steps + 1),
            "diverged": 1,
        }
    found = stability(learnt)
    begun = np.minimum(np.arange(len(learnt.scores)) // size.steps + 1, len(tasks))
    return {
        "final": found.final,
        "minimum": found.minimum,
        "worst_case": found.worst_case,
        "forgetting 10": found.forgetting[10],
        "forgetting 100": found.forgetting[100],
        "plasticity 10": found.plasticity[10],
        "diverged": 0,
        "curve": [float(np.mean(row[:n])) for row, n in zip(learnt.scores, begun, strict=True)],
    }


def tuned(scene: str, name: str, size: Size, folder: Path | None) -> dict:
    """The rate and strength of the best mean final accuracy, on seeds that are not measured."""
    points = list(itertools.product(size.rates, ways(size, scene)[name].strengths))
    finals = [
        float(np.mean([run(scene, name, at, seed, size, folder)["final"] for seed in TUNING_SEEDS]))
        for at in points
    ]
    best = int(np.argmax(finals))
    return {"rate": points[best][0], "strength": points[best][1], "tried": finals}


def paired(runs: dict, field: str, one: str, other: str) -> dict[str, float]:
    """The interval of the difference of two learners, seed by seed."""
    return evidence.interval(
        [a[field] - b[field] for a, b in zip(runs[one], runs[other], strict=True)]
    )


def claims(runs: dict) -> dict[str, dict]:
    """The claims whose learners were run, as differences that each says are above zero."""
    stated = {
        "1 final, EWC K-FAC - diagonal": ("final", "EWC, K-FAC", "EWC, diagonal"),
        "2 final, refresh - replay": ("final", "refresh", "replay"),
        "3 final, InTAct - naive": ("final", "InTAct", "naive"),
        "4 min-ACC, OGD - naive": ("minimum", "OGD", "naive"),
        "5 min-ACC, null space - replay": ("minimum", "null space", "replay"),
        "6 min-ACC, null space - joint": ("minimum", "null space", "joint"),
        "7 final, null space - replay": ("final", "null space", "replay"),
    }
    return {
        claim: paired(runs, *what)
        for claim, what in stated.items()
        if all(name in runs for name in what[1:])
    }


def verdict(found: dict[str, float]) -> str:
    """Whether an interval says that a claim held."""
    low, high = found["mean"] - found["half_width"], found["mean"] + found["half_width"]
    return "held" if low > 0 else "did not hold" if high <= 0 else "not decided here"


def figure(curves: dict[str, dict[str, list[dict]]], steps: int):
    """Mean accuracy over the tasks begun, by update; the first seed, six learners a panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5 * len(curves) + 1, 4.6), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    shown = ("naive", "joint", "replay", "null space", "InTAct", "refresh")
    for axes, (scene, runs) in zip(panels, curves.items(), strict=True):
        for name, look in zip(shown, STYLES, strict=True):
            if name not in runs:
                continue
            axes.plot(runs[name][0]["curve"], **{**look, "ms": 0, "lw": 1.3}, label=name)
        for task in range(1, 5):
            axes.axvline(task * steps, color="0.8", lw=0.8, zorder=0)
        axes.set_title(SCENES[scene], fontsize=10)
        axes.set_xlabel("updates")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, mean over the tasks begun")
    panels[0].set_ylim(0, 1.02)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return drawn


def measured(scene: str, name: str, best: dict, seed: int, size: Size, folder: Path | None) -> dict:
    """One measured seed at the tuned point."""
    return run(scene, name, (best["rate"], best["strength"]), seed, size, folder)


def main(arguments: list[str] | None = None) -> None:
    """Tune, measure, print both tables and the claims, draw the figure."""
    parser = evidence.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that all runs")
    parser.add_argument("--scenes", nargs="+", choices=list(SCENES), default=list(SCENES)[:3])
    parser.add_argument(
        "--learners", nargs="+", choices=list(ways(QUICK, "class")), help="all, by default"
    )
    parser.add_argument("--mnist", type=Path, help="the folder of MNIST's four files")
    given = parser.parse_args(arguments)
    size, folder, out = QUICK if given.quick else Size(), given.mnist, given.out
    if folder is not None:
        size, out = size._replace(**MNIST), out / "mnist"
    kept: Path = out / ("consolidation-quick" if given.quick else "consolidation")
    summary, curves = {}, {}
    for scene in given.scenes:
        runs, points = {}, {}
        for name, way in ways(size, scene).items():
            if given.learners and name not in given.learners:
                continue
            path = kept / scene / name.replace(", ", "-").replace(" ", "-")
            fixed = {
                "size": size._asdict(),
                "strengths": way.strengths,
                "tuned on": TUNING_SEEDS,
                "protocol": "joint of all rows alike; InTAct's head free where classes are new",
                "refresh weight": REFRESH_WEIGHT,
            }
            points[name] = evidence.kept(
                path / "tuned.json",
                fixed,
                lambda scene=scene, name=name: tuned(scene, name, size, folder),
            )
            point = {k: points[name][k] for k in ("rate", "strength")}
            runs[name] = [
                evidence.kept(
                    path / f"{seed}.json",
                    fixed | point,
                    lambda scene=scene, name=name, point=point, seed=seed: measured(
                        scene, name, point, seed, size, folder
                    ),
                )
                for seed in range(FIRST_SEED, FIRST_SEED + given.seeds)
            ]
            finals = [round(r["final"], 3) for r in runs[name]]
            diverged = sum(r["diverged"] for r in runs[name])
            print(scene, name, point, finals, f"{diverged} diverged", flush=True)
        table = {
            n: {f: evidence.interval([r[f] for r in rs]) for f in FIELDS} for n, rs in runs.items()
        }
        print(
            f"\n{scene}-incremental\n\n| learner | rate | strength | " + " | ".join(FIELDS) + " |"
        )
        print("| --- | --- | --- |" + " --- |" * len(FIELDS))
        for name, row in table.items():
            at = f"{points[name]['rate']:g} | {points[name]['strength']:g}"
            print(
                f"| {name} | {at} | " + " | ".join(evidence.shown(x) for x in row.values()) + " |"
            )
        held = claims(runs)
        for claim, found in held.items():
            print(f"{claim}: {evidence.shown(found)}: {verdict(found)}")
        summary[scene] = {"table": table, "claims": held, "points": points}
        curves[scene] = runs
        # Learners that project compile at every task; a process has room for only so many.
        jax.clear_caches()
    path = evidence.write("consolidation", out, {"summary": summary})
    save_png(figure(curves, size.steps), path.with_suffix(".png"))


if __name__ == "__main__":
    main()

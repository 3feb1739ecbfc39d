"""Claims: what methods that replay keep, while a model learns on.

    python -m tests.bench.claims.replay [--seeds 5] [--author-seeds 3] [--only digits] [--quick]

Digits, two new classes a task, five tasks, an MLP of one hidden layer, SGD, 60 updates a task, 20
images kept in all, scores at every update:

    uer      UER (new rows by their angle) ends with a higher mean accuracy than replay.
    k-fpf    k-FPF, which replays now and then into its most sensitive module alone, ends no lower
             than replay at each update, of as many updates; and higher than k-FPF of the other
             module, and no lower than k-FPF of all modules.
    views    View batches, a row in four shifts at once and then at rest, end higher than the same
             images in any order.

Invented authors, a GPT of a quarter of a million parameters, four parts of 64 rows, Adam, 24 rows
kept in all; a row is remembered if its keyword is the likeliest:

    gere     GeRe's threshold margin on rows of the first part keeps more of that part than the
             same rows replayed by their NLL alone.
    words    View batches of a row in four wordings end higher than the same rows in any order.
    rft      From the same model half-way through a new part, RFT on its own answers (by NLL and by
             the policy gradient) keeps more of the old part than SFT where it remembers as much of
             the new one.

Each method is tried over a grid of as many points (rates x strengths) on seeds that are not
reported, the best final mean is run on the seeds that are. Intervals are 95%, of paired
differences. Each run's numbers are kept in `out`, and a second call takes them from there.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jedit.core.batch import Batch
from jedit.data import load_digits, split_digits
from jedit.data.task_streams import by_class
from jedit.methods import RftStages, k_fpf, module_sensitivity, rft, sensitive_modules
from jedit.models import mlp
from jedit.objectives import (
    GRPO,
    UER,
    GeRe,
    LearnNLL,
    ViewBatch,
    Views,
    stack_views,
    with_retain,
)
from jedit.recipes.learning_on import Learner, Learnt, accuracies, learn_on, plain, stability
from jedit.recipes.replay import Buffer, General
from jedit.recipes.scenes.author_stream import (
    AuthorStream,
    asks,
    author_stream,
    in_views,
    remembered,
)
from jedit.tracing import Cosines, Entering
from jedit.training import TrainingMethod, Watch, unlearn
from tests.bench.claims.evidence import interval, kept, parser, shown, write

TUNING = (100, 101)  # seeds that choose a setting, and are not reported
SHIFTS = ((0, 0), (1, 0), (0, 1), (-1, -1))
HEAD, OTHER = "layers/1", "layers/0"


class Size(NamedTuple):
    """How large everything is."""

    steps: int = 60
    hidden: int = 100
    batch: int = 16
    memory: int = 20
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    author_steps: int = 120
    author_batch: int = 16
    author_memory: int = 24
    author_rates: tuple[float, ...] = (1e-3, 3e-3)
    authors_per_part: int = 8
    every: int = 20
    draws: int = 60
    rft_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    tuning: tuple[int, ...] = TUNING


QUICK = Size(
    steps=8,
    hidden=8,
    rates=(0.1,),
    author_steps=2,
    author_memory=4,
    author_rates=(1e-3,),
    authors_per_part=1,
    every=1,
    draws=1,
    rft_rates=(1e-3,),
    tuning=(100,),
)


@functools.cache
def sgd(rate: float) -> optax.GradientTransformation:
    """One optimizer for each rate, which programs are compared by."""
    return optax.sgd(rate)


@functools.cache
def adam(rate: float) -> optax.GradientTransformation:
    """One optimizer for each rate, which programs are compared by."""
    return optax.adam(rate)


# Digits.


class DigitScene(NamedTuple):
    """One seed's tasks and model."""

    apply: Callable
    params: Any
    tasks: tuple[Batch, ...]
    tests: tuple[Batch, ...]
    sensitive: dict[str, float]
    size: Size


@functools.cache
def digit_apply(hidden: int) -> Callable:
    """One function, so that seeds share what is compiled."""
    return mlp(key=jax.random.key(0), sizes=(64, hidden, 10))[0]


@functools.cache
def digit_scene(seed: int, size: Size) -> DigitScene:
    """Split the digits, make the model, and see which module the first two tasks change."""
    train, test = split_digits(load_digits(), seed=seed)
    tasks = by_class(train, test, seed=seed)
    rows = tuple(task.train.as_batch() for task in tasks)
    apply = digit_apply(size.hidden)
    params = mlp(key=jax.random.key(seed), sizes=(64, size.hidden, 10))[1]
    seen: list[list] = []
    here = params
    method = plain(sgd(size.rates[len(size.rates) // 2]), size.batch)
    for number in range(2):
        ends: list = []
        here, _ = unlearn(
            method,
            apply,
            here,
            rows[number],
            steps=size.steps,
            key=jax.random.fold_in(jax.random.key(seed), number),
            watch=Watch(
                lambda state, _, ends=ends: ends.append(jax.tree.map(jnp.copy, state.params)),
                every=size.steps // 4,
            ),
        )
        seen.append(ends)
    scores = module_sensitivity(seen)
    return DigitScene(
        apply, params, rows, tuple(task.test.as_batch() for task in tasks), scores, size
    )


def shifted(rows: Batch) -> list[Batch]:
    """The images as they are, and moved by a pixel."""
    return [rows._replace(inputs=jnp.roll(rows.inputs, by, axis=(1, 2))) for by in SHIFTS]


def spread_out(views: Views) -> Batch:
    """All views as rows of their own."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), views.rows)


class SameViews:
    """Keeps the very images that a buffer of rows in views does, each as a row of its own."""

    def __init__(self, groups: int):
        self.keep = Buffer(groups)

    def __call__(self, apply, params, rows, kept, *, key):
        """Return what is kept after one more task."""
        grouped = jax.tree.map(lambda x: x.reshape(-1, len(SHIFTS), *x.shape[1:]), rows)
        found = self.keep(apply, params, Views(grouped), kept, key=key)
        return found._replace(rows=spread_out(found.rows))


WEIGHTS, SCALES = (0.5, 1.0, 2.0), (5.0, 10.0, 20.0)
PACES = ((15, 5), (10, 10), (5, 15))  # steps of learning and of fine-tuning in turn


def digit_learner(name: str, rate: float, strength: Any, scene: DigitScene) -> tuple[Learner, Any]:
    """Return how a method learns, and the tasks as it is given them."""
    size, optimizer = scene.size, sgd(rate)
    keep = Buffer(size.memory)

    def learner(objective) -> Learner:
        return Learner(TrainingMethod(objective, optimizer, batch_size=size.batch), keep)

    if name == "naive":
        return Learner(plain(optimizer, size.batch)), scene.tasks
    if name == "replay":
        return learner(with_retain(LearnNLL(), weight=strength)), scene.tasks
    if name == "UER":
        return learner(UER(Cosines(f"{HEAD}/kernel"), scale=strength)), scene.tasks
    if name.startswith("k-FPF"):
        least_first = sorted(scene.sensitive, key=lambda module: scene.sensitive[module])
        which = {"k-FPF": least_first[-1:], "k-FPF, other": least_first[:1]}.get(name, least_first)
        pattern = sensitive_modules({m: 0.0 for m in which}, count=len(which))
        every, tuning = strength
        method = k_fpf(optimizer, pattern, every=every, tuning_steps=tuning)
        method = method._replace(batch_size=size.batch)
        return Learner(method, keep, plain(optimizer, size.batch)), scene.tasks
    views = [stack_views(shifted(task)) for task in scene.tasks]
    objective = with_retain(LearnNLL(), weight=strength)
    if name.startswith("shifts"):
        if name == "shifts, same kept":
            keep = SameViews(size.memory // len(SHIFTS))
        return learner(objective), [spread_out(v) for v in views]
    assert name == "view batches"
    per_step = size.batch // len(SHIFTS)
    method = TrainingMethod(ViewBatch(objective), optimizer, batch_size=per_step)
    first = TrainingMethod(ViewBatch(LearnNLL()), optimizer, batch_size=per_step)
    return Learner(method, Buffer(size.memory // len(SHIFTS)), first), views


DIGIT_GRIDS: dict[str, tuple[Any, ...]] = {
    "naive": (None,),
    "replay": WEIGHTS,
    "UER": SCALES,
    "k-FPF": PACES,
    "k-FPF, other": PACES,
    "k-FPF, all": PACES,
    "shifts": WEIGHTS,
    "shifts, same kept": WEIGHTS,
    "view batches": WEIGHTS,
}


def figures(learnt: Learnt) -> dict[str, float]:
    """What a stream comes to, as a record."""
    found = stability(learnt)
    return {
        "final": found.final,
        "first task, final": float(learnt.scores[-1, 0]),
        "last task, final": float(learnt.scores[-1, -1]),
        "min-ACC": found.minimum,
        "WC-ACC": found.worst_case,
        "WF10": found.forgetting[10],
        "WF100": found.forgetting[100],
    }


def of_digits(name: str, rate: float, strength: Any, seed: int, size: Size) -> dict[str, Any]:
    """One run on the digits."""
    scene = digit_scene(seed, size)
    learner, tasks = digit_learner(name, rate, strength, scene)
    learnt = learn_on(
        learner,
        scene.apply,
        scene.params,
        tasks,
        steps=size.steps,
        evaluate=accuracies(scene.apply, scene.tests),
        key=jax.random.fold_in(jax.random.key(seed), 7),
    )
    return figures(learnt) | {"sensitive": max(scene.sensitive, key=scene.sensitive.__getitem__)}


# Authors.


@functools.cache
def stream_of(seed: int, size: Size) -> AuthorStream:
    """One seed's authors."""
    facts = 8 if size.authors_per_part > 1 else 4
    return author_stream(seed=seed, authors_per_part=size.authors_per_part, facts_per_author=facts)


def author_learner(name: str, rate: float, strength: Any, stream: AuthorStream, size: Size):
    """Return how a method learns, and the parts as it is given them."""
    optimizer, batch = adam(rate), size.author_batch
    tasks: Any = stream.tasks
    replays = with_retain(LearnNLL(), weight=strength) if name != "naive" else LearnNLL()
    keeps: dict[str, Any] = {
        "naive": None,
        "replay": Buffer(size.author_memory),
        "general": General(size.author_memory),
        "GeRe": General(size.author_memory, Entering("head/kernel")),
        "wordings": Buffer(size.author_memory),
        "view batches": Buffer(size.author_memory // 4),
    }
    objective: Any = GeRe(Entering("head/kernel"), strength) if name == "GeRe" else replays
    first = None
    if name in ("wordings", "view batches"):
        views = [in_views(stream, part) for part in range(len(stream.parts))]
        tasks = views if name == "view batches" else [spread_out(v) for v in views]
    if name == "view batches":
        objective, batch = ViewBatch(objective), batch // 4
        first = TrainingMethod(ViewBatch(LearnNLL()), optimizer, batch_size=batch)
    method = TrainingMethod(objective, optimizer, batch_size=batch)
    return Learner(method, keeps[name], first), tasks


AUTHOR_GRIDS: dict[str, tuple[Any, ...]] = {
    "naive": (None,),
    "replay": (1.0, 3.0),
    "general": (1.0, 3.0),
    "GeRe": (10.0, 100.0),
    "wordings": (1.0, 3.0),
    "view batches": (1.0, 3.0),
}


def of_authors(name: str, rate: float, strength: Any, seed: int, size: Size) -> dict[str, Any]:
    """One run on the authors."""
    stream = stream_of(seed, size)
    learner, tasks = author_learner(name, rate, strength, stream, size)
    learnt = learn_on(
        learner,
        stream.apply,
        stream.params,
        tasks,
        steps=size.author_steps,
        every=size.every,
        evaluate=remembered(stream.apply, stream.tests),
        key=jax.random.fold_in(jax.random.key(seed), 7),
    )
    return figures(learnt) | {"scores": learnt.scores.tolist()}


def of_rft(seed: int, size: Size) -> dict[str, Any]:
    """From one model half-way through the second part: SFT, and RFT by NLL and by its gradient."""
    stream = stream_of(seed, size)
    rate, key = size.author_rates[-1], jax.random.key(seed)
    learn = plain(adam(rate), size.author_batch)
    params = stream.params
    for part, steps in ((0, size.author_steps), (1, size.author_steps // 3)):
        params, _ = unlearn(
            learn,
            stream.apply,
            params,
            stream.tasks[part],
            steps=steps,
            key=jax.random.fold_in(key, part),
        )
    evaluate = remembered(stream.apply, stream.tests[:2])
    found: dict[str, Any] = {"start": np.asarray(evaluate(params)).tolist()}
    for rate in size.rft_rates:
        looks: list[list[float]] = []

        def look(state, _, looks=looks) -> None:
            looks.append(np.asarray(evaluate(state.params)).tolist())

        unlearn(
            plain(adam(rate), size.author_batch),
            stream.apply,
            params,
            stream.tasks[1],
            steps=2 * size.draws,
            key=jax.random.fold_in(key, 2),
            watch=Watch(look, every=max(1, 2 * size.draws // 12)),
        )
        found[f"SFT, {rate:g}"] = looks
        for name, objective in (("NLL", None), ("policy", GRPO())):
            mine: list[list[float]] = []

            def see(number, params, mine=mine) -> None:
                if number % max(1, size.draws // 12) == 0:
                    mine.append(np.asarray(evaluate(params)).tolist())

            edit, info = rft(
                stream.apply,
                params,
                asks(stream, 1),
                adam(rate),
                key=jax.random.fold_in(key, 3),
                stages=RftStages(steps=size.draws),
                objective=objective,
                look=see,
            )
            del edit
            found[f"RFT by {name}, {rate:g}"] = mine
            found[f"rewards of RFT by {name}, {rate:g}"] = info.rewards.tolist()
    return found


def kept_at_most(looks: list[list[float]], start: list[float], new: float) -> float:
    """The most that is remembered of the old part where at least so much is of the new one."""
    old = [a for a, b in [start, *looks] if b >= new]
    return max(old, default=float("nan"))


# Together.


def chosen(
    scene: str, run: Callable, grids: dict[str, tuple[Any, ...]], rates, size: Size, out: Path
) -> dict[str, tuple[float, Any]]:
    """The rate and strength of the best mean final score on the tuning seeds, by method."""
    best = {}
    for name, strengths in grids.items():
        tried = {}
        for rate in rates:
            for strength in strengths:
                finals = [
                    one(scene, run, name, rate, strength, seed, size, out)["final"]
                    for seed in size.tuning
                ]
                tried[(rate, strength)] = float(np.mean(finals))
        best[name] = max(tried, key=tried.__getitem__)
        print(scene, name, best[name], {str(k): round(v, 3) for k, v in tried.items()}, flush=True)
    return best


def one(scene, run, name, rate, strength, seed, size: Size, out: Path) -> dict[str, Any]:  # noqa: PLR0913, E501
    """One run, kept."""
    settings = {"name": name, "rate": rate, "strength": strength, "seed": seed, **size._asdict()}
    label = f"{name}-{rate:g}-{strength}-{seed}".replace(" ", "_").replace(",", "")
    path = out / "replay" / scene / f"{label}.json"
    return kept(path, settings, lambda: run(name, rate, strength, seed, size))


def compared(runs: dict[str, list[dict]], pairs, quantity: str) -> dict[str, Any]:
    """Paired differences, the first less the second."""
    return {
        f"{a} - {b}": interval(
            [x[quantity] - y[quantity] for x, y in zip(runs[a], runs[b], strict=True)]
        )
        for a, b in pairs
        if a in runs and b in runs
    }


DIGIT_PAIRS = (
    ("UER", "replay"),
    ("k-FPF", "replay"),
    ("k-FPF", "k-FPF, other"),
    ("k-FPF", "k-FPF, all"),
    ("view batches", "shifts"),
    ("view batches", "shifts, same kept"),
    ("view batches", "replay"),
    ("replay", "naive"),
)
AUTHOR_PAIRS = (
    ("GeRe", "general"),
    ("GeRe", "replay"),
    ("general", "naive"),
    ("replay", "general"),
    ("view batches", "wordings"),
    ("wordings", "replay"),
)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, print and write it."""
    options = parser(__doc__, seeds=5)
    options.add_argument("--author-seeds", type=int, default=3, help="how many, counted from 0")
    options.add_argument("--only", nargs="+", choices=("digits", "authors", "rft"))
    options.add_argument("--quick", action="store_true", help="a toy, for the tests")
    given = options.parse_args(arguments)
    size = QUICK if given.quick else Size()
    wanted = given.only or ("digits", "authors", "rft")
    numbers: dict[str, Any] = {"size": size._asdict()}
    for scene, run, grids, rates, seeds, pairs in (
        ("digits", of_digits, DIGIT_GRIDS, size.rates, given.seeds, DIGIT_PAIRS),
        ("authors", of_authors, AUTHOR_GRIDS, size.author_rates, given.author_seeds, AUTHOR_PAIRS),
    ):
        if scene not in wanted:
            continue
        size_here = size if scene == "digits" else size._replace(tuning=size.tuning[:1])
        best = chosen(scene, run, grids, rates, size_here, given.out)
        runs = {
            name: [
                one(scene, run, name, *best[name], s, size_here, given.out) for s in range(seeds)
            ]
            for name in grids
        }
        names = ("final", "first task, final", "last task, final", "min-ACC", "WC-ACC", "WF10")
        means = {
            name: {q: interval([r[q] for r in mine]) for q in names} for name, mine in runs.items()
        }
        print(f"\n| {scene} | rate, strength | {' | '.join(names)} |")
        for name, row in means.items():
            print(f"| {name} | {best[name]} | {' | '.join(shown(row[q]) for q in names)} |")
        differences = {q: compared(runs, pairs, q) for q in names}
        for q in names:
            for pair, found in differences[q].items():
                print(f"{scene}, {q}: {pair} = {shown(found)}", flush=True)
        numbers[scene] = {"best": best, "means": means, "differences": differences}
    if "rft" in wanted:
        records = [
            kept(
                given.out / "replay" / "rft" / f"{seed}.json",
                {"seed": seed, **size._asdict()},
                functools.partial(of_rft, seed, size),
            )
            for seed in range(given.author_seeds)
        ]
        numbers["rft"] = records, of_all_rft(records, size)
    write("replay", given.out, numbers)


def of_all_rft(records: list[dict], size: Size) -> dict[str, Any]:
    """At several gains of the new part, the most of the old one at any rate; SFT against RFT."""
    found: dict[str, Any] = {}
    kinds = ("SFT", "RFT by NLL", "RFT by policy")
    for gain in (0.05, 0.1, 0.2):
        most = {
            kind: [
                max(
                    (
                        x
                        for rate in size.rft_rates
                        if not np.isnan(
                            x := kept_at_most(
                                record[f"{kind}, {rate:g}"],
                                record["start"],
                                record["start"][1] + gain,
                            )
                        )
                    ),
                    default=float("nan"),
                )
                for record in records
            ]
            for kind in kinds
        }
        found[f"gain {gain}"] = most
        print(f"rft, gain {gain}: start {[r['start'] for r in records]} {most}", flush=True)
        for kind in kinds[1:]:
            pairs = [b - a for a, b in zip(most["SFT"], most[kind], strict=True)]
            if len(pairs) > 1 and not np.any(np.isnan(pairs)):
                found[f"gain {gain}, {kind} - SFT"] = interval(pairs)
                print(f"  {kind} - SFT = {shown(interval(pairs))}", flush=True)
    return found


if __name__ == "__main__":
    main()

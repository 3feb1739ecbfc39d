"""The digits of `tests.bench.claims.replay`, and what both of its scenes share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jedit.core.batch import Batch
from jedit.data import load_digits, split_digits
from jedit.data.task_streams import by_class
from jedit.methods import k_fpf, module_sensitivity, sensitive_modules
from jedit.models import mlp
from jedit.objectives import UER, LearnNLL, ViewBatch, Views, stack_views, with_retain
from jedit.recipes.learners import KeepRows
from jedit.recipes.learning_on import Learner, Learnt, accuracies, learn_on, plain, stability
from jedit.tracing import Cosines
from jedit.training import TrainingMethod, Watch, unlearn

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
        self.keep = KeepRows(groups)

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
    keep = KeepRows(size.memory)

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
    return Learner(method, KeepRows(size.memory // len(SHIFTS)), first), views


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

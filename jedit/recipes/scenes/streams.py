"""The stream scene: a small network learns digits task after task, and what it keeps is measured.

Two classes a task, or all classes in another guise a task.  Every learner begins at the same
parameters and sees the same rows in the same order; all test sets are looked at after every update,
so that a gap which has closed again by the end is seen (arXiv 2205.13452).
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers
from jedit.curvature import Estimator, diagonal, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import by_class, by_domain, load_digits, split_digits
from jedit.data.task_streams import Task
from jedit.models import mlp
from jedit.recipes import learners
from jedit.recipes.learning_on import Learner, accuracies, learn_on, stability
from jedit.recipes.progress import Say, tell
from jedit.recipes.sweep import interval
from jedit.report import FIELDS, Stream, StreamLearner, StreamRun

StreamName = Literal["classes", "orders", "turns"]
LearnerName = Literal[
    "naive",
    "joint",
    "replay",
    "EWC, diagonal",
    "EWC, K-FAC",
    "OGD",
    "null space",
    "InTAct",
    "refresh",
]
STREAMS: tuple[StreamName, ...] = ("classes", "orders")
LEARNERS: tuple[LearnerName, ...] = (
    "naive",
    "joint",
    "replay",
    "EWC, diagonal",
    "OGD",
    "null space",
    "InTAct",
    "refresh",
)
# For `jedit demo --methods all`.
ALL_STREAMS: tuple[StreamName, ...] = (*STREAMS, "turns")
ALL_LEARNERS: tuple[LearnerName, ...] = (*LEARNERS[:4], "EWC, K-FAC", *LEARNERS[4:])
NUM_SEEDS = 3
NUM_SEEDS_AT_ALL = 2**32  # where a seed after the last one begins at 0 again

WHAT: dict[StreamName, tuple[str, str]] = {
    "classes": ("Digits: new classes", "each task has two classes that no earlier one had"),
    "orders": (
        "Digits: pixels in another order",
        "each task has all classes, with the pixels in an order of its own",
    ),
    "turns": ("Digits: turned further", "each task has all classes, turned by 36 degrees more"),
}
# Learning rate and strength, chosen by the mean final accuracy over seeds 1000 and 1001, on three
# rates and, where a learner has a strength, four of them (tests/bench/claims/consolidation.md).
SETTINGS: dict[StreamName, dict[LearnerName, tuple[float, float]]] = {
    "classes": {
        "naive": (0.1, 0.0),
        "joint": (0.3, 0.0),
        "replay": (0.1, 2.0),
        "EWC, diagonal": (0.3, 10.0),
        "EWC, K-FAC": (0.1, 0.1),
        "OGD": (0.3, 0.0),
        "null space": (0.1, 0.03),
        "InTAct": (0.3, 0.01),
        "refresh": (0.1, 1e-9),
    },
    "orders": {
        "naive": (0.1, 0.0),
        "joint": (0.3, 0.0),
        "replay": (0.3, 1.0),
        "EWC, diagonal": (0.3, 3.0),
        "EWC, K-FAC": (0.1, 1.0),
        "OGD": (0.3, 0.0),
        "null space": (0.3, 0.03),
        "InTAct": (0.3, 0.1),
        "refresh": (0.1, 1e-9),
    },
    "turns": {
        "naive": (0.1, 0.0),
        "joint": (0.3, 0.0),
        "replay": (0.3, 1.0),
        "EWC, diagonal": (0.1, 3.0),
        "EWC, K-FAC": (0.1, 1.0),
        "OGD": (0.1, 0.0),
        "null space": (0.3, 0.03),
        "InTAct": (0.1, 0.1),
        "refresh": (0.1, 1e-8),
    },
}
REFRESH_WEIGHT = 2.0  # of the kept rows beside the new ones, as the settings above were chosen at
SITES = ("layers/1/kernel", "layers/2/kernel")
HEAD = SITES[-1:]


class Size(NamedTuple):
    """How large all is; the defaults are what the settings were chosen at.

    Attributes:
        steps: updates on each task, of 32 rows each.
        memory: rows that replay and refresh learning keep, of all tasks together.
        rank: gradients that OGD keeps.
        widths: widths of the perceptron's two hidden layers.
    """

    steps: int = 60
    memory: int = 50
    rank: int = 200
    widths: tuple[int, int] = (64, 32)


SIZE = Size()


class _Way(NamedTuple):
    """A learner: what it keeps, in words, what its strength is called, and how it is made."""

    keeps: str
    strength: str
    make: Callable[[optax.GradientTransformation, float], Learner]


def streams(
    *,
    seed: int,
    say: Say,
    names: Sequence[StreamName] = STREAMS,
    chosen: Sequence[LearnerName] = LEARNERS,
    num_seeds: int = NUM_SEEDS,
    size: Size = SIZE,
) -> tuple[Stream, ...]:
    """Learn each stream by each learner, and measure what is kept on the way and at the end.

    Args:
        seed: the first seed, of the split, the tasks, the initial parameters and the order of rows.
        say: a watcher, told of each stage.
        names: which streams.
        chosen: which learners.
        num_seeds: how many seeds, counted from the first; 3 is arbitrary.
        size: how large the network, the memories and the tasks are.

    Raises:
        ImportError: scikit-learn or scipy is not installed.
    """
    check_numbers(COUNT_OR_ZERO, seed=seed)
    check_numbers(COUNT, num_seeds=num_seeds)
    apply, _ = _network(size, 0)
    seeds = [(seed + i) % NUM_SEEDS_AT_ALL for i in range(num_seeds)]
    estimators = {"diagonal": diagonal(apply, Categorical()), "kfac": kfac(apply, Categorical())}
    found = []
    for name in names:
        start = time.perf_counter()
        ways = _ways(estimators, size, name)
        tasks = [tasks_of(name, one) for one in seeds]
        learnt = []
        for learner in chosen:
            say(f"{name}: learning {len(tasks[0])} tasks in turn, {learner}")
            given = (ways[learner], SETTINGS[name][learner], tasks, seeds, apply, size)
            learnt.append(_learnt(learner, *given, say=say))
        title, what = WHAT[name]
        rows = {"a task": len(tasks[0][0].train.labels), "its test": len(tasks[0][0].test.labels)}
        note = (
            "A small perceptron learns the handwritten digits that ship with scikit-learn in "
            f"{len(tasks[0])} tasks, one after the other: {what}. It makes {size.steps} updates on "
            "each. All test sets are looked at after every update."
        )
        layers = ", ".join(map(str, (64, *size.widths, 10)))
        found.append(
            Stream(
                name=name,
                title=title,
                note=note,
                tasks=tuple(task.name for task in tasks[0]),
                seeds=tuple(seeds),
                steps=size.steps,
                num_rows=rows,
                settings={"model": f"perceptron, widths {layers}", "optimizer": "plain descent"},
                seconds=time.perf_counter() - start,
                learners=tuple(learnt),
            )
        )
    return tuple(found)


def tasks_of(name: StreamName, seed: int) -> tuple[Task, ...]:
    """Return the five tasks of a stream."""
    train, test = split_digits(load_digits(), seed=seed)
    if name == "classes":
        return by_class(train, test, seed=seed)
    guise = "rotation" if name == "turns" else "permutation"
    return by_domain(train, test, guise=guise, seed=seed)


def _network(size: Size, seed: int) -> tuple[Callable, Any]:
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return mlp(key=key, sizes=(64, *size.widths, 10))


def _learnt(
    name: LearnerName,
    way: _Way,
    setting: tuple[float, float],
    tasks: Sequence[Sequence[Task]],
    seeds: Sequence[int],
    apply: Callable,
    size: Size,
    *,
    say: Say,
) -> StreamLearner:
    """Learn one stream by one learner, seed by seed; a run that diverges is counted, not scored."""
    rate, strength = setting
    learner = way.make(optax.sgd(rate), strength)
    runs, diverged = [], []
    for done, (seed, of_seed) in enumerate(zip(seeds, tasks, strict=True)):
        tell(say, done, len(seeds))
        try:
            found = learn_on(
                learner,
                apply,
                _network(size, seed)[1],
                [task.train.as_batch() for task in of_seed],
                steps=size.steps,
                evaluate=accuracies(apply, [task.test.as_batch() for task in of_seed]),
                key=jax.random.fold_in(jax.random.key(seed), 1),
            )
        except FloatingPointError:
            diverged.append(seed)
            continue
        come_to = stability(found, windows=(10,))
        runs.append(
            StreamRun(
                seed=seed,
                final=come_to.final,
                minimum=come_to.minimum,
                worst_case=come_to.worst_case,
                forgetting=come_to.forgetting[10],
                plasticity=come_to.plasticity[10],
                scores=tuple(tuple(row) for row in found.scores.tolist()),
            )
        )
    spread = {}
    for field in FIELDS if runs else ():
        over = interval([getattr(run, field) for run in runs])
        spread[field] = (over["mean"], over["half_width"])
    given = {"rate": rate} | ({way.strength: strength} if way.strength else {})
    return StreamLearner(name, way.keeps, given, tuple(runs), tuple(diverged), spread)


def _ways(estimators: dict[str, Estimator], size: Size, stream: StreamName) -> dict[str, _Way]:
    """Return the learners by name; those of one curvature share its estimator."""
    by_diagonal, by_kfac = estimators["diagonal"], estimators["kfac"]
    replayed = {"size": size.memory}
    # InTAct's code leaves the head free where classes are new, and what it has learnt of old ones.
    unheld = HEAD if stream == "classes" else ()
    per_task = max(1, size.rank // 4)
    rows = f"{size.memory} rows of all earlier tasks together"
    return {
        "naive": _Way("nothing", "", lambda o, _: learners.naive(o)),
        "joint": _Way("all rows of all earlier tasks", "", lambda o, _: learners.joint(o)),
        "replay": _Way(rows, "weight", lambda o, s: learners.replay(o, weight=s, **replayed)),
        "EWC, diagonal": _Way(
            "the parameters, and a variance of each",
            "strength",
            functools.partial(_ewc, by_diagonal),
        ),
        "EWC, K-FAC": _Way(
            "the parameters, and the moments of each layer's inputs and gradients",
            "strength",
            functools.partial(_ewc, by_kfac),
        ),
        "OGD": _Way(
            f"{size.rank} gradients of the logits, off which steps are taken",
            "",
            lambda o, _: learners.orthogonal(o, rank=size.rank, samples=per_task),
        ),
        "null space": _Way(
            "the second moment of each layer's inputs, off which steps are taken",
            "energy left free",
            lambda o, s: learners.null_space(o, by_kfac, energy=s),
        ),
        "InTAct": _Way(
            "the parameters, and the interval of each layer's inputs",
            "strength",
            lambda o, s: learners.intact(o, SITES, strength=s, unheld=unheld),
        ),
        "refresh": _Way(
            f"{rows}, and a variance of each parameter by which a batch is unlearnt first",
            "unlearning rate",
            lambda o, s: learners.refresh(
                o, by_diagonal, rate=s, weight=REFRESH_WEIGHT, **replayed
            ),
        ),
    }


def _ewc(estimator: Estimator, optimizer: optax.GradientTransformation, strength: float) -> Learner:
    return learners.ewc(optimizer, estimator, strength=strength)

"""The vision protocol, run by run: train, forget, compare with the model retrained without.

Every seed has its own initial parameters, its own order of the rows and its own forget set: a
random tenth, or a class.  The models of a seed are kept in OUT/models, the runs of both tasks in
OUT/random and OUT/class, as `recipes.sweep` keeps them: a run that was killed goes on at the next.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.data import Images, forget_class, forget_random
from jedit.methods.catalogue import CATALOGUE
from jedit.models import resnet
from jedit.recipes.comparison.task import Task
from jedit.recipes.editing import Editor
from jedit.recipes.fitting import rows_of
from jedit.recipes.named import check_methods
from jedit.recipes.progress import Say, Within
from jedit.recipes.stopwatch import Stopwatch
from jedit.recipes.sweep import (
    MODELS,
    REFERENCES,
    RETRAINED,
    UNTOUCHED,
    Found,
    Measured,
    Record,
    Trial,
    check_out,
    finish,
    sweep,
)
from jedit.recipes.vision.points import HAS, SGD, Points, points_of, with_steps
from jedit.recipes.vision.protocol import (
    NUMBERS,
    RTE,
    SHEETS,
    Sets,
    compared,
    evaluate,
    judged_sets,
    nearest,
)
from jedit.recipes.vision.training import Recipe, kept_params, train_classifier

What = Literal["random", "class"]
TASKS: tuple[What, ...] = ("random", "class")
# The seed on which points are chosen; on no other is a number reported. Its class is 9.
TUNING_SEED = 1_000_009
NUM_CLASSES = 10


class Model(NamedTuple):
    """The size of the network; the defaults are ResNet-18's.

    Attributes:
        width: channels of the first stage.
        blocks: blocks of each stage.
        stem_stride: step of the first convolution.
    """

    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    stem_stride: int = 1


class Protocol(NamedTuple):
    """How much of everything.

    The defaults are CIFAR-10's: epochs and batches are UAM's, a tenth at random is SalUn's, the
    other figures are arbitrary.

    Attributes:
        model: the network's size.
        recipe: of the original and of the retrained model.
        epochs: passes over the rows of a method that trains, on the grid.
        batch_size: forget rows, and retain rows, of one of its steps.
        fraction: share of the rows that are forgotten at random.
        fitted_rows: rows of a set that a curvature is estimated on.
        probe_rows: retain rows that a budget is kept on.
        judged_rows: retain rows that RA and the attacks look at.
        chunk: rows in one forward pass.
    """

    model: Model = Model()
    recipe: Recipe = Recipe()
    epochs: float = 5.0
    batch_size: int = 128
    fraction: float = 0.1
    fitted_rows: int = 2000
    probe_rows: int = 500
    judged_rows: int = 5000
    chunk: int = 500


class Runs(NamedTuple):
    """What is run: the methods, at which points, by which seeds, on which of the two tasks."""

    methods: Sequence[str]
    points: Points
    seeds: Sequence[int]
    tasks: Sequence[What] = TASKS


class Outcome(NamedTuple):
    """What came of one task: the records of all runs, but for the tuning seed's, and the tables."""

    what: What
    records: list[Record]
    tables: list[tuple[str, list[list[str]]]]


class Pair(NamedTuple):
    """One seed's task with its original and its retrained model, and the seconds these took."""

    task: Task
    sets: Sets
    seconds: dict[str, float]


def vision(
    images: tuple[Images, Images],
    protocol: Protocol,
    runs: Runs,
    out: Path,
    *,
    say: Say,
) -> list[Outcome]:
    """Run the protocol, and return what came of each task; `out` holds it too.

    Args:
        images: the rows to train on, and those to test on.
        protocol: how much of everything.
        runs: what is run.
        out: folder of the models, the records and the tables.
        say: a watcher, told of each run.

    Raises:
        ValueError: a method that suits no classifier, seeds or images that cannot be, or records
            of another run in `out`.
    """
    check_runs(runs, out)
    check_images(images, protocol, runs)
    found = []
    for what in runs.tasks:
        data = Data(images, protocol, out / MODELS, Within(what, say))
        found.append(_run(what, data, runs, out / what))
    return found


def check_runs(runs: Runs, out: Path) -> None:
    """Refuse what cannot be run, before any work.

    Raises:
        ValueError: what that is.
    """
    check_methods(runs.methods, HAS, "an image classifier")
    if len(set(runs.seeds)) < len(runs.seeds):
        raise ValueError(f"seeds must differ, each is a sample; got {list(runs.seeds)}")
    if TUNING_SEED in runs.seeds:
        raise ValueError(f"seed {TUNING_SEED} is the one that points are chosen on; give another")
    if out.is_dir():
        known = {MODELS, *TASKS}
        foreign = sorted(p.name for p in out.iterdir() if p.name not in known and p.name[0] != ".")
        if foreign:
            raise ValueError(
                f"{out}: holds files that no such run has written ({', '.join(foreign[:3])}); give "
                "another --out, or empty the folder"
            )
    for what in runs.tasks:
        check_out(out / what)


def check_images(images: tuple[Images, Images], protocol: Protocol, runs: Runs) -> None:
    """Refuse images of which nothing can be forgotten, or nothing kept, before any work.

    Raises:
        ValueError: what that is.
    """
    rows, test = images
    if not len(rows.labels) or not len(test.labels):
        raise ValueError("there are no images to train on, or none to test on")
    if rows.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"images to train on have the shape {rows.images.shape[1:]} and those to test on "
            f"{test.images.shape[1:]}; give files of one set"
        )
    labels = np.unique(rows.labels)
    if labels[0] < 0 or labels[-1] >= NUM_CLASSES:
        raise ValueError(f"labels must be from 0 to {NUM_CLASSES - 1}; got {labels.tolist()}")
    if "random" in runs.tasks:
        forget_random(rows, seed=0, fraction=protocol.fraction)
    if "class" in runs.tasks and len(labels) < 2:
        raise ValueError(
            f"the {len(rows.labels)} images are all of class {labels[0]}: without it none is left; "
            "give more --rows"
        )
    if not np.isin(test.labels, labels).any():
        raise ValueError("no image to test on has a class that is trained on; give more --rows")


class Data:
    """The images, and the models of each seed, trained when they are first asked for."""

    def __init__(self, images: tuple[Images, Images], protocol: Protocol, models: Path, say: Say):
        """Take the images, what is done with them, and the folder that models are kept in."""
        self.rows, self.test = images
        self.protocol, self.models, self.say = protocol, models, say
        self.about = about(images, protocol)
        self.apply = _network(protocol.model, self.rows.images.shape[1:])[0]

    def pair(self, what: What, seed: int) -> Pair:
        """Return a seed's task, with its models."""
        rows, protocol = self.rows, self.protocol
        labels = np.unique(rows.labels)
        parts = (
            forget_random(rows, seed=seed, fraction=protocol.fraction)
            if what == "random"
            else forget_class(rows, int(labels[seed % len(labels)]))
        )
        order = np.random.default_rng(seed).permutation(parts[1])
        original, first = self._trained("original", seed, np.arange(len(rows.labels)))
        retrained, second = self._trained(f"without-{what}", seed, parts[1])
        retain = rows.take(order).as_batch()
        task = Task(
            apply=self.apply,
            original=original,
            retrained=retrained,
            forget=rows.take(parts[0]).as_batch(),
            retain=retain,
            heldout=retain,
            test=None,
            truth_ratio=None,
            select=None,
            chunk=protocol.chunk,
            probe=protocol.probe_rows,
            hidden_site="head/kernel",
            layers=("head/kernel",),
        )
        sets = judged_sets(
            rows,
            (parts[0], order),
            self.test,
            retained=protocol.judged_rows,
            chunk=protocol.chunk,
        )
        return Pair(task, sets, {UNTOUCHED: first, RETRAINED: second})

    def _trained(self, name: str, seed: int, part: np.ndarray) -> tuple[PyTree, float]:
        protocol = self.protocol
        init_key, order_key = jax.random.split(jax.random.key(seed))
        initial = _initial(protocol.model, self.rows.images.shape[1:], init_key)

        def make() -> PyTree:
            self.say(f"training on {len(part)} images, seed {seed}: {name}")
            rows: Batch = self.rows.take(part).as_batch()
            return train_classifier(
                self.apply, initial, rows, protocol.recipe, key=order_key, say=self.say
            )

        decides = ("images", "model", "recipe", *(["fraction"] if name == "without-random" else []))
        made_of = {"name": name, "seed": seed, **{k: self.about[k] for k in decides}}
        return kept_params(self.models / f"{name}-seed{seed}.npz", initial, made_of, make)


def about(images: tuple[Images, Images], protocol: Protocol) -> dict[str, Any]:
    """Return what decides the numbers, as records keep it."""
    whole = hashlib.sha256()
    for part in images:
        whole.update(np.ascontiguousarray(part.images).data)
        whole.update(np.ascontiguousarray(part.labels).data)
    values = protocol._asdict()
    nested = {name: values.pop(name)._asdict() for name in ("model", "recipe")}
    made_of = {"benchmark": "vision", "images": whole.hexdigest(), **nested, **values}
    return {**made_of, "measured": NUMBERS}  # a run of before has not all of them


def _run(what: What, data: Data, runs: Runs, out: Path) -> Outcome:
    """Choose each method's point, run it by all seeds, and write the tables of one task."""
    rows = {name: CATALOGUE[name] for name in runs.methods}
    protocol = data.protocol
    at = {
        name: points_of(row, runs.points, epochs=protocol.epochs, batch_size=protocol.batch_size)
        for name, row in rows.items()
    }
    notes = [_of(what, data)]
    made = functools.partial(_records, what, data, out=out)
    if runs.points == "grid":
        tried = [Trial(name, point, TUNING_SEED) for name in rows for point in at[name]]
        chosen = nearest(made(tried))
        at = {name: [chosen[name]] for name in rows}
        notes.append(
            f"Each method's point is that of the smallest average gap on seed {TUNING_SEED}, whose "
            "other numbers are not here; its runs stand beside the others."
        )
    trials = [Trial(n, point, seed) for seed in runs.seeds for n in rows for point in at[n]]
    records = made(trials)
    title = f"Vision, {what}: {len(runs.seeds)} seeds"
    tables = finish(out, title, data.about, records, SHEETS, notes, is_timed=False)
    return Outcome(what, records, tables)


def _records(what: What, data: Data, trials: Sequence[Trial], *, out: Path) -> list[Record]:
    """Make runs beside the two references of each of their seeds, and compare them with these."""
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    whole = []
    for seed in seeds:
        whole += [Trial(name, {}, seed) for name in REFERENCES[::-1]]
        whole += [trial for trial in trials if trial.seed == seed]
    held = _Held(what, data)
    records = sweep(whole, out, data.about, edit=held.edit, evaluate=held.evaluate, say=data.say)
    return compared(records)


class _Held:
    """The pair of the seed whose runs are being made: one at a time, as models are large."""

    def __init__(self, what: What, data: Data):
        self.what: What = what
        self.data = data
        self.seed: int | None = None
        self.pair: Pair
        self.editor: Editor
        self.seconds = 0.0

    def edit(self, trial: Trial) -> PyTree:
        """Return the parameters of a trial."""
        protocol = self.data.protocol
        if trial.seed != self.seed:
            self.pair = self.data.pair(self.what, trial.seed)
            self.seed = trial.seed
            self.editor = Editor(
                self.pair.task,
                HAS,
                say=self.data.say,
                optimizer=SGD,
                fitted_rows=protocol.fitted_rows,
            )
        if trial.method in REFERENCES:
            task = self.pair.task
            self.seconds = self.pair.seconds[trial.method]
            return task.original if trial.method == UNTOUCHED else task.retrained
        row, task = CATALOGUE[trial.method], self.pair.task
        point = with_steps(trial.point, rows_of(task.forget), rows_of(task.retain))
        fitting = self.editor.fit(row, point, trial.seed)
        with Stopwatch() as watch:
            params = jax.block_until_ready(self.editor(row, point, trial.seed))
        self.seconds = fitting + watch.seconds
        return params

    def evaluate(self, params: PyTree) -> Found:
        """Measure what `edit` made last."""
        found = evaluate(self.pair.task.apply, params, self.pair.sets)
        return found._replace(numbers={**found.numbers, RTE: Measured(self.seconds)})


def _of(what: What, data: Data) -> str:
    shape = data.rows.images.shape[1:]
    share = f"{data.protocol.fraction:.0%} at random" if what == "random" else "a class"
    model = data.protocol.model
    shapes = jax.eval_shape(lambda key: _initial(model, shape, key), jax.random.key(0))
    single = " (of one channel each in its first stage)" if model.width in (1, 2, 4, 8) else ""
    size = sum(x.size for x in jax.tree.leaves(shapes))
    return (
        f"A residual network of {size:,} parameters with group norms{single} learns "
        f"{len(data.rows.labels):,} images of {'x'.join(map(str, shape))} and forgets {share}, "
        f"another for each seed; {len(data.test.labels):,} images to test on. RTE is in seconds: "
        "of a method its edit's, with the estimation of what it needs and without compiling; of "
        "the untouched and the retrained model their training's, with compiling."
    )


@functools.cache
def _network(model: Model, shape: tuple[int, int, int]) -> tuple[Callable, PyTree]:
    """One function for all seeds, so that they compile once."""
    return _made(model, shape, jax.random.key(0))


def _initial(model: Model, shape: tuple[int, int, int], key: Array) -> PyTree:
    return _made(model, shape, key)[1]


def _made(model: Model, shape: tuple[int, int, int], key: Array) -> tuple[Callable, PyTree]:
    return resnet(key=key, image_shape=shape, num_classes=NUM_CLASSES, **model._asdict())

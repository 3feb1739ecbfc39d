"""The digits scene: a small CNN forgets one hand, and in a second part one class."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit.data import Images, forget_class, forget_cluster, load_digits, split_digits
from jedit.methods.catalogue import CATALOGUE
from jedit.methods.row import Need, Pace, Reach
from jedit.models import cnn
from jedit.recipes.comparison.compare import compare
from jedit.recipes.comparison.task import ASIDE, MAIN, SHARES, Grid, Task
from jedit.recipes.fitting import Recipe, Trained, train
from jedit.recipes.progress import Say, Within
from jedit.report import Comparison, Guess, Picture
from jedit.requests.unseen import spread

LABEL = 7
RECIPE = Recipe((20,), batch_size=64, learning_rate=2e-3)
RATES = (1e-4, 3e-4, 1e-3)
SLOW = dict.fromkeys((Pace.PLAIN_ASCENT, Pace.ADAM_METRIC), (3e-5, 1e-4, 3e-4))
OWN_UNITS = {Pace.PREDICTED_KL: (1e-4, 3e-4, 1e-3), Pace.STEP_LENGTH: (0.03, 0.1, 0.3)}
GRID = Grid(
    methods=MAIN,
    budgets=(1e-3, 3e-3, 0.01, 0.03, 0.1),
    temperatures=(1.0, 4.0),
    damping=(0.01, 0.1),
    kfade_steps=(4,),
    rates=dict.fromkeys(Pace, RATES) | SLOW | OWN_UNITS,
    scales={Reach.WHOLE: (0.1, 0.3, 0.6, 1.0), Reach.FACTS: (0.3, 1.0, 3.0), Reach.SHARE: SHARES},
    looks=(2, 4, 8, 16, 32, 64, 128),
    batch_size=32,
    kl_budget=0.02,
)
# For `jedit demo --methods all`: all but those that need what a classifier has not.
ALL = GRID._replace(
    methods=tuple(
        row.name
        for row in CATALOGUE.values()
        if row.name not in ASIDE and not row.needs & {Need.REFUSALS, Need.ALTERNATES, Need.DIALOGUE}
    )
)
SHARE_SEEN = 0.7
SHOWN = 6  # images of the forget and of the held-out rows


class _Part(NamedTuple):
    """One part of the scene: the rows of the training set that it forgets, and a title."""

    name: str
    title: str
    what: str
    forget: np.ndarray
    retain: np.ndarray
    test: Images
    test_name: str


def digits(
    *,
    seed: int,
    say: Say,
    grid: Grid = GRID,
    recipe: Recipe = RECIPE,
    channels: tuple[int, ...] = (16, 32),
    hidden: int = 64,
) -> tuple[Comparison, ...]:
    """Train once, and for each part retrain without its forget set and compare.

    Args:
        seed: seed of the split, the training and the edits.
        say: a watcher, told of each stage.
        grid: settings that the methods are tried at.
        recipe: how the network is trained.
        channels: numbers of channels of the network's stages.
        hidden: width of the network's dense layer.

    Returns:
        The two parts: a cluster of look-alike samples of one class, and the whole class.
    """
    init_key, order_key, compare_key = (
        jax.random.fold_in(jax.random.key(seed), i) for i in range(3)
    )
    rows, test = split_digits(load_digits(), seed=seed)
    apply, initial = cnn(key=init_key, channels=channels, hidden=hidden)
    size = sum(x.size for x in jax.tree.leaves(initial))
    model = f"CNN, channels {', '.join(map(str, channels))}, hidden {hidden}, {size} parameters"

    def fit(part: Images) -> Trained:
        return train(apply, initial, part.as_batch(), recipe, key=order_key, say=say)[0]

    say(f"digits: training the model on {len(rows.labels)} images")
    original = fit(rows)
    found = []
    for part in _parts(rows, test, seed=seed):
        say(f"{part.name}: retraining without the {len(part.forget)} images to forget")
        retrained = fit(rows.take(part.retain))
        settings = {"model": model, "training": str(recipe), "seed": seed}
        found.append(
            _compare_part(
                part, rows, apply, original, retrained, grid, settings, key=compare_key, say=say
            )
        )
    return tuple(found)


def _parts(rows: Images, test: Images, *, seed: int) -> list[_Part]:
    cluster, not_cluster = forget_cluster(rows, LABEL, seed=seed)
    members, others = forget_class(rows, LABEL)
    look_alike = (
        f"{len(cluster)} look-alike images of the class {LABEL}: one k-means cluster of its "
        "pixels, which stands in for a writer, since who wrote which is not recorded"
    )
    kept_test = test.take(np.flatnonzero(test.labels != LABEL))
    return [
        _Part(
            "digits-cluster",
            "Digits: forget one hand",
            look_alike,
            cluster,
            not_cluster,
            test,
            "test",
        ),
        _Part(
            "digits-class",
            "Digits: forget a class",
            f"every image of the class {LABEL}",
            members,
            others,
            kept_test,
            f"test, without the class {LABEL}",
        ),
    ]


def _compare_part(
    part: _Part,
    rows: Images,
    apply: Callable,
    original: Trained,
    retrained: Trained,
    grid: Grid,
    settings: dict[str, object],
    *,
    key: Array,
    say: Say,
) -> Comparison:
    start = time.perf_counter()
    split_key, edit_key = jax.random.split(key)
    order = part.retain[np.asarray(jax.random.permutation(split_key, len(part.retain)))]
    seen, heldout = np.split(order, [round(SHARE_SEEN * len(order))])
    task = Task(
        apply=apply,
        original=original.params,
        retrained=retrained.params,
        forget=rows.take(part.forget).as_batch(),
        retain=rows.take(seen).as_batch(),
        heldout=rows.take(heldout).as_batch(),
        test=part.test.as_batch(),
        truth_ratio=None,
        select=None,
        chunk=256,
        probe=512,
        hidden_site="head/kernel",
        layers=("head/kernel",),
    )
    judged, models = compare(task, grid, key=edit_key, say=Within(part.name, say))
    edited = models[judged.chosen] if judged.chosen else original.params
    three = (original.params, edited, retrained.params)
    note = (
        "A small convolutional network learns the handwritten digits that ship with scikit-learn, "
        f"and is then made to forget {part.what}. The retrained model comes from the same recipe "
        "and the same initial parameters without those images. Retain images are cut in two: "
        "curvature and edits see the first part, the held-out part judges them."
    )
    return Comparison(
        name=part.name,
        title=part.title,
        notes=(note,),
        num_rows={
            "training": len(rows.labels),
            "forget": len(part.forget),
            "retain, seen by edits": len(seen),
            "retain, held out from edits": len(heldout),
            part.test_name: len(part.test.labels),
        },
        num_judged=judged.num_judged,
        settings={
            **settings,
            "K-FADE edits": "all parameters",
            "rows of the line search": min(task.probe, len(seen)),
        },
        seconds={
            "train": original.seconds,
            "retrain": retrained.seconds,
            "fit, edit and judge": time.perf_counter() - start,
        },
        kl_budget=grid.kl_budget,
        original=judged.original,
        retrained=judged.retrained,
        methods=judged.methods,
        curves=judged.curves,
        pictures=(
            *_pictures(apply, three, "forget", rows.take(part.forget)),
            *_pictures(apply, three, "retain", rows.take(heldout)),
        ),
    )


def _pictures(
    apply: Callable, models: tuple[PyTree, PyTree, PyTree], kind: str, rows: Images
) -> list[Picture]:
    """Return a few images with the guesses of the untouched, the edited and the retrained model."""
    shown = rows.take(spread(len(rows.labels), SHOWN))
    inputs = shown.as_batch().inputs
    guesses = []
    for params in models:
        probabilities = np.asarray(jax.nn.softmax(apply(params, inputs)))
        labels = probabilities.argmax(axis=1)
        guesses.append(
            [Guess(str(k), float(row[k])) for k, row in zip(labels, probabilities, strict=True)]
        )
    return [
        Picture(kind, tuple(map(tuple, image[..., 0].tolist())), str(label), *of_models)
        for image, label, *of_models in zip(shown.images, shown.labels, *guesses, strict=True)
    ]

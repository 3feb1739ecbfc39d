"""The field's protocol for image classifiers: train, forget, compare with a retrained model.

UA, RA, TA, MIA and the average gap are those of `jedit.metrics.unlearning_scores`.  The methods
and what each is tried at are in `tests.bench.vision_protocol.vision_methods`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.data import Digits, batches
from jedit.metrics import MembershipAttack, UnlearningScores, average_gap, membership_attack
from jedit.objectives import token_nll
from jedit.recipes.fitting import Recipe, train

Setting = dict[str, Any]


class Protocol(NamedTuple):
    """How much of everything.

    Attributes:
        recipe: of the original and of the retrained model; its last number of epochs counts.
        epochs: passes over the retain rows of a method that trains.
        batch_size: forget rows, and retain rows, of one of its steps.
        curvature_rows: rows that a curvature is estimated on.
        probe_rows: retain rows of K-FADE's line search.
        judged_rows: retain rows that RA and the attack look at.
        chunk: rows in one forward pass.
    """

    recipe: Recipe
    epochs: float = 1.0
    batch_size: int = 128
    curvature_rows: int = 2000
    probe_rows: int = 500
    judged_rows: int = 5000
    chunk: int = 500


class Task(NamedTuple):
    """An original model and what of its data is to be forgotten.

    Attributes:
        apply: `apply(params, images) -> logits`.
        params: of the model trained on everything.
        forget: rows to be forgotten.
        retain: all others, in random order.
        judged: chunks of the sets "forget", "retain" and "test" that scores are taken on.
    """

    apply: Callable
    params: PyTree
    forget: Batch
    retain: Batch
    judged: dict[str, list[Batch]]


class Method(NamedTuple):
    """How a method runs, and what it is tried at.

    Attributes:
        run: `(task, protocol, setting, key) -> (params, seconds)`; the seconds leave compilation
            out, and count a curvature or a saliency that the method needs.
        grid: settings.
    """

    run: Callable[[Task, Protocol, Setting, Array], tuple[PyTree, float]]
    grid: tuple[Setting, ...]


class Judged(NamedTuple):
    """A model's scores, the attack behind MIA, and the seconds that made the model."""

    scores: UnlearningScores
    attack: MembershipAttack
    seconds: float


def forget_random(digits: Digits, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose samples at random, whatever their class: the indices to forget and to retain."""
    order = np.random.default_rng(seed).permutation(len(digits.labels))
    forget, retain = np.split(order, [round(fraction * len(order))])
    return np.sort(forget), np.sort(retain)


def make_task(
    apply: Callable,
    params: PyTree,
    rows: Digits,
    parts: tuple[np.ndarray, np.ndarray],
    test: Digits,
    protocol: Protocol,
    *,
    seed: int,
) -> Task:
    """Cut the sets; test rows of a class of which nothing is retained are left out.

    Args:
        apply: the model.
        params: trained on all rows.
        rows: the training set.
        parts: its indices to forget and to retain.
        test: rows that no model was trained on.
        protocol: how many retain rows are judged, and in what chunks.
        seed: of the order of the retain rows.

    Returns:
        The task.
    """
    forget, retain = parts
    retain = np.random.default_rng(seed).permutation(retain)
    is_kept = np.isin(test.labels, rows.labels[retain])
    sets = {
        "forget": rows.take(forget),
        "retain": rows.take(retain[: protocol.judged_rows]),
        "test": test.take(np.flatnonzero(is_kept)),
    }
    judged = {name: list(batches(x.as_batch(), protocol.chunk)) for name, x in sets.items()}
    return Task(apply, params, rows.take(forget).as_batch(), rows.take(retain).as_batch(), judged)


def fit_model(
    apply: Callable, initial: PyTree, rows: Digits, protocol: Protocol, *, key: Array
) -> tuple[PyTree, float]:
    """Train by the recipe; the seconds are by the epochs after the first, which compiles."""
    last = protocol.recipe.epochs[-1]
    recipe = protocol.recipe._replace(epochs=tuple(sorted({1, last})))
    found = train(apply, initial, rows.as_batch(), recipe, key=key)
    seconds = found[-1].seconds
    if last > 1:
        seconds = (seconds - found[0].seconds) * last / (last - 1)
    return found[-1].params, seconds


def judge(task: Task, params: PyTree, seconds: float) -> Judged:
    """The scores of any params; what the attack sees of a row is its confidence p_y."""
    hits, confidence = {}, {}
    for name, chunks in task.judged.items():
        parts = jax.device_get([_outcomes(task.apply, params, chunk) for chunk in chunks])
        is_hit, p, counted = (np.concatenate(column) for column in zip(*parts, strict=True))
        hits[name] = float(is_hit[counted].mean())
        confidence[name] = np.nan_to_num(p[counted])  # of a model that has run away
    attack = membership_attack(confidence["retain"], confidence["test"], confidence["forget"])
    accuracies = (1 - hits["forget"], hits["retain"], hits["test"])
    return Judged(UnlearningScores(*accuracies, attack.efficacy), attack, seconds)


def run_method(
    task: Task, method: Method, setting: Setting, protocol: Protocol, *, key: Array
) -> Judged:
    """Run a method once and judge what it made."""
    return judge(task, *method.run(task, protocol, setting, key))


def tune(
    task: Task, retrained: Judged, method: Method, protocol: Protocol, *, key: Array
) -> tuple[Setting, list[float]]:
    """The setting with the smallest average gap, and the gaps of the whole grid."""
    found = (run_method(task, method, setting, protocol, key=key) for setting in method.grid)
    gaps = [average_gap(judged.scores, retrained.scores) for judged in found]
    return method.grid[int(np.argmin(gaps))], gaps


def unlearn_and_judge(
    task: Task,
    retrained: tuple[PyTree, float],
    chosen: Iterable[tuple[str, Method, Setting]],
    protocol: Protocol,
    *,
    key: Array,
) -> dict[str, Judged]:
    """One row of scores for each method, after those of the retrained and the untouched model."""
    rows = {"retrained": judge(task, *retrained), "untouched": judge(task, task.params, 0.0)}
    for name, method, setting in chosen:
        rows[name] = run_method(task, method, setting, protocol, key=key)
    return rows


@functools.partial(jax.jit, static_argnames="apply")
def _outcomes(apply: Callable, params: PyTree, batch: Batch) -> tuple[Array, Array, Array]:
    """Hits, confidence and which rows count, from one forward pass."""
    logits = apply(params, batch.inputs)
    targets = jnp.asarray(batch.targets)
    is_hit = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return is_hit, jnp.exp(-token_nll(logits, targets)), counted_outputs(batch, targets.shape)

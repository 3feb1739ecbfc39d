"""The scene of many small tasks: one language model answers all, and is made to unlearn one.

    forget ratio (u, e)    of task e's rows that nobody trained on, after task u was unlearned

Whether unlearning a task by random labels reaches rows that it was not shown (u = e), and what it
does to the other tasks, as in "Unforgettable Generalization in Language Models" (arXiv 2409.02228),
on `jedit.data.invented.token_tasks`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jedit import metrics
from jedit.attacks import ProbeScores, linear_probe
from jedit.core.batch import Batch
from jedit.data.invented.token_tasks import (
    LENGTH,
    NO,
    TASKS,
    VOCAB,
    YES,
    TaskRows,
    make_token_tasks,
)
from jedit.models import gpt
from jedit.objectives import RandomLabel, relabel_among
from jedit.objectives.hidden_states import Hidden
from jedit.recipes.fitting import Recipe, train
from jedit.tracing import Entering
from jedit.training import TrainingMethod

CHANCE = 0.5
HIDDEN = Entering("head/kernel")
SELECT = r"blocks/.*/kernel"


class Size(NamedTuple):
    """How large the scene is.

    Attributes:
        rows: number of rows of each task that the model is trained on.
        judged: number of rows of each task in each of the two sets that judge.
        forgotten: number of the task's rows that an unlearning method sees.
        retained: number of rows of each other task that it sees.
        width: width of the GPT.
        layers: number of its blocks.
        recipe: how it is trained.
    """

    rows: int = 2000
    judged: int = 400
    forgotten: int = 512
    retained: int = 64
    width: int = 64
    layers: int = 2
    recipe: Recipe = Recipe((20,), batch_size=128, learning_rate=2e-3)


class Room(NamedTuple):
    """A trained model and the rows of its tasks.

    Attributes:
        size: of the scene.
        apply: `apply(params, tokens) -> logits (n, seq, 2)`, of no and yes.
        params: trained on all tasks.
        rows: by task and set ("train", "choice", "test") the rows, of which the last output counts.
    """

    size: Size
    apply: Callable
    params: PyTree
    rows: dict[str, dict[str, Batch]]

    def sets(self, task: str) -> tuple[Batch, Batch]:
        """Return the rows that a method sees of a task to unlearn, and those of all others."""
        cut = lambda rows, n: jax.tree.map(lambda x: x[:n], rows)  # noqa: E731
        others = [
            cut(parts["train"], self.size.retained)
            for name, parts in self.rows.items()
            if name != task
        ]
        return cut(self.rows[task]["train"], self.size.forgotten), _joined(others)

    def hits(self, params: PyTree, part: str) -> Bool[np.ndarray, "tasks n"]:
        """Return which rows of a set are answered right, task by task in their order."""
        rows = _joined([parts[part] for parts in self.rows.values()])
        found = metrics.exact_memorization(self.apply, params, rows) == 1
        return found.reshape(len(self.rows), -1)


class Reading(NamedTuple):
    """What a probe of the hidden states reads of a task beside what the model says.

    Attributes:
        probe: a linear probe's accuracy on rows that nobody trained on.
        said: the model's own accuracy on them.
    """

    probe: ProbeScores
    said: float


@dataclasses.dataclass(frozen=True)
class Answering:
    """A language model that is asked for one of two answers: its logits of these alone."""

    apply: Callable

    def __call__(self, params: PyTree, tokens: PyTree) -> Float[Array, "batch seq answers"]:
        """Return the logits of no and of yes."""
        return self.apply(params, tokens)[..., NO : YES + 1]


def room(seed: int, size: Size = Size()) -> Room:  # noqa: B008 - a tuple
    """Train one model on all tasks of a seed."""
    initial, order = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))
    made = make_token_tasks(seed, rows=size.rows, judged=size.judged)
    rows = {task: {k: encoded(x) for k, x in parts.items()} for task, parts in made.items()}
    start = _gpt(size.width, size.layers, initial)[1]
    apply = _apply(size.width, size.layers)
    everything = _joined([parts["train"] for parts in rows.values()])
    params = train(apply, start, everything, size.recipe, key=order)[0].params
    return Room(size, apply, params, rows)


def encoded(rows: TaskRows) -> Batch:
    """Return rows as a batch whose last output alone counts, with 0 for no and 1 for yes."""
    targets, mask = np.zeros(rows.tokens.shape, np.int32), np.zeros(rows.tokens.shape, np.float32)
    targets[:, -1], mask[:, -1] = rows.answers - NO, 1
    return Batch(*map(jnp.asarray, (rows.tokens, targets, mask)))


def by_random_labels(
    found: Room, task: str, optimizer: Any, *, key: Array, batch_size: int = 64
) -> tuple[TrainingMethod, Batch]:
    """Return the paper's method, without anything that protects other tasks, and its rows."""
    rows = relabel_among(found.sets(task)[0], [0, 1], key=key)
    return TrainingMethod(RandomLabel(), optimizer, batch_size=batch_size), rows


def forget_ratios(
    before: Bool[np.ndarray, "tasks n"], after: Bool[np.ndarray, "tasks n"]
) -> dict[str, metrics.ForgetRatio]:
    """Return the forget ratio of every task: one row of the matrix."""
    return {
        task: metrics.forget_ratio(*pair, chance=CHANCE)
        for task, *pair in zip(TASKS, before, after, strict=True)
    }


def unnormed(size: Size) -> Entering:
    """Return the states within the last block's perceptron, which no norm holds at one length."""
    return Entering(f"blocks/{size.layers - 1}/mlp/down/kernel")


def predictors(found: Room, *, hidden: Hidden = HIDDEN) -> dict[str, metrics.TaskPredictors]:
    """Return the predictors of every task, on the rows that a method sees when it is unlearned."""
    return {
        task: metrics.task_predictors(found.apply, found.params, found.sets(task)[0], hidden=hidden)
        for task in found.rows
    }


def read_by_probe(found: Room, params: PyTree, task: str) -> Reading:
    """Fit a probe on the task's training rows with their true labels, and ask it about others."""
    parts, states, labels = found.rows[task], [], []
    for part in ("train", "test"):
        hidden = jax.jit(HIDDEN, static_argnums=0)(found.apply, params, parts[part].inputs)
        states.append(np.asarray(hidden, np.float64)[:, -1])
        targets = parts[part].targets
        assert targets is not None
        labels.append(np.asarray(targets)[:, -1])
    probe = linear_probe(states[0], labels[0], states[1], labels[1])
    said = metrics.accuracy(found.apply, params, parts["test"])
    return Reading(probe, said)


def _joined(parts: list[Batch]) -> Batch:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _gpt(width: int, layers: int, key: Array) -> tuple[Callable, PyTree]:
    return gpt(
        key=key, vocab=VOCAB, width=width, num_layers=layers, num_heads=4, max_len=LENGTH + 1
    )


@functools.cache
def _apply(width: int, layers: int) -> Callable:
    """One function for all seeds, so that they share what is compiled."""
    return Answering(_gpt(width, layers, jax.random.key(0))[0])

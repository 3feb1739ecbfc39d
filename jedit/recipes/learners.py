"""The learners that the stability gap is measured on: nothing kept, rows, or what guards weights.

    naive       nothing is kept
    replay      some rows of every task are learnt beside the new ones
    joint       all rows of every task are
    ewc         parameters are held in the curvature of earlier tasks' outputs
    ogd         steps are taken off gradients of earlier tasks' logits
    null_space  steps are taken off the inputs that earlier tasks use (the geometry-aware form)
    intact      layers keep their function in the boxes of earlier tasks' activations
    refresh     replay, each batch unlearnt first where earlier tasks do not look

All take the same optimizer, so that they differ in what they keep alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.curvature import Estimator
from jedit.geometry import null_space as free_directions
from jedit.methods import (
    EWC,
    InTAct,
    activation_intervals,
    anchored,
    ogd,
    refresh_learning,
    stored_gradients,
)
from jedit.objectives import LearnNLL, replayed_states, with_retain
from jedit.objectives.hidden_states import Hidden
from jedit.recipes.learning_on import Kept, Learner, plain
from jedit.training import TrainingMethod
from jedit.transforms import project_to_null_space


def naive(optimizer: optax.GradientTransformation) -> Learner:
    """Return the learner that keeps nothing: the floor."""
    return Learner(plain(optimizer))


def replay(optimizer: optax.GradientTransformation, *, size: int, weight: float = 1.0) -> Learner:
    """Return the learner that learns kept rows beside the new ones.

    Args:
        optimizer: the optimizer.
        size: how many rows are kept, the same number of every task.
        weight: weight of their mean loss beside the new rows'; 1 weighs both alike.
    """
    method = TrainingMethod(with_retain(LearnNLL(), weight=weight), optimizer)
    return Learner(method, KeepRows(size))


def joint(optimizer: optax.GradientTransformation) -> Learner:
    """Return the learner that keeps every row and learns all alike: what more memory would come to.

    Its loss is the mean over all rows so far, from a batch of the new ones and one of the others.
    """

    def method(kept: Kept) -> TrainingMethod:
        others = len(kept.rest)  # of as many rows each
        objective = with_retain(LearnNLL(), weight=float(others))
        return TrainingMethod(objective, optax.chain(optax.scale(1 / (others + 1)), optimizer))

    return Learner(method, KeepRows(None), plain(optimizer))


def ewc(
    optimizer: optax.GradientTransformation, estimator: Estimator, *, strength: float
) -> Learner:
    """Return the learner that holds parameters in a curvature.

    Args:
        optimizer: the optimizer.
        estimator: `diagonal(...)` for EWC itself, `kfac(...)` for ours.
        strength: λ.
    """
    method = TrainingMethod(with_retain(LearnNLL(), EWC(), weight=strength), optimizer)
    return Learner(method, KeepAnchor(estimator))


def orthogonal(optimizer: optax.GradientTransformation, *, rank: int, samples: int) -> Learner:
    """Return the learner whose steps are taken off stored gradients (OGD).

    Args:
        optimizer: the optimizer.
        rank: how many gradients there is room for.
        samples: how many a task stores.
    """
    return Learner(ogd(LearnNLL(), optimizer), KeepGradients(rank, samples), plain(optimizer))


def null_space(
    optimizer: optax.GradientTransformation, estimator: Estimator, *, energy: float
) -> Learner:
    """Return the learner whose steps earlier tasks' inputs do not see.

    Args:
        optimizer: the optimizer.
        estimator: `kfac(...)`, whose input moments are looked at.
        energy: the share of the inputs' energy that is left free.
    """

    def method(kept: Kept) -> TrainingMethod:
        assert kept.reference is not None
        projector = free_directions(kept.reference.curvature, threshold=energy)
        return plain(optax.chain(optimizer, project_to_null_space(projector)))

    return Learner(method, KeepAnchor(estimator), plain(optimizer))


def intact(
    optimizer: optax.GradientTransformation,
    sites: tuple[str, ...],
    *,
    strength: float,
    unheld: tuple[str, ...] = (),
) -> Learner:
    """Return the learner of InTAct, its three guards weighted by one strength.

    Args:
        optimizer: the optimizer.
        sites: the sites whose inputs have intervals.
        strength: a factor of the code's weights of drift, function and alignment.
        unheld: those of the sites whose weights are free.
    """
    weights = dict.fromkeys(("held_weight", "drift_weight", "align_weight"), strength)
    penalty = InTAct(sites, unheld, **weights)
    method = TrainingMethod(with_retain(LearnNLL(), penalty), optimizer)
    first = with_retain(LearnNLL(), InTAct(sites, **dict.fromkeys(weights, 0.0)))
    return Learner(method, KeepIntervals(sites), TrainingMethod(first, optimizer))


def refresh(
    optimizer: optax.GradientTransformation,
    estimator: Estimator,
    *,
    size: int,
    rate: float,
    weight: float = 1.0,
    damping: float = 0.1,
) -> Learner:
    """Return replay with each batch unlearnt first.

    Args:
        optimizer: the optimizer that relearns.
        estimator: of the Fisher matrix of earlier tasks.
        size: how many rows are kept, as `replay` takes it.
        rate: γ of the unlearning.
        weight: as `replay` takes it.
        damping: λ, relative to each block's mean eigenvalue.
    """
    method = refresh_learning(
        with_retain(LearnNLL(), weight=weight), optimizer, rate=rate, damping=damping
    )
    return Learner(method, KeepBoth(KeepRows(size), KeepAnchor(estimator)), plain(optimizer))


@dataclasses.dataclass(frozen=True)
class KeepRows:
    """Keeps rows of every task, the same number of each; None: all of them."""

    size: int | None

    def __post_init__(self) -> None:
        check_numbers(COUNT, size=self.size)

    def __call__(
        self, apply: Apply, params: PyTree, rows: PyTree, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return the rows; `size` of them, whatever the number of tasks, so that shapes stay."""
        del apply, params
        count = len(jax.tree.leaves(rows)[0])
        shuffled = np.asarray(jax.random.permutation(key, count))
        before = () if kept is None else kept.rest
        tasks = (*before, jax.tree.map(lambda x: np.asarray(x)[shuffled], rows))
        if self.size is None:
            parts = tasks
        else:
            shares = [len(x) for x in np.array_split(np.arange(self.size), len(tasks))]
            # A task that has fewer rows than its share repeats some.
            parts = [
                jax.tree.map(lambda x, n=n: np.resize(x, (n, *x.shape[1:])), task)
                for task, n in zip(tasks, shares, strict=True)
            ]
        whole = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *parts)
        return Kept(whole, rest=tasks if self.size is None else _first(tasks, self.size))


def _first(tasks: tuple[PyTree, ...], size: int) -> tuple[PyTree, ...]:
    """Return at most so many rows of each task: more are in no later share."""
    return tuple(jax.tree.map(lambda x: x[:size], task) for task in tasks)


@dataclasses.dataclass(frozen=True)
class KeepGeneral:
    """Keeps rows of the first task alone, as GeRe keeps general texts and nothing of any task.

    Attributes:
        size: how many rows.
        hidden: whose bands are noted when the first task has been learnt; None: the rows alone are
            kept.
        spread: as `replayed_states` takes it.
    """

    size: int
    hidden: Hidden | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(COUNT, size=self.size)

    def __call__(
        self, apply: Apply, params: PyTree, rows: PyTree, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return what is kept after the first task, whichever this is.

        Args:
            apply: the model.
            params: where the model stands after the first task.
            rows: the task's rows.
            kept: what was kept before.
            key: which rows are drawn.
        """
        if kept is not None:
            return kept
        count = len(jax.tree.leaves(rows)[0])
        # Fewer rows than that come again.
        chosen = np.resize(np.asarray(jax.random.permutation(key, count)), self.size)
        drawn = jax.tree.map(lambda x: jnp.asarray(x)[chosen], rows)
        if self.hidden is None:
            return Kept(drawn)
        return Kept(replayed_states(self.hidden, apply, params, drawn, spread=self.spread))


@dataclasses.dataclass(frozen=True)
class KeepAnchor:
    """Keeps the parameters and the curvature, all tasks' together."""

    estimator: Estimator

    def __call__(
        self, apply: Apply, params: PyTree, rows: Batch, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return the anchor as the reference."""
        del apply
        before = None if kept is None else kept.reference
        return Kept(reference=anchored(self.estimator, params, rows, key=key, before=before))


@dataclasses.dataclass(frozen=True)
class KeepGradients:
    """Keeps gradients of the logits."""

    rank: int
    samples: int

    def __call__(
        self, apply: Apply, params: PyTree, rows: Batch, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return the gradients as the reference."""
        before = None if kept is None else kept.reference
        given = {"rank": self.rank, "samples": self.samples, "key": key, "before": before}
        return Kept(reference=stored_gradients(apply, params, rows, **given))


@dataclasses.dataclass(frozen=True)
class KeepIntervals:
    """Keeps the intervals of activations."""

    sites: tuple[str, ...]

    def __call__(
        self, apply: Apply, params: PyTree, rows: Batch, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return the intervals as the reference."""
        del key  # every row is looked at
        before = None if kept is None else kept.reference
        return Kept(reference=activation_intervals(apply, params, rows, self.sites, before=before))


@dataclasses.dataclass(frozen=True)
class KeepBoth:
    """Keeps the rows of one and the reference of the other."""

    rows: Callable[..., Kept]
    reference: Callable[..., Kept]

    def __call__(
        self, apply: Apply, params: PyTree, rows: Batch, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return what both keep."""
        one, other = jax.random.split(key)
        mine = self.rows(apply, params, rows, kept, key=one)
        theirs = self.reference(apply, params, rows, kept, key=other)
        return Kept(mine.rows, theirs.reference, mine.rest)

"""The loop of `forget`, piece by piece: steps, looks at the rows and the price, and its saves.

A look after every so many steps judges which rows are done and what the edit costs so far; the
piece of the path that passes the budget is shortened. With a checkpoint every leg of the walk (a
rewind, natural steps, their recovery) is a job of its own, saved at its looks, or where it has none
but the last after every so many steps; a leg that is broken off goes on from there, to the bit.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch, Resumable
from jedit.curvature import Curvature
from jedit.edits import edit_between
from jedit.geometry import RetainKl, largest_step_within
from jedit.geometry.parts import ahead, moved
from jedit.requests.unseen import Score, p_value_of, take, targets
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from jedit.training.freezing import merge, split, which_are_trained
from jedit.training.method import prepared
from jedit.training.watch import History

Stopped = Literal["unseen", "budget", "steps"]
HALVINGS = 6  # of a piece of the path that leads past unseen rows; arbitrary


class Look(NamedTuple):
    """What a look found.

    Attributes:
        step: number of steps taken before it.
        p_value: of the test; NaN without unseen rows.
        true_kl: KL(θ₀ ‖ θ) on the held-out retain rows, nats per output.
        mean_score: mean of the forget rows' scores: without other answers of their losses, nats
            per output.
    """

    step: int
    p_value: float
    true_kl: float
    mean_score: float


class Judging(NamedTuple):
    """What a look judges by, and who is told what it found."""

    score: Score
    price: RetainKl
    significance: float
    budget: float | None
    watch: Callable[[Look], Any] | None = None


class Walk:
    """Where the loop stands, and what was found.

    Attributes:
        state: of the loop.
        change: what is edited, by path, at the last look.
        stopped: why it ends; "steps" until there is another reason.
        score: scores of the forget rows at the last look.
        is_done: which of them have reached their targets.
        level: scores of the unseen rows.
        looks: what each look found.
    """

    def __init__(
        self,
        apply: Apply,
        params: PyTree,
        sets: tuple[PyTree, Batch],
        judging: Judging,
        *,
        key: Array,
        checkpoint: Resumable | None = None,
    ):
        self._apply, self._start, self._sets, self._key = apply, params, sets, key
        self._by, self._checkpoint = judging, checkpoint
        self.level = judging.score.level(params)
        self.state = LoopState(0, params, None, params)
        self.change: dict[str, Array] = {}
        self.stopped: Stopped = "steps"
        self.looks: list[Look] = []
        self._judge(0.0, self._scores({}))

    def begin_at(self, params: PyTree) -> None:
        """Begin elsewhere; the given params stay the reference."""
        self.state = self.state._replace(params=params)

    def go(
        self,
        name: str,
        method: TrainingMethod,
        steps: int,
        *,
        every: int,
        is_raising: bool,
        letting_go: TrainingMethod | None = None,
    ) -> None:
        """Take the steps of one leg, and a look after so many.

        Those that raise rows draw what is left, and end where the rows are like unseen ones; where
        `letting_go` is given, it steps while the rows are past these.
        """
        ready: dict[int, tuple[TrainingMethod, tuple[PyTree, PyTree]]] = {}  # by identity
        begin, end = self.state.step, self.state.step + steps
        numbers = (steps, every, method.batch_size, begin)
        with self._going_on(name, method, numbers) as save:
            while self.state.step < end and self.stopped != "budget":
                if is_raising and self.stopped == "unseen":
                    break
                left = ~self.is_done if is_raising else np.ones_like(self.is_done)
                look = min(begin + ((self.state.step - begin) // every + 1) * every, end)
                stop = look
                # Between two looks there is no save, for it would have to hold what the first
                # found; a leg that is looked at once, at its end, is saved on the way.
                if self._checkpoint is not None and every >= steps:
                    stop = min(look, self.state.step + self._checkpoint.every)
                now = letting_go if letting_go is not None and self._is_past(self.score) else method
                # What is dear is prepared once a leg, where there is a step to take; the sets stay
                # as they are given, for the next leg has a method of its own.
                if id(now) not in ready:
                    ready[id(now)] = prepared(now, self._apply, self._start, self._sets)
                now, sets = ready[id(now)]
                self._ahead(now, sets, stop - self.state.step, left)
                if stop == look:
                    self._look(_difference(self._start, self.state.params), is_raising=is_raising)
                # Where the budget ends the path what is left of it is no state of the loop's.
                if self.stopped != "budget":
                    save(self.state.step == end or (is_raising and self.stopped == "unseen"))
        self.state = self.state._replace(optimizer_state=None)

    @contextlib.contextmanager
    def _going_on(
        self, name: str, method: TrainingMethod, numbers: tuple[int, ...]
    ) -> Iterator[Callable[[bool], None]]:
        """Begin a leg, or go on with it.

        Yields:
            What saves the leg where it stands, if that is its end or a save is due.
        """
        if self._checkpoint is None:
            yield lambda _: None
            return
        steps, every, _, begin = numbers
        part = self._checkpoint.part(name)
        with contextlib.closing(part):
            is_trained = which_are_trained(self.state.params, method.trainable)
            trained = split(self.state.params, is_trained)
            fresh = method.optimizer.init(trained)
            by = (self._by.budget, self._by.significance, self._by.price.batches, self.level)
            given = (self._start, self._sets, self._key, name, numbers, by)
            begun = (trained, _moving(fresh))
            done, (trained, moving), past = part.resume("forget", given, begun)
            self.state = self.state._replace(optimizer_state=_with_fixed(moving, fresh))
            if done:
                reached = merge(trained, self.state.params, is_trained)
                self.state = self.state._replace(step=done, params=reached)
                self.looks = _looks_of(past["looks"])
                if done == begin + steps or (done - begin) % every == 0:
                    self.change = _difference(self._start, reached)
                    self._rejudge()

            # The state alone holds the curvatures from here on.
            del trained, fresh, begun, moving, given, by
            saved = self.state.step

            def save(is_end: bool) -> None:
                nonlocal saved
                if not is_end and self.state.step - saved < part.every:
                    return
                saved = self.state.step
                now = split(self.state.params, is_trained), _moving(self.state.optimizer_state)
                part.save(self.state.step, now, {"looks": _bits_of(self.looks)})

            yield save

    def _ahead(
        self,
        method: TrainingMethod,
        sets: tuple[PyTree, PyTree],
        steps: int,
        is_left: np.ndarray,
    ) -> None:
        forget, retain = sets
        # As many rows as there were, those that are left several times over: one shape, and so one
        # program.
        left = np.flatnonzero(is_left) if is_left.any() else np.arange(len(is_left))
        forget = take(forget, np.resize(left, len(is_left)))
        reached: list[LoopState] = []

        def keep(state: LoopState, history: History) -> None:
            del history
            reached.append(state)

        unlearn(
            method,
            self._apply,
            self.state,
            forget,
            retain,
            steps=self.state.step + steps,
            # One key for all pieces: the rows of a step depend on its number.
            key=jax.random.clone(self._key),
            watch=Watch(keep),
        )
        self.state = reached[-1]

    def _look(self, now: dict[str, Array], *, is_raising: bool) -> None:
        score = self._scores(now)
        if is_raising and self._is_past(score):
            now = self._back_to_unseen(now)
            self.state = self.state._replace(params=moved(self._start, now))
            # As a run that goes on from here would find it, to the last bit.
            now = _difference(self._start, self.state.params)
            score = self._scores(now)
        spent, budget = self._by.price(now), self._by.budget
        is_over = budget is not None and not spent <= budget  # NaN is over, too
        if is_over:
            assert budget is not None
            ends, prices = (self.change, now), (self.looks[-1].true_kl, spent)
            now, spent = _back(self._by.price, ends, prices, budget)
            score = self._scores(now)
        self.change = now
        self._judge(spent, score)
        if is_over:
            self.stopped = "budget"

    def back_to(self, change: dict[str, Array]) -> None:
        """Go back to what was edited before, with a look there."""
        self.state = self.state._replace(params=moved(self._start, change))
        self.change = _difference(self._start, self.state.params)
        self._judge(self._by.price(self.change), self._scores(self.change))

    def _is_past(self, score: np.ndarray) -> bool:
        """Return whether the rows can be told from unseen ones by knowing less of them alone."""
        if not len(self.level):
            return False
        least = self._by.significance
        return p_value_of(self.level, score) <= least < p_value_of(score, self.level)

    def _back_to_unseen(self, now: dict[str, Array]) -> dict[str, Array]:
        """Shorten the last piece of the path to where its rows are most like unseen ones.

        Scores that are spread otherwise than those may be told by both tests there; then it ends
        where the one that stops it passes.
        """
        move, low, high = ahead(now, self.change, -1.0), 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            score = self._scores(ahead(self.change, move, middle))
            # The one p-value falls along the path, as the other grows.
            least = max(p_value_of(self.level, score), self._by.significance)
            low, high = (low, middle) if least < p_value_of(score, self.level) else (middle, high)
        return ahead(self.change, move, high)

    def _scores(self, change: dict[str, Array]) -> np.ndarray:
        return self._by.score.of(moved(self._start, change))

    def _judge(self, spent: float, score: np.ndarray) -> None:
        self.score = score
        p_value = _p_value(self.score, self.level)
        self.looks.append(Look(self.state.step, p_value, spent, float(np.mean(self.score))))
        self._see()
        if self._by.watch is not None:
            self._by.watch(self.looks[-1])

    def _rejudge(self) -> None:
        """Find anew what the last look of a leg that goes on had found."""
        self.score = self._scores(self.change)
        self._see()

    def _see(self) -> None:
        self.is_done = _judged(self.score, self.level)
        is_like = any(look.p_value > self._by.significance for look in self.looks)
        if self.stopped == "steps" and is_like:
            self.stopped = "unseen"


def _judged(scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return which rows have reached their targets; none where there are no unseen rows."""
    return scores >= targets(scores, level) if len(level) else np.zeros(len(scores), bool)


def _p_value(scores: np.ndarray, level: np.ndarray) -> float:
    return p_value_of(scores, level) if len(level) else math.nan


def _difference(before: PyTree, after: PyTree) -> dict[str, Array]:
    return {p: c for p, c in edit_between(before, after).blocks.items() if bool(jnp.any(c != 0))}


def _back(
    price: RetainKl,
    ends: tuple[dict[str, Array], dict[str, Array]],
    prices: tuple[float, float],
    budget: float,
) -> tuple[dict[str, Array], float]:
    """Shorten the last piece of the path, between two changes, to what the budget allows.

    Returns:
        The change where it ends now, and its price.
    """
    before, now = ends
    move = ahead(now, before, -1.0)

    def along(alpha: float) -> float:
        return price(move, alpha, start=before)

    # The root of the KL is nearly linear between the ends of a short piece.
    low, high = (math.sqrt(max(kl, 0.0)) for kl in prices)
    guess = 0.2
    if math.isfinite(high):
        guess = max((0.9975 * math.sqrt(budget) - low) / (high - low), 0.0)
    alpha = largest_step_within(along, guess, budget, limit=1.0)
    return ahead(before, move, alpha), along(alpha)


def _is_curvature(x: Any) -> bool:
    return isinstance(x, Curvature)


def _moving(state: PyTree) -> PyTree:
    """Return an optimizer's state without its curvatures, which are fixed, large, and there."""
    return jax.tree.map(lambda x: None if _is_curvature(x) else x, state, is_leaf=_is_curvature)


def _with_fixed(moving: PyTree, fresh: PyTree) -> PyTree:
    """Return a fresh state with all of it but its curvatures put in from another."""
    leaves, structure = jax.tree.flatten(fresh, is_leaf=_is_curvature)
    moved_on = iter(jax.tree.leaves(moving))
    return jax.tree.unflatten(
        structure, [leaf if _is_curvature(leaf) else next(moved_on) for leaf in leaves]
    )


# Looks are Python's numbers, of 64 bits, which JAX's arrays may have no room for: saved in halves.
def _bits_of(looks: list[Look]) -> Array:
    return jnp.asarray(np.asarray(looks, np.float64).view(np.uint32))


def _looks_of(bits: Array) -> list[Look]:
    rows = np.ascontiguousarray(np.asarray(bits)).view(np.float64).tolist()
    return [Look(int(step), *found) for step, *found in rows]

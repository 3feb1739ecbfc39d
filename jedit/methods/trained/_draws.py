"""To draw answers, and learn from them: the loop of methods that a model's own answers teach."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key, PyTree

from jedit.objectives import Played
from jedit.training.loop import unlearn
from jedit.training.method import TrainingMethod
from jedit.training.watch import History, LoopState, Watch


class Lesson(NamedTuple):
    """How answers are drawn, and what is learnt from them.

    Attributes:
        play: `(params, *, key) -> Played`, given params as `told` makes them.
        rows: `(params, Played) -> rows` for the method's objective; None: nothing is learnt.
        method: what learns from all rows of a draw at once.
        updates: steps of the optimizer for one draw.
        told: what `play` and `look` are given of the parameters.
        look: told of the number of draws learnt from, and the parameters there; or None.
    """

    play: Callable[..., Played]
    rows: Callable[[PyTree, Played], PyTree]
    method: TrainingMethod
    updates: int
    told: Callable[[PyTree], PyTree]
    look: Callable[[int, PyTree], Any] | None


def learn_from_draws(
    lesson: Lesson,
    apply: Callable[[PyTree, PyTree], Array],
    state: LoopState,
    *,
    draws: int,
    play_key: Key[Array, ""],
    order_key: Key[Array, ""],
) -> tuple[LoopState, list[Played], list[History]]:
    """Draw, learn, and draw again.

    Returns:
        Where the loop ends, what was drawn, and the history of each draw that taught something.
    """
    played, histories = [], []
    if lesson.look is not None:
        lesson.look(0, lesson.told(state.params))
    for draw in range(draws):
        params = lesson.told(state.params)
        drawn = lesson.play(params, key=jax.random.fold_in(play_key, draw))
        played.append(drawn)
        rows = lesson.rows(state.params, drawn)
        if rows is not None:
            ends: list[LoopState] = []
            _, history = unlearn(
                lesson.method._replace(batch_size=len(jax.tree.leaves(rows)[0])),
                apply,
                state,
                rows,
                steps=state.step + lesson.updates,
                key=jax.random.clone(order_key),  # the loop goes on by the number of its step
                watch=Watch(_keep_in(ends), every=lesson.updates),
            )
            state = ends[-1]
            histories.append(history)
        if lesson.look is not None:
            lesson.look(draw + 1, lesson.told(state.params))
    return state, played, histories


def _keep_in(ends: list[LoopState]) -> Callable[..., None]:
    def keep(state: LoopState, history: object) -> None:
        del history
        ends.append(state)

    return keep

"""A method whose curvature follows the parameters: taken anew after so many steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Key, PyTree

from jedit.core.arguments import check_function, check_kind
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers
from jedit.core.display import short_repr
from jedit.curvature import Curvature
from jedit.training.loop import unlearn
from jedit.training.method import TrainingMethod
from jedit.training.steps import joined
from jedit.training.watch import History, LoopState, Watch
from jedit.transforms import refresh_curvature


class Refit(NamedTuple):
    """When a curvature is taken anew, and how.

    Attributes:
        moments: `(params, reference) -> Curvature`, of one structure; the reference is the params
            before unlearning.
        every: number of steps after which it is; an epoch of the forget rows, in RepSelect.
    """

    moments: Callable[[PyTree, PyTree], Curvature]
    every: int

    __repr__ = short_repr


def unlearn_refitted(
    make: Callable[[Curvature], TrainingMethod],
    apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    forget: Batch | PyTree,
    retain: Batch | PyTree | None = None,
    *,
    refit: Refit,
    steps: int,
    key: Key[Array, ""],
) -> tuple[PyTree, History]:
    """Run a method of a curvature that is estimated again every so many steps.

        draws, steps_key = jax.random.split(key)

        def moments(params, reference):
            rows = map(answers_only, batches(forget, 32))
            again = jax.random.clone(draws)
            return repselect_moments(apply, params, rows, reference=reference, key=again)

        refit = Refit(moments, every=max(1, len(forget.targets) // 32))
        edited, history = unlearn_refitted(
            repselect, apply, params, forget, refit=refit, steps=10 * refit.every, key=steps_key
        )

    The rows of each step are those that `unlearn` draws, and so is the result where the moments do
    not change.

    Args:
        make: of a curvature, the method, such as `repselect` or a function around it.
        apply: `apply(params, inputs) -> outputs`.
        params: where to start, and the reference.
        forget: the whole forget set.
        retain: the whole retain set, or None for methods that do without.
        refit: how and when.
        steps: number of updates in all.
        key: the random key that decides which rows a step sees.

    Returns:
        The new params, and a history as of `unlearn`.

    Raises:
        TypeError: an argument is something else.
        ValueError: numbers out of their range, or as `unlearn` refuses.
    """
    check_numbers(COUNT_OR_ZERO, steps=steps)
    check_kind(refit, Refit, "refit", "such as Refit(moments, every=10)")
    check_function(refit.moments, "moments", "(params, reference)")
    check_numbers(COUNT, every=refit.every)

    def part(method, state, stop, watch):
        # The same key, of which each part takes its own steps' rows.
        again = jax.random.clone(key)
        sets = (forget, retain)
        return unlearn(method, apply, state, *sets, steps=stop, key=again, watch=watch)

    method = make(refit.moments(params, params))
    state, histories = params, []
    for stop in range(refit.every, steps, refit.every):
        seen: list[LoopState] = []
        watch = Watch(lambda state, _, seen=seen: seen.append(state))
        histories.append(part(method, state, stop, watch)[1])
        (reached,) = seen
        moments = refit.moments(reached.params, params)
        optimizer_state = refresh_curvature(reached.optimizer_state, moments)
        state = LoopState(reached.step, reached.params, optimizer_state, params)
    end, last = part(method, state, steps, None)
    return end, joined([*histories, last])

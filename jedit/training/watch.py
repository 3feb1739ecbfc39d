"""Where a loop stands, and who looks at it on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, PyTree

from jedit.core.batch import Resumable
from jedit.core.display import short_repr

History = dict[str, Array]


class LoopState(NamedTuple):
    """The state of a loop after some steps: all it needs to go on from there.

    Attributes:
        step: updates made so far.
        params: the parameters, frozen ones included.
        optimizer_state: the optimizer's state, of the trained parameters; None: it begins anew.
        reference: the params before unlearning, which objectives compare with; None: `params` are.
    """

    step: int
    params: PyTree
    optimizer_state: PyTree
    reference: PyTree | None = None

    __repr__ = short_repr


class Watch(NamedTuple):
    """The observer of a loop: what is called, how often, and where the state is saved.

    A retain budget is a callback that says when it is spent:

        def spent(state, history):
            return output_kl(apply, state.reference, state.params, heldout) > 0.05

    Attributes:
        callback: gets the `LoopState` and the history since the last call. The arrays of its params
            and optimizer state are overwritten when the loop goes on: copy what is to be kept. If
            it returns something true the loop stops, and the params returned are those of the call
            before.
        every: call `callback` after so many steps, and after the last; None: after the last.
        checkpoint: a `jedit.Checkpoint`: the loop's state is saved every so many steps, and the
            same call again goes on from the last save, to the bit; the callback is called again for
            the steps that are taken again. The functions must be the same too, which is not
            checked. The programs are those of the checkpoint's `every`, if there is no callback's.
    """

    callback: Callable[[LoopState, History], Any] | None = None
    every: int | None = None
    checkpoint: Resumable | None = None

    __repr__ = short_repr

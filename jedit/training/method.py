"""What a method that trains is: an objective, an optimizer, and how they are run."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import optax
from jaxtyping import Int, PyTree

from jedit.core.display import short_repr
from jedit.objectives import Objective


class TrainingMethod(NamedTuple):
    """An objective and the optimizer that makes a method of it: what `unlearn` runs.

        method = TrainingMethod(with_retain(NPO()), optax.adam(1e-4))
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Attributes:
        objective: `(apply, params, forget, retain, reference) -> (scalar, aux)`, lowered; those of
            `jedit.objectives` are such values. forget and retain are the rows of one step,
            reference the params before unlearning, aux a dict of scalars.
        optimizer: any optax transform, learning rate included; its update also gets `value=`, the
            objective's, and what `update_args` returns.
        update_args: `(apply, params, forget, retain, reference) -> dict` of further keyword
            arguments of the optimizer's update, computed at each step; a tree like params is cut as
            they are, and a function of params still gets whole ones, with its further arguments as
            they are. None: there are none.
        trainable: regular expression; a parameter in whose path it is not found stays bit-identical
            and has neither gradient nor optimizer state: in the optimizer's trees, None stands
            there. None: all real parameters are trained.
        batch_size: rows of each set in a step, 32 (arbitrary); a smaller set is taken whole.
        pairing: `(*, epoch) -> (num_forget, several)` row numbers of the retain set: in its epoch e
            a forget row brings these with it, and no others are drawn. `jedit.data.pair_in_turn`
            and `pair_by_entity` are such functions, with their other arguments bound by
            `functools.partial`. Row numbers are those of the sets that `unlearn` is given, so that
            `jedit.forget`, which gives it other ones, refuses a pairing. None: retain rows are
            drawn by themselves.
        prepare: `(apply, reference, forget, retain) -> (forget, retain)`, run once before the first
            step: what the objective wants to know of every row, and is dear, is put beside the
            rows there. None: the sets are taken as they are.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    update_args: Callable[..., dict] | None = None
    trainable: str | None = None
    batch_size: int = 32
    pairing: Callable[..., Int[np.ndarray, "forget several"]] | None = None
    prepare: Callable[..., tuple[PyTree, PyTree]] | None = None

    __repr__ = short_repr


def prepared(
    method: TrainingMethod, apply: Callable, reference: PyTree, sets: tuple[PyTree, PyTree]
) -> tuple[TrainingMethod, tuple[PyTree, PyTree]]:
    """Return the sets as a method's objective takes them, and a method that takes them so.

    For whoever runs a method several times on the same sets: `unlearn` prepares by itself.

    Args:
        method: the method.
        apply: `apply(params, inputs) -> outputs`.
        reference: the params before unlearning.
        sets: the forget and the retain set.
    """
    if method.prepare is None:
        return method, sets
    return method._replace(prepare=None), method.prepare(apply, reference, *sets)

"""What a method that trains hands to `jedit.unlearn`."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from jedit.core.display import short_repr


class TrainingMethod(NamedTuple):
    """An objective, the optimizer that makes the method of it, and what that wants at each step.

        method = rosu(apply, optax.sgd(0.01), radius=0.05)
        params, history = jedit.unlearn(
            method.objective, method.optimizer, params, forget, retain,
            update_args=method.update_args, steps=100, key=key,
        )

    Attributes:
        objective: `(params, forget, retain) -> (scalar, aux)`, lowered.
        optimizer: its gradient's transform, learning rate included.
        update_args: `(params, forget, retain) -> dict`, extra arguments of the optimizer's update;
            None: there are none.
    """

    objective: Callable
    optimizer: optax.GradientTransformationExtraArgs
    update_args: Callable | None = None

    __repr__ = short_repr

"""One function for all methods: those that train, and those that are solved in closed form."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Key, PyTree

from jedit.core.arguments import check_function
from jedit.core.batch import Batch
from jedit.core.checks import COUNT_OR_ZERO, check_numbers
from jedit.core.display import described, short_repr
from jedit.edits import Edit, edit_between
from jedit.training.loop import unlearn
from jedit.training.method import TrainingMethod
from jedit.training.watch import History, Watch


class TrainingInfo(NamedTuple):
    """The Info of a method that trains: the history of its run.

    Attributes:
        history: per step "loss" and what the objective's aux holds, as `unlearn` returns it.
    """

    history: History

    __repr__ = short_repr


def run_method(
    method: TrainingMethod | Callable[..., tuple[Edit, Any]],
    apply: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    forget: Batch | PyTree,
    retain: Batch | PyTree,
    *,
    steps: int | None = None,
    key: Key[Array, ""] | None = None,
    watch: Watch | None = None,
) -> tuple[Edit, Any]:
    """Run any method, and return its edit: methods are exchanged by exchanging one value.

        for method in (
            TrainingMethod(with_retain(NPO()), optax.adam(1e-4)),
            rosu(optax.sgd(0.01), radius=0.05),
        ):
            edit, info = run_method(method, apply, params, forget, retain, steps=100, key=key)

        method = functools.partial(kfade, curvature=curvature, budget=0.05)
        edit, info = run_method(method, apply, params, forget, retain)

    Args:
        method: a `TrainingMethod`, or any `(apply, params, forget=, retain=) -> (Edit, Info)`.
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters as they were trained, to be edited.
        forget: what to forget; several batches where a closed form takes them.
        retain: what to keep; several batches where a closed form takes them.
        steps: how many updates a `TrainingMethod` makes, which needs it.
        key: the random key that decides which rows a `TrainingMethod` sees, which needs it.
        watch: who looks on while a `TrainingMethod` trains, as `unlearn` takes it.

    Returns:
        The edit, of the trained parameters or of those that the closed form edits; and what it has
        to say: a `TrainingInfo`, or the closed form's own Info.

    Raises:
        TypeError: the method is neither a `TrainingMethod` nor a function.
        ValueError: a `TrainingMethod` lacks steps or key, or a closed form was given one of them.
    """
    check_numbers(COUNT_OR_ZERO, steps=steps)
    if isinstance(method, TrainingMethod):
        if steps is None or key is None:
            raise ValueError(f"a TrainingMethod needs steps= and key=, got {steps=}, {key=}")
        after, history = unlearn(
            method, apply, params, forget, retain, steps=steps, key=key, watch=watch
        )
        return edit_between(params, after, method.trainable), TrainingInfo(history)
    check_function(method, "method", "(apply, params, forget=, retain=) or a TrainingMethod")
    extra = {"steps": steps, "key": key, "watch": watch}
    if given := [name for name, value in extra.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)} would not be looked at: {described(method)} is a closed "
            "form, whose own arguments are bound with functools.partial"
        )
    return method(apply, params, forget=forget, retain=retain)

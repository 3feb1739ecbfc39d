"""Refusals that methods share: rows that count nothing before they begin, NaN on the way."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from jedit.core.batch import Batch
from jedit.core.checks import culprit, is_known, not_finite
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import check_contents
from jedit.curvature.likelihoods import Likelihood


@on_auto_axes
def check_rows(
    apply: Callable,
    likelihood: Likelihood,
    params: PyTree,
    **sets: Sequence[Batch],
) -> None:
    """Refuse sets of rows that count nothing, and masks and labels that are none.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        likelihood: the likelihood, which says which labels there are.
        params: the model's parameters.
        **sets: the batches of each set, by the set's name.

    Raises:
        ValueError: a batch that `check_contents` refuses, or a set of which no batch counts an
            output.
    """
    for name, batches in sets.items():
        found = []
        for number, batch in enumerate(batches):
            limits = None
            if batch.targets is not None:
                limits = likelihood.label_limits(jax.eval_shape(apply, params, batch.inputs))
            which = f"batch {number} of {name}" if len(batches) > 1 else name
            found.append(check_contents(batch, which, limits=limits, must_count=False))
        if not any(found):
            raise ValueError(
                f"{name} counts no output: it has no rows, or mask and valid leave out all. There "
                f"is nothing to {name} then"
            )


def check_requests(
    apply: Callable, likelihood: Likelihood, params: PyTree, requests: Batch
) -> None:
    """Refuse stacked requests that count nothing, one by one, and masks and labels that are none.

    Raises:
        ValueError: a stack that `check_contents` refuses, or requests that count nothing, by
            number.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), requests.inputs)
    limits = likelihood.label_limits(jax.eval_shape(apply, params, one))
    check_contents(requests, "the stack of requests", limits=limits)
    given = [x for x in (requests.mask, requests.valid) if x is not None]
    if given and all(map(is_known, given)):
        counted = np.logical_and.reduce([np.asarray(x) != 0 for x in given])
        is_empty = ~counted.reshape(len(counted), -1).any(axis=1)
        if is_empty.any():
            raise ValueError(
                f"requests {np.flatnonzero(is_empty)[:8].tolist()} count no output, so there is "
                "nothing to forget: mask and valid leave out all"
            )


def stop_if_not_finite(
    where: str, value: float, gradient: PyTree, params: PyTree, sets: Mapping[str, PyTree]
) -> None:
    """Stop a method whose objective, or its gradient, is not finite, and say why.

    Args:
        where: how the message names the step, such as "step 3".
        value: value of the objective.
        gradient: gradient of the objective.
        params: the parameters at which the gradient was taken.
        sets: the rows it was taken over, by name.

    Raises:
        FloatingPointError: the value or the gradient is not finite.
    """
    paths = not_finite(gradient)
    if paths or not np.isfinite(value):
        what = f"the gradient at {paths[:4]}" if np.isfinite(value) else f"the objective, {value},"
        raise FloatingPointError(f"{where}: {what} is not finite: {culprit(params, sets)}")


def refuse_zero_gradients(norms: ArrayLike, name: str) -> None:
    """Refuse rows whose gradient is zero: their edit would be none, and seem a success.

    Args:
        norms: norm of the gradient, or of one gradient for each request; traced norms pass.
        name: how the message names the rows or the requests.

    Raises:
        ValueError: a norm is zero.
    """
    if not is_known(norms):
        return
    still = np.flatnonzero(np.asarray(norms).reshape(-1) == 0)
    if len(still):
        which = f" {still[:8].tolist()}" if np.ndim(norms) else ""
        raise ValueError(
            f"the gradient of {name}{which} is zero in all that the curvature covers, so nothing "
            "would be forgotten: the rows are predicted with certainty, or do not depend on it"
        )

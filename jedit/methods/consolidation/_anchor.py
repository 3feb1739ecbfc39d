"""Where a model stood when it had learnt a task, and how much its outputs mind its moving."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import batch_list, check_key, check_kind, check_params
from jedit.core.batch import Batch
from jedit.core.devices import on_auto, on_auto_axes
from jedit.core.display import short_repr
from jedit.curvature import Curvature, Estimator
from jedit.curvature.estimator import add_batch


class Anchor(NamedTuple):
    """The parameters after a task, and the curvature of all tasks up to there.

    Attributes:
        params: θ*, the parameters after the last of them.
        curvature: the mean over all tasks' outputs, each task's taken where it had been learnt.
        weight: number of tasks that it is the mean of.
        sums: the estimator's state, to which the next task's is added.
    """

    params: PyTree
    curvature: Curvature
    weight: Array
    sums: Any

    __repr__ = short_repr


@on_auto_axes
def anchored(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    key: Array,
    before: Anchor | None = None,
) -> Anchor:
    """Return the anchor of a task that has been learnt, with what an earlier one holds added.

        anchor = anchored(kfac(apply, Categorical()), params, rows, key=key)

    Args:
        estimator: `kfac(...)`, `ekfac(...)` or `diagonal(...)`.
        params: the parameters now, at which the curvature is taken.
        batches: rows of the task.
        key: labels are sampled from it; a key of its own for each task.
        before: the anchor of the task before; its sums are added to. None: this is the first.

    Returns:
        The anchor, in whose mean every output counts alike: where tasks have other numbers of them,
        the larger is held more, and anchors apart (a tuple, for `EWC`) weigh tasks alike. Diagonals
        are that mean exactly; of Kronecker factors the sums over all tasks are taken each by
        itself, so that the product is not the sum of the products.

    Raises:
        TypeError: an argument is something else.
        ValueError: no batch, or one that counts nothing.
        FloatingPointError: a block's sums are not finite.
    """
    check_kind(estimator, Estimator, "estimator", "such as kfac(apply, likelihood)")
    check_params(params)
    check_key(key)
    several = [on_auto(batch) for batch in batch_list(batches, "batches")]
    update = estimator.update
    if not isinstance(update, jax.tree_util.Partial):
        update = jax.tree_util.Partial(update)
    sums = estimator.init(params, several[0])
    for number, batch in enumerate(several, 1):
        if estimator.check is not None:
            estimator.check(params, batch, f"batch {number}")
        sums = add_batch(update, sums, params, batch, key)
    weight = jnp.ones(())
    if before is not None:
        sums = jax.tree.map(jnp.add, before.sums, sums)
        weight = weight + before.weight
    here = jax.tree.map(jnp.copy, params)  # the loop that goes on overwrites its own
    return Anchor(here, estimator.finalize(sums), weight, sums)

"""View-batch learning: all views of a row in one step, and a rest before the next (2503.18371).

    a step       B / V rows, each in all of its V views
    rest         n V / B steps on average from one visit to a row to the next, in place of n / B
    loss         L(all views) + α mean_{i, v > 0} KL(p(view 0 of i) || p(view v of i))

    V         views of a row: augmentations, or other words for the same      `Views`
    L, α      `ViewBatch.objective`, `ViewBatch.weight`

Do Your Best and Get Enough Rest for Continual Learning (Lee et al.).  The number of updates stays,
and so does the number of rows in a step; a row is seen V times as rarely, and V times as much then.
As the rows of a training loop are the groups of views, any loop of jedit, at batches of B / V, is a
view-batch replay.

Differences.  The order of rows and the second loss are those of the released code [code]: there a
new permutation each round repeats each row V times in a row, and the other views follow the first
one, on which no gradient is taken.  Its KL is divided by the number of classes and taken from the
sixth epoch on; ours is a KL in nats, from the first step.  That KL needs outputs that stand for the
same thing in all views: a classifier's.  Views of a text have outputs of other tokens, so that α is
0 there, and by default.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch, check_function
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.display import short_repr
from jedit.core.outputs import counted_outputs
from jedit.objectives.objective import Objective, Value
from jedit.objectives.token_nll import masked_mean, token_kl


class Views(NamedTuple):
    """Rows, each in several views; arrays lead with the rows, and then with the views.

    Attributes:
        rows: a batch whose arrays are (n, V, ...).
    """

    rows: Batch

    __repr__ = short_repr


def stack_views(views: Sequence[Batch]) -> Views:
    """Put views of the same rows side by side.

    Args:
        views: for each view all rows in the same order and of the same shapes; the first is the row
            as it is.

    Raises:
        TypeError: a view is no batch.
        ValueError: there are none, or they differ in their fields or shapes.
    """
    if not views:
        raise ValueError("there are no views to stack; the rows as they are are one")
    for i, view in enumerate(views):
        check_batch(view, f"views[{i}]")
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(view)] for view in views]
    kinds = {jax.tree.structure(view) for view in views}
    if len(kinds) > 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"all views are of the same rows, in one width and with the same fields; got {shapes}"
        )
    return Views(jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *views))


@dataclasses.dataclass(frozen=True)
class ViewBatch:
    """Any objective over rows in several views.

        with_views = ViewBatch(with_retain(LearnNLL()))
        method = TrainingMethod(with_views, optax.adam(1e-3), batch_size=32 // num_views)

    Attributes:
        objective: what is lowered, on all views of each row.
        weight: α, of the other views' KL to the first one; 0 is arbitrary. Above 0 the model must
            be a classifier.
    """

    objective: Objective
    weight: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, weight=self.weight)
        check_function(self.objective, "objective", "(apply, params, forget, retain, reference)")

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; `Views` among the sets are taken apart, all else stays as it is.

        Raises:
            ValueError: the weight is above 0, and no set is `Views`, or it is no classifier.
        """
        sets = tuple(_flat(rows) for rows in (forget, retain))
        loss, aux = self.objective(apply, params, *sets, reference)
        if not self.weight:
            return loss, aux
        grouped = [rows for rows in (forget, retain) if isinstance(rows, Views)]
        if not grouped:
            raise ValueError("weight is above 0, and no set is `Views`; stack_views makes one")
        terms, counted = zip(*(_agreement(apply, params, views) for views in grouped), strict=True)
        apart = masked_mean(*(jnp.concatenate([x.ravel() for x in y]) for y in (terms, counted)))
        return loss + self.weight * apart, {**aux, "view_kl": apart}


def _flat(rows: PyTree) -> PyTree:
    if not isinstance(rows, Views):
        return rows
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows.rows)


def _agreement(apply: Apply, params: PyTree, views: Views) -> tuple[Array, Array]:
    """Return KL(first view || another), row by row and view by view, and which count.

    Raises:
        ValueError: the model is no classifier.
    """
    rows = _flat(views)
    logits = apply(params, rows.inputs)
    if logits.ndim != 2:
        raise ValueError(
            f"the KL between views is of a classifier's outputs, (rows, classes); got logits of "
            f"shape {logits.shape}: set weight to 0"
        )
    lead = jax.tree.leaves(views.rows)[0].shape[:2]
    counted = counted_outputs(rows, logits.shape[:-1]).reshape(lead)
    logits = logits.reshape(*lead, -1)
    first = jax.lax.stop_gradient(jnp.broadcast_to(logits[:, :1], logits[:, 1:].shape))
    return token_kl(first, logits[:, 1:]), counted[:, 1:] & counted[:, :1]

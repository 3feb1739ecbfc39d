"""What of a task tells, before it is unlearned, whether unlearning it will generalise.

    confidence        mean over the outputs of max_y p(y | x)
    hidden variance   tr Cov[h(x)]  =  E|h|² - |E h|²,  over the outputs' hidden states h

"Unforgettable Generalization in Language Models" (arXiv 2409.02228): tasks that a model answers
with low confidence, and whose hidden states vary little, are said to be forgotten beyond the rows
that are unlearned; tasks with much of both keep their unseen rows.

With K-FAC at hand the second is in its statistics: of a site with a bias that reads h, and rows
that are `answers_only`, A = `factors(curvature, path)[0]` has E[h hᵀ] and, in its last row, E h.
A forward pass is all it takes without.

Differences.  Both predictors are the paper's [notes]; at which layer and position it reads h is not
known to us. Here h is what enters the site asked for, at the outputs that count.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks
from jedit.metrics.streaming import each_batch
from jedit.objectives.hidden_states import Hidden


class TaskPredictors(NamedTuple):
    """The two predictors of a task.

    Attributes:
        confidence: mean probability of the likeliest class.
        hidden_variance: trace of the covariance of the hidden states, in squares of their unit.
    """

    confidence: float
    hidden_variance: float


@on_auto_axes
def task_predictors(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch, *, hidden: Hidden
) -> TaskPredictors:
    """Measure a task's predictors over all outputs that count; two forward passes a batch.

        found = metrics.task_predictors(apply, params, rows, hidden=Entering("head/kernel"))

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the parameters, before unlearning.
        batches: the rows of the task; targets are not looked at.
        hidden: `(apply, params, inputs) -> states`, with the outputs' leading shape, hashable.

    Raises:
        ValueError: no output counts, or the states have not the outputs' leading shape.
        FloatingPointError: hidden states or probabilities that are not finite.
    """
    parts = [
        _sums(apply, hidden, params, batch)
        for batch in each_batch(apply, params, batches, has_labels=False)
    ]
    found = [[np.asarray(x, np.float64) for x in part] for part in jax.device_get(parts)]
    counts = np.array([part[0] for part in found])
    count = counts.sum()
    if not count:
        raise ValueError("no output counts: there are no batches, or mask and valid leave out all")
    # Within and between the batches: of squares less a square of the mean few digits may be left.
    means = np.stack([part[2] for part in found])
    mean = counts @ means / count
    squares = sum(part[3] for part in found) + counts @ np.sum((means - mean) ** 2, axis=1)
    values = TaskPredictors(float(sum(part[1] for part in found) / count), float(squares / count))
    if not np.all(np.isfinite(values)):
        raise FloatingPointError("the outputs or the hidden states are not finite")
    return values


@partial(jax.jit, static_argnums=(0, 1))
def _sums(
    apply: Apply, hidden: Hidden, params: PyTree, batch: Batch
) -> tuple[Array, Array, Float[Array, " width"], Array]:
    """Return how many count, their confidence, the mean of their states, squares around it.

    Raises:
        ValueError: the states have not the outputs' leading shape.
    """

    def likeliest(outputs: tuple[Array, ...], rows: Batch) -> tuple[Array, Array]:
        confidence = jnp.max(jax.nn.softmax(wide(outputs[0]), axis=-1), axis=-1)
        return confidence, counted_outputs(rows, confidence.shape)

    confidence, counted = in_row_blocks(likeliest, apply, (params,), batch)
    states = wide(hidden(apply, params, batch.inputs))
    if states.shape[:-1] != counted.shape:
        raise ValueError(
            f"hidden states of shape {states.shape} for outputs of the leading shape "
            f"{counted.shape}; give what enters a site at every output"
        )
    number = jnp.sum(counted)
    axes = tuple(range(counted.ndim))
    # What is padded may hold anything, NaN too.
    states = jnp.where(counted[..., None], states, 0)
    mean = jnp.sum(states, axis=axes) / jnp.maximum(number, 1).astype(states.dtype)
    centre = jax.lax.broadcast_in_dim(mean, states.shape, (counted.ndim,))
    squares = jnp.sum(jnp.where(counted[..., None], jnp.square(states - centre), 0))
    return number, jnp.sum(jnp.where(counted, confidence, 0)), mean, squares

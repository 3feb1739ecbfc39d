"""Membership attack by the gradient (Wang et al., arXiv 2402.17012): lower for members.

    G_n = ‖ ∇_θ L_n(θ) ‖_q,   L_n the row's length-normalised loss, θ all the parameters in one

A model that fits a row has nothing to learn from it.

Differences.  open-unlearning takes the norm of every tensor by itself and then their plain mean, so
that a bias of ten numbers weighs like an embedding, and its score depends on how the parameters are
cut into tensors; ours is the norm of the whole, which does not.  For one tensor they are the same.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import by_example
from jedit.core.precision import wide
from jedit.metrics.streaming import RowSums, each_batch, rows_of_sums
from jedit.objectives.token_nll import counted_nll, masked_mean

ORDERS = (1.0, 2.0, float("inf"))


@on_auto_axes
def gradient_norm_scores(
    apply: Apply,
    params: PyTree,
    batches: Iterable[Batch] | Batch,
    *,
    order: float = 2.0,
    by_tensor: bool = False,
) -> Float[np.ndarray, " n"]:
    """Return each row's norm, in the order given; a row none of whose tokens counts is left out.

    One row is differentiated at a time: the cost is a gradient per row, the memory one gradient.

    Args:
        apply: `apply(params, inputs) -> outputs`; no row's outputs may depend on another row.
        params: the model's parameters, all of them floating: the norm is over all.
        batches: the batches of rows to score.
        order: q: 1, 2 (open-unlearning) or infinity.
        by_tensor: take the mean of the leaves' norms, as open-unlearning does; False: the norm of
            all parameters.

    Returns:
        The norms, in nats per unit of the parameters.

    Raises:
        ValueError: an unknown order, or a batch that is packed.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be 1, 2 or infinity, got {order}")
    norms, _ = rows_of_sums(
        [
            RowSums(*_norms(apply, order, by_tensor, params, batch))
            for batch in each_batch(apply, params, batches)
        ]
    )
    return norms


@partial(jax.jit, static_argnums=(0, 1, 2))
def _norms(
    apply: Apply, order: float, by_tensor: bool, params: PyTree, batch: Batch
) -> tuple[Array, Array]:
    def norm(row: Batch) -> tuple[Array, Array]:
        def loss(params: PyTree) -> tuple[Array, Array]:
            nll, counted = counted_nll(apply, params, jax.tree.map(lambda x: x[None], row))
            return masked_mean(by_example(row, nll), by_example(row, counted)), jnp.sum(counted)

        gradient, count = jax.grad(loss, has_aux=True)(params)
        sizes = [jnp.abs(wide(leaf)).ravel() for leaf in jax.tree.leaves(gradient)]
        largest = jnp.max(jnp.stack([jnp.max(size, initial=0) for size in sizes]))
        # Of what the largest is one: the squares of a well known row's gradient vanish.
        unit = jnp.where(largest > 0, largest, 1)
        norms = unit * jnp.stack([jnp.linalg.norm(size / unit, ord=order) for size in sizes])
        if by_tensor:
            return jnp.mean(norms), count
        return unit * jnp.linalg.norm(norms / unit, ord=order), count

    return jax.lax.map(norm, batch)

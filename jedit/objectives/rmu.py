"""RMU, representation misdirection (Li et al., WMDP, arXiv 2403.03218).

    loss = γ mean ‖h(x_f) - c u‖² + α mean ‖h(x_r) - h_ref(x_r)‖²

h is a hidden state (features on the last axis), u a fixed random direction, the means over the
positions that count and over the features. c = 2, γ = 1 and α = 1 are those of
open-unlearning [code]. A `hidden` function picks the layer: RMU trains the parameters up to it
alone (`trainable=`).

Differences.  open-unlearning takes the mean of each row's positions first and then that of the
rows, so that a short answer's tokens weigh more; ours takes one mean over all positions that count,
the same where the rows are equally long.  Its positions are those of the answers' tokens
themselves, ours those that `mask` counts, where each is predicted, one to the left of it.  A row of
which nothing counts makes its loss NaN; ours leaves it out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.checks import COUNT, FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide_dtype
from jedit.objectives.token_nll import masked_mean


def random_direction(width: int, *, key: Key[Array, ""]) -> Float[Array, " width"]:
    """Return u: uniform in [0, 1) in every coordinate, then of norm one, as in RMU's code."""
    check_numbers(COUNT, width=width)
    u = jax.random.uniform(key, (width,))
    return u / jnp.linalg.norm(u)


def rmu(
    params: PyTree,
    forget: Batch,
    retain: Batch,
    *,
    hidden: Callable[[PyTree, PyTree], Array],
    reference_params: PyTree,
    direction: Float[Array, " width"],
    steering: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the RMU loss; `hidden(params, inputs)` is (batch, ..., width)."""
    check_numbers(FINITE, steering=steering)
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)

    def distance(batch: Batch, towards: Callable) -> Array:
        check_batch(batch, "the objective's batch")
        states = hidden(params, batch.inputs)
        states = states.astype(wide_dtype(states.dtype))
        away = states - jax.lax.stop_gradient(towards(states))
        return masked_mean(jnp.mean(away**2, axis=-1), counted_outputs(batch, states.shape[:-1]))

    target = steering * direction
    misdirected = distance(forget, lambda h: jnp.broadcast_to(target.astype(h.dtype), h.shape))
    held = distance(retain, lambda h: hidden(reference_params, retain.inputs).astype(h.dtype))
    aux = {"forget_distance": misdirected, "retain_distance": held}
    return gamma * misdirected + alpha * held, aux

"""Representation deviation: turn the forget tokens' hidden states away (KUDA, arXiv 2602.19275).

    loss = γ mean cos(h(x_f), t) + α R,    t = h_ref(x_f) + τ ‖h_ref(x_f)‖ u

    h      hidden state, features on the last axis            `hidden`
    h_ref  the same of the frozen params before unlearning    `reference_params`
    u      fixed unit direction, τ how far t leans to it      `direction`, `tilt`
    R      retain objective, on outputs                       `retain_objective`

The mean is over the forget positions that count. [steps: paper; exact symbols: derived]

Differences. At the reference params the cosine itself has its maximum, hence no gradient, and plain
descent would wait for the retain term or for rounding to move it: t leans a little towards u, as
RMU's target does altogether, which gives a first step and no more [derived]. Without a direction t
is h_ref. τ = 0.1, γ = 1 and α = 1 are arbitrary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.checks import FINITE, NOT_NEGATIVE, check_numbers
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import Apply, masked_mean


def representation_deviation(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    hidden: Callable[[PyTree, PyTree], Array],
    reference_params: PyTree,
    direction: Float[Array, " width"] | None = None,
    tilt: float = 0.1,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the loss; `hidden(params, inputs)` is (batch, ..., width).

    The retain term is there when `retain` is. `random_direction` draws a direction; τ = 0.1 is
    arbitrary.
    """
    check_numbers(FINITE, tilt=tilt)
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)
    check_batch(forget, "forget")
    reference = wide(jax.lax.stop_gradient(hidden(reference_params, forget.inputs)))
    if direction is not None:
        u = jax.lax.broadcast_in_dim(
            direction.astype(reference.dtype), reference.shape, (reference.ndim - 1,)
        )
        reference = reference + tilt * jnp.linalg.norm(reference, axis=-1, keepdims=True) * u
    cosine = _cosine(wide(hidden(params, forget.inputs)), reference)
    mean = masked_mean(cosine, counted_outputs(forget, cosine.shape))
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(gamma * mean, {"forget_cosine": mean}, *retain_term)


def _cosine(x: Float[Array, "*lead d"], y: Float[Array, "*lead d"]) -> Float[Array, "*lead"]:
    """Cosine along the last axis; 0, with no gradient, where either vanishes."""
    x, y = _about_one(x), _about_one(y)
    squares = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
    is_there = squares > 0
    norms = jnp.sqrt(jnp.where(is_there, squares, 1))
    return jnp.where(is_there, jnp.sum(x * y, axis=-1) / norms, 0)


def _about_one(x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """The rows with entries of one at most, which no cosine sees: squares of small ones vanish."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return x / jnp.where(largest > 0, largest, 1)

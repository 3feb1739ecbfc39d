"""CE-U, cross-entropy unlearning (Yang, arXiv 2503.01224).

    loss = γ mean( CE(q, softmax(z)) ) + α R,    q = softmax of z without the label, a constant

over the forget tokens that count: what the model would say if it could not say the label. The
gradient in the logits is p - q, bounded, where that of ascent vanishes as p -> 1. γ = 1 and α = 1
are `graddiff`'s.

Differences.  open-unlearning leaves the first token of each answer out (a footnote of the paper)
and has no retain term; ours takes what counts, so leave those tokens out of `mask`, and give no
`retain`, to get its loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import (
    Apply,
    labelled_logits,
    masked_mean,
    soft_cross_entropy,
    token_nll,
)


def ce_u(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the CE-U loss; the retain term is there when `retain` is.

    Raises:
        ValueError: the batch has not one target per output.
    """
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)
    logits, targets, counted = labelled_logits(params, forget, apply=apply)
    is_label = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    fixed = jax.lax.stop_gradient(logits)
    distribution = jax.nn.softmax(jnp.where(is_label, -jnp.inf, fixed), axis=-1)
    loss = gamma * masked_mean(soft_cross_entropy(distribution, logits), counted)
    aux = {"forget_nll": masked_mean(token_nll(logits, targets), counted)}
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(loss, aux, *retain_term)

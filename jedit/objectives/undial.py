"""UNDIAL, self-distillation from adjusted logits (Dong et al., arXiv 2402.10052).

    loss = γ mean( CE(softmax(z_ref - β e_y), softmax(z)) ) + α R

over the forget tokens that count: the reference's own distribution, with the label pushed down by
β nats. β = 10 and γ = 1 are those of open-unlearning [code], α = 1 is `graddiff`'s.

Differences.  open-unlearning takes the mean over every position of a row, questions and padding
included, and at those, whose label is -100, pushes down the token that is 100th from the end of the
vocabulary; ours looks at the tokens that count alone.  Where all positions count the two are one.
Its settings have α = 0, no retain term: give no `retain`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.core.precision import wide
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import (
    Apply,
    labelled_logits,
    masked_mean,
    soft_cross_entropy,
    token_nll,
)


def undial(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    reference_params: PyTree,
    beta: float = 10.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the UNDIAL loss; the retain term is there when `retain` is.

    Costs one more forward pass, of the reference.

    Raises:
        ValueError: the batch has not one target per output.
    """
    check_numbers(NOT_NEGATIVE, beta=beta, gamma=gamma, alpha=alpha)
    logits, targets, counted = labelled_logits(params, forget, apply=apply)
    check_batch(forget, "forget")
    teacher = wide(jax.lax.stop_gradient(apply(reference_params, forget.inputs)))
    is_label = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    distribution = jax.nn.softmax(jnp.where(is_label, teacher - beta, teacher), axis=-1)
    loss = gamma * masked_mean(soft_cross_entropy(distribution, logits), counted)
    aux = {"forget_nll": masked_mean(token_nll(logits, targets), counted)}
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(loss, aux, *retain_term)

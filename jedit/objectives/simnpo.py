"""SimNPO, preference optimisation without a reference (Fan et al., arXiv 2410.07163).

    loss = -γ (2/β) E log σ(β (NLL(x) / |x| - δ)) + α R

NLL(x) / |x| is the mean over the tokens of forget example x that count, E the mean over the
examples that have one. β = 4.5, δ = 0, γ = 0.125 and α = 1 are those of
open-unlearning [code].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import FINITE, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean


def simnpo(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    beta: float = 4.5,
    delta: float = 0.0,
    gamma: float = 0.125,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the SimNPO loss; the retain term is there when `retain` is."""
    check_numbers(POSITIVE, beta=beta)
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)
    check_numbers(FINITE, delta=delta)
    nll, counted = counted_nll(params, forget, apply=apply)
    nll, counted = (by_example(forget, x) for x in (nll, counted))
    lengths = jnp.sum(counted, axis=-1)
    mean = jnp.sum(nll, axis=-1) / jnp.maximum(lengths, 1).astype(nll.dtype)
    terms = -(2 / beta) * jax.nn.log_sigmoid(beta * (mean - delta))
    loss = gamma * masked_mean(terms, lengths > 0)
    aux = {"forget_nll": masked_mean(nll, counted)}
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(loss, aux, *retain_term)

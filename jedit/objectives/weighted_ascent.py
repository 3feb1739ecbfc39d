"""Gradient ascent with a weight for each token: WGA and SatImp.

    loss = -γ mean( w(p) NLL ) + α R        over the forget tokens that count, p = exp(-NLL)

    wga      w = p^β                  (arXiv 2502.19301): what is forgotten already is left alone
    satimp   w = p^β₁ (1 - p)^β₂      (arXiv 2505.11953): saturation times importance

The weight is a constant: no gradient flows through it. β = 1, β₁ = 5, β₂ = 1, γ = 1 and α = 1
are those of open-unlearning [code].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean


def wga(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    beta: float = 1.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the WGA loss; the retain term is there when `retain` is."""
    check_numbers(NOT_NEGATIVE, beta=beta, gamma=gamma, alpha=alpha)
    loss, aux = _weighted(params, forget, apply, lambda p: p**beta)
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(gamma * loss, aux, *retain_term)


def satimp(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    beta_saturation: float = 5.0,
    beta_importance: float = 1.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the SatImp loss; the retain term is there when `retain` is."""
    weights = {"beta_saturation": beta_saturation, "beta_importance": beta_importance}
    check_numbers(NOT_NEGATIVE, **weights, gamma=gamma, alpha=alpha)

    def weight(p):
        return p**beta_saturation * (1 - p) ** beta_importance

    loss, aux = _weighted(params, forget, apply, weight)
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(gamma * loss, aux, *retain_term)


def _weighted(params, forget, apply, weight):
    nll, counted = counted_nll(params, forget, apply=apply)
    weights = weight(jax.lax.stop_gradient(jnp.exp(-nll)))
    return -masked_mean(weights * nll, counted), {"forget_nll": masked_mean(nll, counted)}

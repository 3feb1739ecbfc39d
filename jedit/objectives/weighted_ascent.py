"""Gradient ascent with a weight for each token: WGA and SatImp.

    loss = -mean( w(p) NLL )        over the forget tokens that count, p = exp(-NLL)

    WGA      w = p^β                  (arXiv 2502.19301): what is forgotten already is left alone
    SatImp   w = p^β₁ (1 - p)^β₂      (arXiv 2505.11953): saturation times importance

The weight is a constant: no gradient flows through it. β = 1, β₁ = 5 and β₂ = 1 are those of
open-unlearning [code].
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class WGA:
    """Ascent that leaves alone what is forgotten already.

    Attributes:
        beta: β.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, beta=self.beta)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the WGA loss."""
        return _weighted(apply, params, forget, lambda p: p**self.beta)


@dataclasses.dataclass(frozen=True)
class SatImp:
    """Ascent weighted by saturation times importance.

    Attributes:
        beta_saturation: β₁.
        beta_importance: β₂.
    """

    beta_saturation: float = 5.0
    beta_importance: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(
            NOT_NEGATIVE,
            beta_saturation=self.beta_saturation,
            beta_importance=self.beta_importance,
        )

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the SatImp loss."""
        first, second = self.beta_saturation, self.beta_importance
        return _weighted(apply, params, forget, lambda p: p**first * (1 - p) ** second)


def _weighted(
    apply: Apply,
    params: PyTree,
    forget: Batch,
    weight: Callable[[Float[Array, "*lead"]], Float[Array, "*lead"]],
) -> Value:
    nll, counted = counted_nll(apply, params, forget)
    weights = weight(jax.lax.stop_gradient(jnp.exp(-nll)))
    return -masked_mean(weights * nll, counted), {"forget_nll": masked_mean(nll, counted)}

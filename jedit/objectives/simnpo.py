"""SimNPO, preference optimisation without a reference (Fan et al., arXiv 2410.07163).

    loss = -γ (2/β) E log σ(β (NLL(x) / |x| - δ))

NLL(x) / |x| is the mean over the tokens of forget example x that count, E the mean over the
examples that have one. β = 4.5, δ = 0 and γ = 0.125 are those of open-unlearning [code], beside a
retain loss of weight 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import FINITE, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class SimNPO:
    """Bounded ascent on each example's loss per token.

    Attributes:
        beta: β.
        delta: δ.
        gamma: γ, so that a retain term of weight 1 is the published one.
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, beta=self.beta)
        check_numbers(NOT_NEGATIVE, gamma=self.gamma)
        check_numbers(FINITE, delta=self.delta)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the SimNPO loss."""
        nll, counted = counted_nll(apply, params, forget)
        nll, counted = (by_example(forget, x) for x in (nll, counted))
        lengths = jnp.sum(counted, axis=-1)
        mean = jnp.sum(nll, axis=-1) / jnp.maximum(lengths, 1).astype(nll.dtype)
        terms = -(2 / self.beta) * jax.nn.log_sigmoid(self.beta * (mean - self.delta))
        loss = self.gamma * masked_mean(terms, lengths > 0)
        return loss, {"forget_nll": masked_mean(nll, counted)}

"""Negative preference optimisation (Zhang et al., arXiv 2404.05868).

    loss = -(2/β) E log σ(β (NLL(x) - NLL_ref(x)))

NLL(x) is the sum over the tokens of forget example x that count, E the mean over the examples that
have one.  Ascent, in which the weight of an example, 2 σ(-β (NLL - NLL_ref)), falls from one
towards zero as it is forgotten.  At the reference the loss is (2/β) log 2 and its gradient that of
plain ascent on the summed NLL; as β -> 0 it is plain ascent everywhere.  β = 0.1 is the paper's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import counted_nll, masked_mean, sequence_nll


@dataclasses.dataclass(frozen=True)
class NPO:
    """Bounded ascent, measured from the reference.

    Attributes:
        beta: β.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, beta=self.beta)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the NPO loss, which costs one more forward pass, of the reference."""
        reference = needed(reference, self)
        before = jax.lax.stop_gradient(sequence_nll(apply, reference, forget))
        nll, counted = counted_nll(apply, params, forget)
        summed = jnp.sum(by_example(forget, nll), axis=-1)
        is_example = jnp.any(by_example(forget, counted), axis=-1)
        growth = summed - before.astype(summed.dtype)
        terms = -(2 / self.beta) * jax.nn.log_sigmoid(self.beta * growth)
        return masked_mean(terms, is_example), {
            "forget_nll": masked_mean(nll, counted),
            "forget_nll_growth": masked_mean(growth, is_example),
        }

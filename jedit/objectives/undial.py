"""UNDIAL, self-distillation from adjusted logits (Dong et al., arXiv 2402.10052).

    loss = mean( CE(softmax(z_ref - β e_y), softmax(z)) )

over the forget tokens that count: the reference's own distribution, with the label pushed down by
β nats. β = 10 is open-unlearning's [code].

Differences.  open-unlearning takes the mean over every position of a row, questions and padding
included, and at those, whose label is -100, pushes down the token that is 100th from the end of the
vocabulary; ours looks at the tokens that count alone.  Where all positions count the two are one.
Its settings have no retain term.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import labelled_values, masked_mean, soft_cross_entropy, token_nll


@dataclasses.dataclass(frozen=True)
class UNDIAL:
    """Distillation of the reference with its labels pushed down.

    Attributes:
        beta: β, by how much the label's logit is pushed down, in nats.
    """

    beta: float = 10.0

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
        """Return the UNDIAL loss, which costs one more forward pass, of the reference.

        Raises:
            ValueError: the batch has not one target per output.
        """
        reference = needed(reference, self)
        loss, nll, counted = labelled_values(self._losses, apply, params, forget, reference)
        return masked_mean(loss, counted), {"forget_nll": masked_mean(nll, counted)}

    def _losses(
        self, logits: Array, targets: Array, counted: Array, teacher: Array
    ) -> tuple[Array, Array, Array]:
        is_label = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
        distribution = jax.nn.softmax(jnp.where(is_label, teacher - self.beta, teacher), axis=-1)
        return soft_cross_entropy(distribution, logits), token_nll(logits, targets), counted

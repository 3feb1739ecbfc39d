"""CE-U, cross-entropy unlearning (Yang, arXiv 2503.01224).

    loss = mean( CE(q, softmax(z)) ),    q = softmax of z without the label, a constant

over the forget tokens that count: what the model would say if it could not say the label. The
gradient in the logits is p - q, bounded, where that of ascent vanishes as p -> 1.

Differences.  open-unlearning leaves the first token of each answer out (a footnote of the paper)
and has no retain term; ours takes what counts, so leave those tokens out of `mask`, and put no
`with_retain` around it, to get its loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import labelled_values, masked_mean, soft_cross_entropy, token_nll


@dataclasses.dataclass(frozen=True)
class CEU:
    """Cross-entropy to the model's own prediction without the label."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the CE-U loss.

        Raises:
            ValueError: the batch has not one target per output.
        """
        loss, nll, counted = labelled_values(_losses, apply, params, forget)
        return masked_mean(loss, counted), {"forget_nll": masked_mean(nll, counted)}


def _losses(logits: Array, targets: Array, counted: Array) -> tuple[Array, Array, Array]:
    is_label = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    fixed = jax.lax.stop_gradient(logits)
    distribution = jax.nn.softmax(jnp.where(is_label, -jnp.inf, fixed), axis=-1)
    return soft_cross_entropy(distribution, logits), token_nll(logits, targets), counted

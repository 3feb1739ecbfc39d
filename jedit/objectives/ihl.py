"""The inverted hinge loss: the right answer falls until another is ahead (LoKU, arXiv 2408.06621).

    loss = E (1 + p_y - max_{v ≠ y} p_v)

p are an output's probabilities, y its label, E the mean over the forget tokens that count. It lies
between 0 and 2: 2 where the label is certain, 1 where it ties with the likeliest other, 0 where one
other is certain. So it is bounded, and the one other that gains is the likeliest.

Differences. REGLU's code, where this was read [code], has max(0, ·) around each term; probabilities
sum to one, so that no term is ever below 0 and ours leaves it out. Where several others are the
likeliest, they share the gradient; there the first has it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import labelled_values, masked_mean, token_nll


@dataclasses.dataclass(frozen=True)
class IHL:
    """The mean of how far the label's probability is ahead of the likeliest other, plus one."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the retain rows and the reference are not looked at.

        Raises:
            ValueError: the batch has not one target per output.
        """
        loss, nll, counted = labelled_values(_losses, apply, params, forget)
        return masked_mean(loss, counted), {"forget_nll": masked_mean(nll, counted)}


def _losses(logits: Array, targets: Array, counted: Array) -> tuple[Array, Array, Array]:
    is_label = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    p = jax.nn.softmax(logits, axis=-1)
    label = jnp.sum(jnp.where(is_label, p, 0), axis=-1)
    other = jnp.max(jnp.where(is_label, 0, p), axis=-1)
    return 1 + label - other, token_nll(logits, targets), counted

"""The logit margin, which PDU flattens (Entesari et al., arXiv 2506.05314).

    loss = E (max_v z_v - mean_v z_v)²

z are an output's logits, v its classes, E the mean over the forget outputs that count. It is zero
where an output is uniform and nowhere else, and bounded from below; labels are not looked at.

Differences. The released code takes E over all positions of the forget rows, those of the questions
and of padding too; ours counts what the batch counts, as all objectives do. Where several logits
are the largest, they share its gradient; there the first has it.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.core.row_blocks import in_row_blocks
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import masked_mean


@dataclasses.dataclass(frozen=True)
class LogitMargin:
    """The mean square of how far the largest logit stands above the mean one."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the retain rows and the reference are not looked at."""
        check_batch(forget, "the objective's batch")
        margin, counted = in_row_blocks(_margins, apply, (params,), forget)
        return masked_mean(margin**2, counted), {"forget_margin": masked_mean(margin, counted)}


def _margins(outputs: tuple[Array, ...], rows: Batch) -> tuple[Array, Array]:
    logits = wide(outputs[0])
    margin = jnp.max(logits, axis=-1) - jnp.mean(logits, axis=-1)
    return margin, counted_outputs(rows, margin.shape)

"""How far an edit moved a model's outputs: mean KL(p_original || p_edited), in nats.

On the retain set, lower is better: it is what a retain budget bounds.  On the forget set against a
model retrained without it (`original` the retrained one), lower is closer to never having learned.

Differences.  open-unlearning's KL, of its retain loss, is the mean over all positions, padding and
prompts included, so that it depends on how a batch is padded; ours is over those that count.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.metrics.streaming import each_batch, mean_of_sums
from jedit.objectives.token_nll import counted_kl


@on_auto_axes
def output_kl(
    apply: Apply, original: PyTree, edited: PyTree, batches: Iterable[Batch] | Batch
) -> float:
    """Return the mean KL over all outputs that count, in all batches; targets are not needed."""
    return mean_of_sums(
        [
            _sum_kl(apply, original, edited, batch)
            for batch in each_batch(apply, (original, edited), batches, has_labels=False)
        ]
    )


@partial(jax.jit, static_argnums=0)
def _sum_kl(apply: Apply, original: PyTree, edited: PyTree, batch: Batch) -> tuple[Array, Array]:
    divergence, counted = counted_kl(apply, original, edited, batch)
    return jnp.sum(jnp.where(counted, divergence, 0)), jnp.sum(counted)

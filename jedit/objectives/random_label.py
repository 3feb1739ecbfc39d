"""Random labels: learn something else in place of what is to be forgotten.

    loss = NLL_f(y'),      y' != y drawn once for every forget output

The labels are data, so they are drawn by `relabel` before the loop, and not anew at each step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import Range, check_numbers
from jedit.core.outputs import check_contents
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


def relabel(batch: Batch, num_classes: int, *, key: Key[Array, ""]) -> Batch:
    """Return the batch with every target replaced by another class, uniformly.

    Raises:
        ValueError: the batch has no targets, or there is no other class.
    """
    check_numbers(Range(2, is_whole=True), num_classes=num_classes)
    if batch.targets is None:
        raise ValueError("relabel needs targets, got a batch without")
    check_contents(batch, "the batch", limits=(0, num_classes - 1), must_count=False)
    shift = jax.random.randint(key, batch.targets.shape, 1, num_classes, jnp.int32)
    old = jnp.maximum(batch.targets.astype(jnp.int32), 0)  # what does not count may hold anything
    new = jnp.mod(old + shift, num_classes)
    return batch._replace(targets=new.astype(batch.targets.dtype))


@dataclasses.dataclass(frozen=True)
class RandomLabel:
    """Descent on forget rows that `relabel` has given other labels."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the mean NLL of the relabelled forget batch."""
        relabelled_nll = masked_mean(*counted_nll(apply, params, forget))
        return relabelled_nll, {"relabelled_nll": relabelled_nll}

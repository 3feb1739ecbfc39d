"""Random labels: learn something else in place of what is to be forgotten.

    loss = NLL_f(y'),      y' != y drawn once for every forget output      `relabel`
                           y' of the task's own labels, y among them       `relabel_among`

The labels are data, so they are drawn before the loop, and not anew at each step. Of two labels
"the other one" is an answer to learn; drawn from both, it tells nothing, which is how we read the
random labels of "Unforgettable Generalization in Language Models" (arXiv 2409.02228) [notes].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree
from numpy.typing import ArrayLike

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT_OR_ZERO, Range, check_numbers
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


def relabel_among(batch: Batch, labels: ArrayLike, *, key: Key[Array, ""]) -> Batch:
    """Return the batch with every target drawn uniformly from some labels, its own among them.

    Args:
        batch: forget rows of one task.
        labels: the labels that the task's rows have, each once, (labels,).
        key: of the draws.

    Raises:
        ValueError: the batch has no targets; fewer than two labels, or one twice.
    """
    if batch.targets is None:
        raise ValueError("relabel_among needs targets, got a batch without")
    known = np.asarray(labels)
    if known.ndim != 1 or len(known) < 2 or len(np.unique(known)) < len(known):
        raise ValueError(f"labels must be two at least, each once, got {known.tolist()}")
    check_numbers(COUNT_OR_ZERO, labels=known)
    drawn = jax.random.randint(key, batch.targets.shape, 0, len(known), jnp.int32)
    return batch._replace(targets=jnp.asarray(known, batch.targets.dtype)[drawn])


@dataclasses.dataclass(frozen=True)
class RandomLabel:
    """Descent on forget rows that `relabel` or `relabel_among` has given other labels."""

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

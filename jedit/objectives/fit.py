"""FIT's objective: what is done to a forget row depends on its importance (arXiv 2601.21682).

    low       NLL(y')                              a random label in place of the row's
    middle    NPO = -(2/β) log σ(β (NLL - NLL_ref))
    high      NPO + λ KL(p_ref || p) on the retain rows

    loss = E over the rows of theirs, so that the KL weighs λ times the share of high rows

y' is drawn once by `relabel`; NLL(y') is a row's mean over its tokens, NPO's NLL the sum, as in
`RandomLabel` and `NPO`.

Differences.  The three objectives and which goes with which importance are the paper's [notes].
β = 0.1 is NPO's, λ = 1 is arbitrary, and that all three stand in one loss, with the classes of the
rows as data so that it compiles once, is ours.  y' is drawn of all classes, of a language model
among its whole vocabulary, the rows that pad it included; there `RandomLabel` by itself is not
offered, as what is taught so is noise.  The KL is on retain rows [derived]: on the row
itself it would undo NPO.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.core.row_blocks import in_row_blocks
from jedit.objectives.held import RetainKL
from jedit.objectives.objective import Value, needed
from jedit.objectives.token_nll import masked_mean, nll_of, sequence_nll


class Importance(enum.IntEnum):
    """How much of a model stands on a row."""

    LOW = 0
    MIDDLE = 1
    HIGH = 2


class GradedRows(NamedTuple):
    """Forget rows, what is taught in place of them, and how important each is.

    Attributes:
        rows: the rows to forget.
        labels: other targets of these rows, as `relabel` draws them.
        importance: (n,) values of `Importance`.
    """

    rows: Batch
    labels: Int[Array, "n ..."]
    importance: Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class FIT:
    """Random labels for unimportant rows, NPO for others, with a retain KL for the weightiest.

    Attributes:
        beta: β of NPO; 0.1 is that paper's.
        kl_weight: λ, the weight of the retain KL; 1 is arbitrary.
    """

    beta: float = 0.1
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(POSITIVE, beta=self.beta)
        check_numbers(NOT_NEGATIVE, kl_weight=self.kl_weight)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: GradedRows,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss, which costs four forward passes, two of them of the reference.

        Raises:
            ValueError: the labels have another shape than the rows' targets.
        """
        reference = needed(reference, self)
        rows, labels, importance = forget
        check_batch(rows, "the rows to forget")
        if rows.targets is None or jnp.shape(labels) != jnp.shape(rows.targets):
            raise ValueError(
                f"labels have shape {jnp.shape(labels)}, expected that of the rows' targets; "
                "graded_rows makes both"
            )
        both = rows._replace(targets=jnp.stack([rows.targets, labels], axis=1))
        nll, wrong, counted = in_row_blocks(_both, apply, (params,), both)
        before = jax.lax.stop_gradient(sequence_nll(apply, reference, rows))
        is_token = by_example(rows, counted)
        is_row = jnp.any(is_token, axis=-1)
        growth = jnp.sum(by_example(rows, nll), axis=-1) - before.astype(nll.dtype)
        npo = -(2 / self.beta) * jax.nn.log_sigmoid(self.beta * growth)
        taught = jnp.sum(by_example(rows, wrong), axis=-1)
        taught = taught / jnp.maximum(jnp.sum(is_token, axis=-1), 1).astype(taught.dtype)
        is_low, is_high = importance == Importance.LOW, importance == Importance.HIGH
        share = masked_mean(is_high.astype(nll.dtype), is_row)
        divergence, aux = RetainKL()(apply, params, rows, retain, reference)
        loss = masked_mean(jnp.where(is_low, taught, npo), is_row)
        return loss + self.kl_weight * share * divergence, {
            "forget_nll": masked_mean(nll, counted),
            "relabelled_nll": masked_mean(taught, is_row & is_low),
            **aux,
        }


def _both(outputs: tuple[Array, ...], batch: Batch) -> tuple[Array, Array, Array]:
    """Return the NLL of both targets, of one pass, and which outputs count."""
    assert batch.targets is not None
    (nll, counted), (wrong, _) = (
        nll_of(outputs[0], batch._replace(targets=batch.targets[:, i])) for i in range(2)
    )
    return nll, wrong, counted

"""What holds the retain set in place: its cross-entropy, or the KL to the model's first outputs.

    RetainNLL   mean NLL_r, over the retain tokens that count
    RetainKL    mean KL(p_reference || p), over the same; padding is left out of it

They are objectives in their own right, and the term that `with_retain` adds to another, which is
the only place where a retain term is put on:

    with_retain(f, R, weight=α, forget_weight=γ)        loss = γ f + α R

Gradient difference is `with_retain(GA())`: -γ NLL_f + α NLL_r.  γ = 1 and α = 1 are those of
open-unlearning's GradDiff, NPO, DPO, WGA, SatImp and RMU [code]; for CE-U, UNDIAL, random labels
and the deviation of representations they are arbitrary.
"""

import dataclasses

import jax
from jaxtyping import PyTree

from jedit.core.arguments import check_function
from jedit.core.batch import Apply, Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.objective import Objective, Value, kept_rows, needed
from jedit.objectives.token_nll import counted_kl, counted_nll, masked_mean


@dataclasses.dataclass(frozen=True)
class RetainNLL:
    """The mean NLL of the retain batch."""

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the forget rows and the reference are not looked at."""
        retain = kept_rows(retain)
        loss = masked_mean(*counted_nll(apply, params, retain))
        return loss, {"retain_nll": loss}


@dataclasses.dataclass(frozen=True)
class RetainKL:
    """The mean KL(p_reference || p) on the retain batch, which needs no targets.

    It costs one more forward pass, of the reference.  At `params = reference` it and its gradient
    vanish, so by itself it never moves an untouched model.
    """

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: Batch | None = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; the forget rows are not looked at."""
        reference = needed(reference, self)
        retain = kept_rows(retain)
        fixed = jax.lax.stop_gradient(reference)
        loss = masked_mean(*counted_kl(apply, fixed, params, retain))
        return loss, {"retain_kl": loss}


@dataclasses.dataclass(frozen=True)
class WithRetain:
    """The weighted sum of two objectives, as `with_retain` makes it."""

    objective: Objective
    held: Objective
    weight: float
    forget_weight: float

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the sum, and what both terms have to say."""
        given = (apply, params, forget, retain, reference)
        loss, aux = self.objective(*given)
        held, held_aux = self.held(*given)
        return self.forget_weight * loss + self.weight * held, {**aux, **held_aux}


def with_retain(
    objective: Objective,
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
    *,
    weight: float = 1.0,
    forget_weight: float = 1.0,
) -> WithRetain:
    """Return the objective with a retain term: γ f + α R.

        with_retain(NPO(beta=0.04), RetainKL(), weight=2.0)

    Args:
        objective: f, what is to be lowered on the forget rows.
        held: R, `RetainNLL()`, `RetainKL()` or any other objective.
        weight: α = 1, GradDiff's.
        forget_weight: γ = 1, GradDiff's.
    """
    check_numbers(NOT_NEGATIVE, weight=weight, forget_weight=forget_weight)
    for name, value in (("objective", objective), ("held", held)):
        check_function(value, name, "(apply, params, forget, retain, reference)")
    return WithRetain(objective, held, weight, forget_weight)

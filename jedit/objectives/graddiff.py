"""Gradient difference: loss = -γ NLL_f + α R.

NLL_f is the mean over the forget tokens that count, R a retain objective: `retain_nll` or
`retain_kl`.  γ = 1 and α = 1 are those of open-unlearning [code].
"""

from collections.abc import Callable

from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives.ga import ga
from jedit.objectives.retain import retain_nll
from jedit.objectives.token_nll import Apply


def graddiff(
    params: PyTree,
    forget: Batch,
    retain: Batch,
    *,
    apply: Apply,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return -γ NLL_f + α R; `reference_params` is what `retain_kl` compares with."""
    check_numbers(NOT_NEGATIVE, gamma=gamma, alpha=alpha)
    ascent, forget_aux = ga(params, forget, apply=apply)
    held, retain_aux = retain_objective(
        params, forget, retain, apply=apply, reference_params=reference_params
    )
    return gamma * ascent + alpha * held, {**forget_aux, **retain_aux}

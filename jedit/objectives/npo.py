"""Negative preference optimisation (Zhang et al., arXiv 2404.05868).

    loss = -(2/β) E log σ(β (NLL(x) - NLL_ref(x))) + α R

NLL(x) is the sum over the tokens of forget example x that count, E the mean over the examples that
have one, R a retain objective.  Ascent, in which the weight of an example, 2 σ(-β (NLL - NLL_ref)),
falls from one towards zero as it is forgotten.  At the reference the first term is (2/β) log 2 and
its gradient that of plain ascent on the summed NLL; as β -> 0 it is plain ascent everywhere.

β = 0.1 is the paper's, α = 1 open-unlearning's [code].  `npo` runs the reference beside
the model; `npo_from_nll` takes its losses.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Batch
from jedit.core.checks import NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.outputs import by_example
from jedit.objectives.retain import add_retain, retain_nll
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean, sequence_nll


def npo(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    reference_params: PyTree,
    beta: float = 0.1,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the NPO loss against `reference_params`, one more forward pass.

    The retain term is there when `retain` is.
    """
    check_numbers(POSITIVE, beta=beta)
    check_numbers(NOT_NEGATIVE, alpha=alpha)
    reference_nll = jax.lax.stop_gradient(sequence_nll(reference_params, forget, apply=apply))
    loss, aux = npo_from_nll(params, forget, apply=apply, reference_nll=reference_nll, beta=beta)
    retain_term = (params, forget, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(loss, aux, *retain_term)


def npo_from_nll(
    params: PyTree,
    forget: Batch,
    retain: Batch | None = None,
    *,
    apply: Apply,
    reference_nll: Float[Array, " batch"],
    beta: float = 0.1,
    alpha: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the NPO loss against the reference's losses, one sum per forget example.

    `sequence_nll(reference_params, forget, apply=apply)` computes them.  The retain term is
    `retain_nll`, and is there when `retain` is.
    """
    check_numbers(POSITIVE, beta=beta)
    check_numbers(NOT_NEGATIVE, alpha=alpha)
    nll, counted = counted_nll(params, forget, apply=apply)
    summed = jnp.sum(by_example(forget, nll), axis=-1)
    is_example = jnp.any(by_example(forget, counted), axis=-1)
    growth = summed - reference_nll.astype(summed.dtype)
    loss = masked_mean(-(2 / beta) * jax.nn.log_sigmoid(beta * growth), is_example)
    aux = {
        "forget_nll": masked_mean(nll, counted),
        "forget_nll_growth": masked_mean(growth, is_example),
    }
    return add_retain(loss, aux, params, forget, retain, apply, None, alpha, retain_nll)

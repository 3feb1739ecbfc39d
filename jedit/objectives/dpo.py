"""Direct preference optimisation towards refusals: DPO, and IdkDPO (Rafailov et al. 2023; TOFU).

    loss = -(2/β) E log σ( β [ NLL(y) - NLL_ref(y) - NLL(r) + NLL_ref(r) ] ) + α R

y is the answer to be forgotten, r what is to be said in its place ("I do not know"), NLL the sum
over the tokens that count; E the mean over the pairs of which both have one. β = 0.1 and α = 1
are those of open-unlearning [code].
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


def dpo(
    params: PyTree,
    forget: tuple[Batch, Batch],
    retain: Batch | None = None,
    *,
    apply: Apply,
    reference_params: PyTree,
    beta: float = 0.1,
    alpha: float = 1.0,
    retain_objective: Callable = retain_nll,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the DPO loss; `forget` is (answers, refusals), row by row of the same questions.

    Costs four forward passes for the forget pairs, two of them of the reference.
    """
    check_numbers(POSITIVE, beta=beta)
    check_numbers(NOT_NEGATIVE, alpha=alpha)
    growth, is_whole = [], []
    for batch in forget:
        nll, counted = counted_nll(params, batch, apply=apply)
        reference = jax.lax.stop_gradient(sequence_nll(reference_params, batch, apply=apply))
        growth.append(jnp.sum(by_example(batch, nll), axis=-1) - reference)
        is_whole.append(jnp.any(by_example(batch, counted), axis=-1))
    is_pair = is_whole[0] & is_whole[1]
    terms = -(2 / beta) * jax.nn.log_sigmoid(beta * (growth[0] - growth[1]))
    loss = masked_mean(terms, is_pair)
    aux = {
        "answer_nll_growth": masked_mean(growth[0], is_pair),
        "refusal_nll_growth": masked_mean(growth[1], is_pair),
    }
    retain_term = (params, None, retain, apply, reference_params, alpha, retain_objective)
    return add_retain(loss, aux, *retain_term)

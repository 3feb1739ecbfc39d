"""What holds the retain set in place: its cross-entropy, or the KL to the model's first outputs.

Both are objectives in their own right and the retain term of others, which call them with `apply`
and `reference_params`.

    retain_nll   mean NLL_r, over the retain tokens that count
    retain_kl    mean KL(p_reference || p), over the same; padding is left out of it
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, PyTree

from jedit.core.arguments import check_batch
from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.objectives.token_nll import Apply, counted_nll, masked_mean, token_kl


def retain_nll(
    params: PyTree,
    forget: Batch | None,
    retain: Batch,
    *,
    apply: Apply,
    reference_params: PyTree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the mean NLL of the retain batch; `forget` and `reference_params` are not used."""
    del forget, reference_params
    loss = masked_mean(*counted_nll(params, retain, apply=apply))
    return loss, {"retain_nll": loss}


def retain_kl(
    params: PyTree, forget: Batch | None, retain: Batch, *, apply: Apply, reference_params: PyTree
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the mean KL(p_reference || p) on the retain batch; it needs no targets.

    Costs one more forward pass, of the reference.  At `params = reference_params` it and its
    gradient vanish, so by itself it never moves an untouched model.

    Raises:
        ValueError: if `reference_params` is None.
    """
    del forget
    if reference_params is None:
        raise ValueError("retain_kl needs reference_params, the params before unlearning; got None")
    check_batch(retain, "retain")
    reference = jax.lax.stop_gradient(apply(reference_params, retain.inputs))
    divergence = token_kl(reference, apply(params, retain.inputs))
    loss = masked_mean(divergence, counted_outputs(retain, divergence.shape))
    return loss, {"retain_kl": loss}


def add_retain(
    loss: Float[Array, ""],
    aux: dict[str, Array],
    params: PyTree,
    forget: Batch | None,
    retain: Batch | None,
    apply: Apply,
    reference_params: PyTree | None,
    alpha: float,
    retain_objective: Callable,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return loss + α R and both their aux; the loss alone when there is no retain batch."""
    if retain is None:
        return loss, aux
    held, retain_aux = retain_objective(
        params, forget, retain, apply=apply, reference_params=reference_params
    )
    return loss + alpha * held, {**aux, **retain_aux}

"""SalUn: random labels, learnt by the parameters alone that forgetting concerns (arXiv 2310.12508).

    m = 1(|∇L_f(θ₀)| >= c)                              `transforms.mask_to_salient`
    θ <- θ₀ + m ⊙ (θ - θ₀),  θ minimising L_f(y') + L_r         `objective`

    L_f   mean NLL of the forget rows; with y' of their random labels     `forget`, `relabel`
    L_r   mean NLL of the retain rows                                     `objective`
    c     such that the mask holds a given share of all parameters        `fraction`

Differences.  The released code masks the gradient and, since 2026, puts masked parameters and their
momentum back after each step (before, weight decay moved them); ours masks the whole update.  With
SGD, momentum and weight decay the two are one, and masked parameters stay bit-identical.  It passes
first over the forget rows and then over the retain rows, each epoch; ours takes both in each step.
It draws labels anew in each epoch, the right one among them; `relabel` draws once, y' != y, as the
paper states.  The share of 0.5 is the paper's.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jedit.core.arguments import batch_list, check_function, check_optimizer, check_params
from jedit.core.batch import Batch
from jedit.core.checks import SHARE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.precision import wide_dtype
from jedit.curvature.likelihoods import Categorical
from jedit.methods._entrance import check_rows, stop_if_not_finite
from jedit.objectives import Objective, RandomLabel, sequence_nll, with_retain
from jedit.training.method import TrainingMethod
from jedit.transforms import mask_to_salient


def salun(
    apply: Callable,
    params: PyTree,
    forget: Batch | Sequence[Batch],
    optimizer: optax.GradientTransformation,
    *,
    fraction: float = 0.5,
    objective: Objective = with_retain(RandomLabel()),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make SalUn around any optimizer.

        method = salun(apply, params, forget, optax.sgd(0.01, momentum=0.9))
        other = relabel(forget, 10, key=key)
        params, history = jedit.unlearn(method, apply, params, other, retain, steps=100, key=key)

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the trained parameters θ₀, at which the saliency is measured.
        forget: the forget rows with their right labels; one batch or several.
        optimizer: the optimizer, whose updates the mask cuts.
        fraction: share of the parameters that may change (paper: 0.5).
        objective: the objective that is lowered.

    Returns:
        A method for `jedit.unlearn`, whose forget rows are to be the relabelled ones. Costs one
        gradient over the forget rows.

    Raises:
        ValueError: a fraction outside 0 to 1, or forget rows without labels.
    """
    check_numbers(SHARE, fraction=fraction)
    check_function(apply)
    check_optimizer(optimizer)
    check_params(params)
    forget = batch_list(forget, "forget")
    check_rows(apply, Categorical(), params, forget=forget)
    saliency = _summed_gradient(apply, params, forget)
    stop_if_not_finite("the saliency", 0.0, saliency, params, {"forget": forget})
    chain = optax.chain(optimizer, mask_to_salient(saliency, fraction))
    return TrainingMethod(objective, chain)


@on_auto_axes
def _summed_gradient(apply: Callable, params: PyTree, batches: Sequence[Batch]) -> PyTree:
    """Return the gradient of the summed loss: the mean's, but for a factor that no mask sees."""
    gradients = [
        jax.tree.map(lambda g: g.astype(wide_dtype(g.dtype)), _gradient(apply, params, batch))
        for batch in batches
    ]
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), gradients)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(apply: Callable, params: PyTree, batch: Batch) -> PyTree:
    return jax.grad(lambda p: jnp.sum(sequence_nll(apply, p, batch)))(params)

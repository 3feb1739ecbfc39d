"""Sharpness-aware unlearning, the plain min-max (Fan et al., ICML 2025, arXiv 2502.05374).

    minimise over θ   max L_f(θ + δ) + α L_r(θ)   over ‖δ‖ <= ρ
    δ = ρ g_f/‖g_f‖                                      to first order
    θ <- θ - η (∇L_f(θ + δ) + α ∇L_r(θ))

    L_f   forget objective, lowered: δ undoes forgetting   `forget_objective`
    L_r   retain objective, `α` its weight                 `retain_objective`, `alpha`
    g_f   ∇L_f(θ)
    ρ     radius; 0.01 is the released code's              `radius`
    η     any optimizer                                    `optimizer`

No constraint keeps δ off the retain loss: it is what `rosu` is compared with. Where UAM descends
the retain loss from θ + δ with δ ahead in forgetting, here the forget loss is descended from where
a relearner would have gone, so that what is reached is flat.

Differences. δ runs over the parameters that are trained, all others stay. Any objective may be L_f,
gradient ascent by default; the paper's is NPO: bind its `reference_params`. optax.contrib.sam is
not used: it perturbs one loss as a whole, takes no further arguments of a chain and divides by a
gradient of zero; `retain_neutral_surrogate` without its constraint is the same δ.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.objectives import ga, retain_nll
from jedit.training.method import TrainingMethod
from jedit.transforms import retain_neutral_surrogate


def sam(
    apply: Callable,
    optimizer: optax.GradientTransformation,
    *,
    radius: float = 0.01,
    alpha: float = 1.0,
    forget_objective: Callable = ga,
    retain_objective: Callable = retain_nll,
) -> TrainingMethod:
    """Sharpness-aware unlearning around any optimizer and any forget objective.

    Args:
        apply: `apply(params, inputs) -> logits`.
        optimizer: takes the min-max gradient.
        radius: ρ (paper's code: 0.01).
        alpha: weight of the retain objective; 1 is arbitrary.
        forget_objective: `(params, forget, retain, *, apply) -> (scalar, aux)`; it is given no
            retain rows, so that a retain term of its own stays away.
        retain_objective: `(params, forget, retain, *, apply) -> (scalar, aux)`.

    Returns:
        What `jedit.unlearn` takes; the angle and retain change in the optimizer's state are those
        to the gradient of the whole objective. A step costs three forget gradients and two retain
        gradients before the compiler finds those that are alike.

    Raises:
        ValueError: a radius that is not positive.
    """
    check_numbers(NOT_NEGATIVE, alpha=alpha)
    forgotten = functools.partial(forget_objective, apply=apply)
    held = functools.partial(retain_objective, apply=apply)

    def objective(params, forget, retain):
        loss, aux = forgotten(params, forget, None)
        retained, retain_aux = held(params, forget, retain)
        return loss + alpha * retained, {**aux, **retain_aux}

    def update_args(params, forget, retain):
        def forget_grad(params):
            return jax.grad(forgotten, has_aux=True)(params, forget, None)[0]

        retain_grads = jax.grad(held, has_aux=True)(params, forget, retain)[0]

        def grad_fn(params):
            weighted = jax.tree.map(lambda g: alpha * g, retain_grads)
            return jax.tree.map(jnp.add, forget_grad(params), weighted)

        return {"forget_grads": forget_grad(params), "grad_fn": grad_fn}

    surrogate = retain_neutral_surrogate(radius, constrained=False)
    return TrainingMethod(objective, optax.chain(surrogate, optimizer), update_args)

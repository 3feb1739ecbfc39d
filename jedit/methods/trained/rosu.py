"""ROSU: descend the retain loss from where forgetting has gone ahead (arXiv 2605.05871), and UAM.

    δ = argmax g_fᵀδ  subject to  g_rᵀδ = 0, ‖δ‖ <= ρ      `geometry.surrogate`
    θ <- θ - η(∇L_r(θ + δ))                                `transforms.retain_neutral_surrogate`

    g_f   gradient of the forget loss, which δ raises      `forget_loss`
    g_r   gradient of the retain loss                      `retain_objective`
    η     any optimizer                                    `optimizer`

UAM, the parent, has no constraint: δ = ρ g_f/‖g_f‖.

Differences. The gradient at θ + δ is applied at θ, as in UAM's released code [code]; ROSU's
"transported update" is known to us by name alone, so `outer="transport"` is that, and "amplify" and
"push" are ours [derived]. Published defaults of UAM: SGD, learning rate 0.01, momentum 0.9, weight
decay 5e-4, batches of 128.
"""

import functools
from collections.abc import Callable

import jax
import optax

from jedit.geometry.surrogate import Scope
from jedit.objectives import ga, retain_nll
from jedit.training.method import TrainingMethod
from jedit.transforms import retain_neutral_surrogate
from jedit.transforms.retain_neutral_surrogate import Outer


def rosu(
    apply: Callable,
    optimizer: optax.GradientTransformation,
    *,
    radius: float,
    outer: Outer = "transport",
    strength: float = 1.0,
    scope: Scope = "global",
    retain_objective: Callable = retain_nll,
) -> TrainingMethod:
    """ROSU around any optimizer.

    Args:
        apply: `apply(params, inputs) -> logits`.
        optimizer: takes the surrogate's gradient.
        radius: ρ.
        outer: "transport" (as the parent method's code), "amplify" or "push", as of
            `retain_neutral_surrogate`.
        strength: γ of the latter two; 1 is arbitrary.
        scope: of the constraint: "global" (the stated problem), or "leaf", one for every parameter.
        retain_objective: `(params, forget, retain, *, apply) -> (scalar, aux)`.

    Returns:
        What `jedit.unlearn` takes. A step costs three gradients.

    Raises:
        ValueError: an unknown `outer` or scope, or a radius that is not positive.
    """
    surrogate = retain_neutral_surrogate(radius, outer=outer, strength=strength, scope=scope)
    return _around(apply, surrogate, optimizer, retain_objective)


def uam(
    apply: Callable,
    optimizer: optax.GradientTransformation,
    *,
    radius: float,
    retain_objective: Callable = retain_nll,
) -> TrainingMethod:
    """UAM: as `rosu`, with a perturbation that ascends the forget loss and minds nothing else."""
    surrogate = retain_neutral_surrogate(radius, constrained=False)
    return _around(apply, surrogate, optimizer, retain_objective)


def _around(apply, surrogate, optimizer, retain_objective) -> TrainingMethod:
    objective = functools.partial(retain_objective, apply=apply)

    def forget_loss(params, forget):
        return -ga(params, forget, apply=apply)[0]

    def update_args(params, forget, retain):
        def grad_fn(params):
            return jax.grad(objective, has_aux=True)(params, forget, retain)[0]

        return {"forget_grads": jax.grad(forget_loss)(params, forget), "grad_fn": grad_fn}

    return TrainingMethod(objective, optax.chain(surrogate, optimizer), update_args)

"""ROSU: descend the retain loss from where forgetting has gone ahead (arXiv 2605.05871), and UAM.

    δ = argmax g_fᵀδ  subject to  g_rᵀδ = 0, ‖δ‖ <= ρ      `geometry.surrogate`
    θ <- θ - η(∇L_r(θ + δ))                                `transforms.retain_neutral_surrogate`

    g_f   gradient of the forget loss, which δ raises      minus that of `GA()`
    g_r   gradient of the retain loss                      `held`
    η     any optimizer                                    `optimizer`

UAM, the parent, has no constraint: δ = ρ g_f/‖g_f‖.

Differences. The gradient at θ + δ is applied at θ, as in UAM's released code [code]; ROSU's
"transported update" is known to us by name alone, so `outer="transport"` is that, and "amplify" and
"push" are ours [derived]. Published defaults of UAM: SGD, learning rate 0.01, momentum 0.9, weight
decay 5e-4, batches of 128.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from jedit.geometry.surrogate import Scope
from jedit.objectives import GA, Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import retain_neutral_surrogate
from jedit.transforms.retain_neutral_surrogate import Outer


def rosu(
    optimizer: optax.GradientTransformation,
    *,
    radius: float,
    outer: Outer = "transport",
    strength: float = 1.0,
    scope: Scope = "global",
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make ROSU around any optimizer.

    Args:
        optimizer: the optimizer, which takes the surrogate's gradient.
        radius: ρ, the perturbation's length.
        outer: the outer gradient, one of those of `retain_neutral_surrogate`: "transport" (as the
            parent method's code), "amplify" or "push".
        strength: γ of "amplify" and "push"; 1 is arbitrary.
        scope: where the constraint holds: "global" (the stated problem), or "leaf", for every
            parameter by itself.
        held: the retain objective.

    Returns:
        A method for `jedit.unlearn`. A step costs three gradients.

    Raises:
        ValueError: an unknown `outer` or scope, or a radius that is not positive.
    """
    surrogate = retain_neutral_surrogate(radius, outer=outer, strength=strength, scope=scope)
    return TrainingMethod(held, optax.chain(surrogate, optimizer), _Gradients(held))


def uam(
    optimizer: optax.GradientTransformation,
    *,
    radius: float,
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make UAM, which is ROSU with a perturbation that only ascends the forget loss."""
    surrogate = retain_neutral_surrogate(radius, constrained=False)
    return TrainingMethod(held, optax.chain(surrogate, optimizer), _Gradients(held))


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The surrogate's arguments: the gradient that δ follows, and the gradient taken at θ + δ."""

    held: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, PyTree | Callable]:
        def forget_loss(params: PyTree):
            return -GA()(apply, params, forget)[0]

        def grad_fn(params: PyTree) -> PyTree:
            return jax.grad(
                lambda p: self.held(apply, p, forget, retain, reference)[0], allow_int=True
            )(params)

        return {"forget_grads": jax.grad(forget_loss, allow_int=True)(params), "grad_fn": grad_fn}

"""Sharpness-aware unlearning, the plain min-max (Fan et al., ICML 2025, arXiv 2502.05374).

    minimise over θ   max L_f(θ + δ) + α L_r(θ)   over ‖δ‖ <= ρ
    δ = ρ g_f/‖g_f‖                                      to first order
    θ <- θ - η (∇L_f(θ + δ) + α ∇L_r(θ))

    L_f   forget objective, lowered: δ undoes forgetting   `objective`
    L_r   retain objective, `α` its weight                 `held`, `weight`
    g_f   ∇L_f(θ)
    ρ     radius; 0.01 is the released code's              `radius`
    η     any optimizer                                    `optimizer`

No constraint keeps δ off the retain loss: it is what `rosu` is compared with. Where UAM descends
the retain loss from θ + δ with δ ahead in forgetting, here the forget loss is descended from where
a relearner would have gone, so that what is reached is flat.

Differences. δ runs over the parameters that are trained, all others stay. Any objective may be L_f,
gradient ascent by default; the paper's is NPO: give `NPO()`. optax.contrib.sam is not used: it
perturbs one loss as a whole, takes no further arguments of a chain and divides by a gradient of
zero; `retain_neutral_surrogate` without its constraint is the same δ.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from jedit.objectives import GA, Objective, RetainNLL, with_retain
from jedit.training.method import TrainingMethod
from jedit.transforms import retain_neutral_surrogate


def sam(
    optimizer: optax.GradientTransformation,
    *,
    radius: float = 0.01,
    objective: Objective = GA(),  # noqa: B008 - frozen and hashable
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
    weight: float = 1.0,
) -> TrainingMethod:
    """Make sharpness-aware unlearning of any forget objective, around any optimizer.

    Args:
        optimizer: the optimizer, which takes the min-max gradient.
        radius: ρ (paper's code: 0.01).
        objective: the objective that forgets, without a retain term of its own.
        held: the retain objective.
        weight: weight of the retain objective; 1 is arbitrary.

    Returns:
        A method for `jedit.unlearn`; the angle and retain change in the optimizer's state are those
        to the gradient of the whole objective. A step costs three forget gradients and two retain
        gradients before the compiler finds those that are alike.

    Raises:
        ValueError: a radius that is not positive, or a weight that is negative.
    """
    whole = with_retain(objective, held, weight=weight)
    surrogate = retain_neutral_surrogate(radius, constrained=False)
    chain = optax.chain(surrogate, optimizer)
    return TrainingMethod(whole, chain, _Gradients(objective, held, weight))


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The surrogate's arguments: δ follows the forget gradient, which alone is taken at θ + δ."""

    objective: Objective
    held: Objective
    weight: float

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, PyTree | Callable]:
        def gradient(objective: Objective, params: PyTree) -> PyTree:
            return jax.grad(lambda p: objective(apply, p, forget, retain, reference), has_aux=True)(
                params
            )[0]

        retained = jax.tree.map(lambda g: self.weight * g, gradient(self.held, params))

        def grad_fn(params: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, gradient(self.objective, params), retained)

        return {"forget_grads": gradient(self.objective, params), "grad_fn": grad_fn}

"""Refresh learning: unlearn each batch by Fisher-shaped noise, then relearn it (Wang et al. 2024).

    θ_0 = θ
    θ_{j+1} = θ_j + γ F⁻¹ ∇L_t(θ_j) + N(0, 2γ F⁻¹)      j = 0 ... J - 1, the unlearning
    θ <- θ_J - η ∇L(θ_J)                                 the relearning

    L_t   loss of the batch's new rows, which rises       `unlearnt`
    L     whole objective, which is lowered               `objective`
    F     Fisher matrix of earlier tasks                  `Anchor.curvature`, damped by `damping`
    γ, J  `rate`, `inner_steps`
    η     any optimizer                                   `optimizer`

"A unified and general framework for continual learning", ICLR 2024, arXiv 2403.13249.  With F⁻¹ in
step and noise alike it is Langevin dynamics preconditioned: large where earlier tasks do not look.
[notes]

Differences. The released code [code read] does another thing: it learns first and unlearns after;
its ascent is scaled to the norm of each parameter, times 1e-5; its F⁻¹ is 1/(1 + 0.001 F) with the
empirical diagonal; and its noise has the deviation 1e-8/(1 + 0.001 F), the same F⁻¹ and no root of
it.  Ours is the equation.  F + λ stands for F, whose inverse no network has, and F may be
K-FAC's [ours]; J = 1 is the code's.  γ has no default, since it is in the units of F.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers
from jedit.methods.consolidation._anchor import Anchor
from jedit.objectives import LearnNLL, Objective
from jedit.training.method import TrainingMethod
from jedit.transforms import unlearn_first


def refresh_learning(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    inner_steps: int = 1,
    damping: float = 0.1,
    unlearnt: Objective = LearnNLL(),  # noqa: B008 - frozen and hashable
    seed: int = 0,
) -> TrainingMethod:
    """Make refresh learning of any objective and any optimizer.

        Learner(refresh_learning(with_retain(LearnNLL()), optax.sgd(0.1), rate=1e-6), keep)

    Args:
        objective: the objective that is lowered, such as replay's.
        optimizer: the optimizer that relearns.
        rate: γ; in the units of the curvature's inverse, which is per output.
        inner_steps: J, 1 as in the released code.
        damping: λ, in units of each block's mean eigenvalue; 0.1 is arbitrary.
        unlearnt: the objective that is raised; the new rows' NLL.
        seed: seed of the noise; 0 is arbitrary.

    Returns:
        A method whose reference is an `Anchor`. A step costs J + 1 gradients beside the one that
        the loop itself makes, which is not used and which the compiler leaves out.

    Raises:
        ValueError: a number out of its range.
    """
    check_numbers(NOT_NEGATIVE, rate=rate, damping=damping)
    check_numbers(COUNT, inner_steps=inner_steps)
    check_numbers(COUNT_OR_ZERO, seed=seed)
    chain = unlearn_first(optimizer, rate=rate, inner_steps=inner_steps, damping=damping, seed=seed)
    return TrainingMethod(objective, chain, _Gradients(objective, unlearnt))


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The arguments of `unlearn_first`: both gradients as functions, and the curvature."""

    objective: Objective
    unlearnt: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, Any]:
        del params  # the transform asks where it stands
        if not isinstance(reference, Anchor):
            raise TypeError(
                "refresh_learning needs as its reference what `anchored` returns; got "
                f"{type(reference).__name__}"
            )

        def gradient(objective: Objective) -> Callable[[PyTree], PyTree]:
            def loss(params: PyTree) -> Any:
                return objective(apply, params, forget, retain, reference)[0]

            return jax.grad(loss, allow_int=True)

        return {
            "curvature": reference.curvature,
            "forget_grad_fn": gradient(self.unlearnt),
            "grad_fn": gradient(self.objective),
        }

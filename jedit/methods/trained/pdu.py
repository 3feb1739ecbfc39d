"""PDU, primal-dual unlearning: flatten the forget outputs, subject to a retain loss (2506.05314).

    minimise L_f(θ)  subject to  L_r(θ) <= ε
    θ <- θ - η(∇L_f(θ) + λ ∇L_r(θ)),   λ <- max(0, λ + s (L_r(θ) - ε))

    L_f   squared logit margin of the forget outputs       `objective`, `LogitMargin`
    L_r   mean NLL of the retain rows                      `held`
    ε     the retain loss that is allowed                  `tolerance`
    λ, s  dual variable, at first 100, and its step, 5     `dual`, `dual_rate`,
                                                           `transforms.add_constraint_gradient`
    η     any optimizer                                    `optimizer`

(Entesari et al. 2025: Constrained Entropic Unlearning.) Figures are those of the TOFU
runs in the authors' branch of open-unlearning [code]: λ = 100, s = 5, ε = 0.3, Adam at 1e-5; MUSE
has λ = 50, s = 1. ε must lie above what the retain loss is at the start: below, λ only grows.

Differences. There λ is updated once a pass, so several times a step where gradients accumulate;
ours once a step. There it waits for 5 epochs; ours for `delay` steps, 0 as the class's default, as
our runs are shorter than those epochs. The update of λ at the end of each epoch, which the code
offers and its runs do not use, is left out. The margin is that of the outputs that count; see
`LogitMargin`. The loss in the history is L_f alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, PyTree

from jedit.objectives import LogitMargin, Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import add_constraint_gradient


def pdu(
    optimizer: optax.GradientTransformation,
    *,
    tolerance: float,
    dual: float = 100.0,
    dual_rate: float = 5.0,
    delay: int = 0,
    objective: Objective = LogitMargin(),  # noqa: B008 - frozen and hashable
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make primal-dual unlearning around any optimizer.

        method = pdu(optax.adam(1e-5), tolerance=0.3)
        params, history = jedit.unlearn(method, apply, params, forget, retain, steps=100, key=key)

    Args:
        optimizer: the optimizer, which takes the Lagrangian's gradient.
        tolerance: ε, the retain loss that is allowed; some more than it is at the start.
        dual: λ at the first step; 100, the TOFU runs'.
        dual_rate: s, how fast λ follows; 5, the TOFU runs'.
        delay: steps at whose end λ stays as it is; 0, the code's default.
        objective: L_f, what is minimised.
        held: L_r, what is constrained.

    Returns:
        A method for `jedit.unlearn`. A step costs two gradients, as GradDiff's.

    Raises:
        ValueError: a number is negative or not finite.
    """
    constraint = add_constraint_gradient(tolerance, dual=dual, dual_rate=dual_rate, delay=delay)
    return TrainingMethod(objective, optax.chain(constraint, optimizer), _Held(held))


@dataclasses.dataclass(frozen=True)
class _Held:
    """The constraint's arguments: the retain loss where the parameters stand, and its gradient."""

    held: Objective

    def __call__(
        self, apply: Callable, params: PyTree, forget: PyTree, retain: PyTree, reference: PyTree
    ) -> dict[str, Array | PyTree]:
        def loss(params: PyTree):
            return self.held(apply, params, forget, retain, reference)

        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return {"retain_loss": value, "retain_grads": gradient}

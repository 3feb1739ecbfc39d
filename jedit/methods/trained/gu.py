"""GU: an objective's gradient off the retain gradients, in Adam's metric (arXiv 2511.17100).

    z = g/√h,  z_⊥ = z - QQᵀz,  θ <- θ - η z_⊥/√h       `transforms.orthogonalize_to_retain`

    g   gradient of the objective                        `objective`
    Q   orthonormal basis of whitened retain gradients   `held`, `rank`, `scope`
    h   sqrt(v̂) + ε, Adam's                              `transforms.orthogonalize_to_retain`

so that to first order no step moves a retain loss that is in the basis [author's derivation].

Differences. The basis holds raw gradients, whitened anew at each step; the first released code
froze it once full. The default of `held` is the NLL, since the KL to the start has no
gradient there; the paper's is the KL: give `RetainKL()`. No momentum: it would leave the subspace.
The author's own audit in 2026 says that the published numbers are not established by the corrected
code, so none is a target here.
"""

import optax

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.geometry.surrogate import Scope
from jedit.methods.trained._retain_gradient import RetainGradient
from jedit.objectives import Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import orthogonalize_to_retain


def gu(
    objective: Objective,
    *,
    learning_rate: float | optax.Schedule,
    rank: int = 8,
    scope: Scope = "leaf",
    refresh: int = 1,
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make gradient-orthogonal unlearning (GU) of any objective.

    Args:
        objective: the objective that is lowered; `GA()`, for instance.
        learning_rate: η.
        rank: number of retain gradients in the basis (paper: 8).
        scope: "leaf", a basis for every parameter (paper), or "global".
        refresh: steps between two new retain gradients; 1 is every step.
        held: the retain objective whose gradients span the subspace.

    Returns:
        A method for `jedit.unlearn`. A step costs two gradients, and 8 rank² flops a parameter.

    Raises:
        ValueError: an unknown scope, or a rank or refresh below one.
    """
    if not callable(learning_rate):  # a schedule is
        check_numbers(NOT_NEGATIVE, learning_rate=learning_rate)
    projection = orthogonalize_to_retain(rank, refresh=refresh, scope=scope, metric="adam")
    optimizer = optax.chain(projection, optax.scale_by_learning_rate(learning_rate))
    return TrainingMethod(objective, optimizer, RetainGradient(held))

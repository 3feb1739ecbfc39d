"""Natural steps: lower any objective in the metric of the retain outputs (ours).

    minimise gᵀΔ   subject to   KL_retain(θ, θ + Δ) ≈ ½ Δᵀ F Δ ≤ ε        at every step

    g   gradient of the objective at θ                       `objective`
    F   Gauss-Newton matrix of the retain output KL at θ₀    `curvature`
    λ   damping, in units of each block's mean eigenvalue    `damping`
    ε   predicted retain KL of one step, nats per output     `predicted_kl`

By Lagrange's condition g + μ F Δ = 0, so that Δ = -α F⁻¹ g, and the constraint gives

    Δ = -min(1, α) (F + λ)⁻¹ g,        ½ α² dᵀ F d = ε,  d = (F + λ)⁻¹ g

A step is never longer than the natural gradient itself, which ends by itself where the objective's
gradient does.  The bound is on each step: n steps reach √(2ε) n at most, in the metric of F, and a
predicted KL of ε n².  What the path costs in truth, `jedit.forget` measures.

Kin.  K-FADE (arXiv 2602.10568, `kfade`) makes one or a few long steps of the forget loss alone,
whose length a line search sets: there the quadratic model has to hold over the whole edit.
RepSelect (arXiv 2606.17168) steps on a saturating objective too, in floored inverse factors of the
*forget* tokens, so that what the forget rows have in common is left alone; here the metric is what
the *retain* rows need.  Natural gradient descent (Amari 1998) has the metric of the rows that it
learns.  Ours [derived]: many short steps of a saturating objective with its retain term, the metric
of the other set, and the bound on each step.

What was measured is in `tests/bench/claims/natural.md`: on one trial many short steps kept more
utility than few long ones, tempering cost a tenth of it, and damping hardly mattered.
"""

import optax

from jedit.core.checks import COUNT, check_numbers
from jedit.core.paths import exactly
from jedit.curvature import Curvature
from jedit.objectives import Objective
from jedit.training import TrainingMethod
from jedit.transforms import natural_steps


def natural(
    objective: Objective,
    curvature: Curvature,
    *,
    damping: float = 0.01,
    predicted_kl: float | optax.Schedule = 1e-4,
    batch_size: int = 16,
) -> TrainingMethod:
    """Make a method of any objective: natural steps in the metric of the retain outputs.

        method = natural(with_retain(NPO(beta=0.04)), curvature)
        edit, info = jedit.run_method(method, apply, params, forget, retain, steps=48, key=key)

    The optimizer is the optax transform `transforms.natural_steps`, which any other loop takes.

    Args:
        objective: what is lowered, best one that saturates, with a retain term: NPO at beta 0.04.
        curvature: F, the curvature of the retain outputs; what it does not cover is not edited.
        damping: λ, in units of each block's mean eigenvalue; 0.01 (ours; on one trial 0.003 to 0.03
            were alike).
        predicted_kl: ε, what a step may cost by the quadratic model, nats per output, 1e-4 (ours);
            or an optax schedule of the step's number: steps of one length never settle.
        batch_size: rows of each set in a step; 16 is what our tables were made with.

    Returns:
        A method for `jedit.unlearn` and `jedit.run_method`.  A step costs the objective's gradient,
        one `solve` and one `quadratic_form`, and its state holds two copies of the curvature;
        parameters that the curvature does not cover are not differentiated.

    Raises:
        ValueError: a number out of its range.
    """
    check_numbers(COUNT, batch_size=batch_size)
    optimizer = natural_steps(curvature, damping=damping, predicted_kl=predicted_kl)
    return TrainingMethod(objective, optimizer, trainable=covered(curvature), batch_size=batch_size)


def covered(curvature: Curvature) -> str:
    """Return the pattern of the parameters that a curvature covers, such as `trainable` takes."""
    paths = [path for block in curvature.blocks.values() for path in block.weight.paths]
    return "|".join(exactly(dict.fromkeys(paths)))

"""Natural steps in the metric of the retain outputs, each bounded by its predicted KL.

    u = -min(1, α) (F + λ)⁻¹ g,        ½ α² dᵀ F d = ε,  d = (F + λ)⁻¹ g

`scale_by_curvature`, the sign, and `clip_by_curvature_norm`, in the one order that bounds the step.
The derivation is in `jedit.methods.natural`.
"""

import optax
from jaxtyping import Array

from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.curvature import Curvature
from jedit.transforms.clip_by_curvature_norm import clip_by_curvature_norm
from jedit.transforms.scale_by_curvature import scale_by_curvature


def natural_steps(
    curvature: Curvature,
    *,
    damping: float | Array = 0.01,
    predicted_kl: float | Array | optax.Schedule = 1e-4,
) -> optax.GradientTransformation:
    """Return the steps of `jedit.methods.natural`, of whatever gradient is given.

    It takes the place of Adam and its learning rate: nothing belongs behind it in a chain.

    Args:
        curvature: F, the curvature of the retain outputs.
        damping: λ, 0.01 (ours), in units of each block's mean eigenvalue.
        predicted_kl: ε, 1e-4 (ours), the predicted retain KL of one step at most, nats per
            output; or a schedule of it, such as `falling`.

    Raises:
        ValueError: a number out of its range.
    """
    check_numbers(NOT_NEGATIVE, damping=damping)
    if not callable(predicted_kl):
        check_numbers(POSITIVE, predicted_kl=predicted_kl)
    return optax.chain(
        scale_by_curvature(curvature, damping=damping),
        optax.scale(-1.0),
        clip_by_curvature_norm(curvature, predicted_kl),
    )


def falling(predicted_kl: float, steps: int) -> optax.Schedule:
    """Return ε (1 - t/steps)²: the length of a step, which is as √ε, falls linearly to nothing.

    Steps of one length end in a walk around what they are to reach, at a retain KL that rises and
    falls by a factor of three.
    """
    check_numbers(POSITIVE, predicted_kl=predicted_kl)
    check_numbers(COUNT, steps=steps)
    return optax.polynomial_schedule(predicted_kl, 0.0, 2, steps)

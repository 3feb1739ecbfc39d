"""l1-sparse: fine-tune on the retain rows under an L1 penalty that fades (arXiv 2304.04934).

    minimise L_r(θ) + γ_t ‖θ‖₁,   γ_t = γ (1 - t/T)     `transforms.add_l1_gradient`

    L_r   mean NLL of the retain rows                    `held`
    γ     strength of the penalty at the first step      `strength`
    T     steps after which there is none                `steps`

Sparse models lose sooner what they are not reminded of; the forget rows are not looked at.

Differences.  γ_t falls from step to step; in the released code from epoch to epoch.  As there, the
penalty's subgradient is what is followed, so weights come near zero and are not set to it.  A γ
of 0.2 is the default in the code and fits no model of ours: there is none here.
"""

import optax

from jedit.core.checks import COUNT, NOT_NEGATIVE, check_numbers
from jedit.objectives import Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import add_l1_gradient


def l1_sparse(
    optimizer: optax.GradientTransformation,
    *,
    strength: float,
    steps: int,
    held: Objective = RetainNLL(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make l1-sparse fine-tuning with any optimizer.

    Args:
        optimizer: the optimizer, which takes the penalised gradient.
        strength: γ, the penalty's weight at the first step.
        steps: T, the length of the run, or less.
        held: the retain objective.

    Returns:
        A method for `jedit.unlearn`; the loss in its history is L_r alone.

    Raises:
        ValueError: a negative strength, or no steps.
    """
    check_numbers(NOT_NEGATIVE, strength=strength)
    check_numbers(COUNT, steps=steps)
    penalty = add_l1_gradient(optax.linear_schedule(strength, 0.0, steps))
    return TrainingMethod(held, optax.chain(penalty, optimizer))

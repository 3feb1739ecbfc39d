"""RepSelect: forget by what sets the forget rows apart, not by what they share (arXiv 2606.17168).

    U = Σ (C_A a)(C_G g)ᵀ,   C = λ_k max(M, λ_k)⁻¹       `transforms.shrink_top_directions`
    θ <- θ - η U/‖U‖                                      `learning_rate`

    a, g    a forget token's input to a matrix, and the gradient of the objective at its output
    M       the forget tokens' moments of both: A, G      `curvature`
    λ_k     the k-th largest eigenvalue of M, k = 512     `rank`, `share`
    -       NPO, which saturates, at β = 0.1              `objective`

The directions that hold most of the forget tokens serve other tokens as well, and fine-tuning finds
them first; what is written into the others disrupts less and comes back more slowly [paper].

Differences. The trainer that was read ([code], the authors' branch of open-unlearning) centres both
moments, sends each token's vector to its own component along C times it, estimates the k directions
anew each epoch, trains the MLPs' matrices alone, and takes the gradient with an adversarial LoRA in
the model; in versions it projects against a retain gradient too. Ours is linear: moments about zero
and fixed, C itself, every matrix that the curvature covers, no adversary and no retain rows. A
version that came later takes for M the left and right singular values of the summed gradient. G is
what the curvature has, by default of labels that the model draws, not of the objective. k is
512 as in a later release (400 in the trainer), and at most an eighth of a factor's directions,
since it is an eighth of the width of an 8B model; with all of a narrow model's, C would whiten.
SGD and η = 0.2 are the trainer's; a step's length is that of all matrices together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jedit.core.checks import NOT_NEGATIVE, check_numbers
from jedit.curvature import Curvature
from jedit.objectives import NPO, Objective
from jedit.training.method import TrainingMethod
from jedit.transforms import shrink_top_directions


def repselect(
    curvature: Curvature,
    *,
    learning_rate: float | optax.Schedule = 0.2,
    rank: int = 512,
    share: float = 0.125,
    objective: Objective = NPO(),  # noqa: B008 - frozen and hashable
) -> TrainingMethod:
    """Make RepSelect, of any objective whose gradient forgets.

        estimator = jedit.kfac(apply, Categorical(), select="mlp")
        curvature = jedit.estimate(estimator, params, batches(forget, 32), key=key)
        method = repselect(curvature)

    Args:
        curvature: K-FAC of the forget rows, of a text at its answers' tokens alone; parameters that
            it does not cover stay as they are.
        learning_rate: η, the length of each step; 0.2 is the code's. It stands in the optimizer's
            state by that name.
        rank: k, how many directions of a factor are shrunk, at most: 512, the code's.
        share: of a factor's directions, at most; 0.125 is 512 of 4096.
        objective: what is lowered on the forget rows.

    Returns:
        A method for `jedit.unlearn`. A step costs one gradient and one `solve`.

    Raises:
        ValueError: a rank, share or rate out of its range, or no block has two factors.
    """
    if not callable(learning_rate):  # a schedule is
        check_numbers(NOT_NEGATIVE, learning_rate=learning_rate)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(-learning_rate))
    optimizer = optax.chain(
        shrink_top_directions(curvature, rank=rank, share=share),
        _to_unit_length(),
        rate(learning_rate=learning_rate),
    )
    return TrainingMethod(objective, optimizer)


def _to_unit_length() -> optax.GradientTransformation:
    def init(params) -> Any:
        del params
        return optax.EmptyState()

    def update(updates, state, params=None) -> Any:
        del params
        # By the largest entry first: squares of a saturated gradient's leave the dtype.
        largest = [jnp.max(jnp.abs(u), initial=0.0) for u in jax.tree.leaves(updates)]
        most = jnp.max(jnp.stack([m.astype(jnp.result_type(float)) for m in largest]))
        most = jnp.where(most > 0, most, 1)
        scaled = jax.tree.map(lambda u: u / most.astype(u.dtype), updates)
        norm = optax.tree_utils.tree_norm(scaled)
        norm = jnp.where(norm > 0, norm, 1)
        return jax.tree.map(lambda u: u / norm.astype(u.dtype), scaled), state

    return optax.GradientTransformation(init, update)

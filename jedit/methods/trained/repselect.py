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
moments, takes G of the objective itself, estimates the k directions anew each epoch, trains the
MLPs' matrices alone, and in versions projects against a retain gradient. So do we where it is asked
for: the moments are `repselect_moments`, centred and of the objective;
`requests.unlearn_refitted` takes them anew; the curvature's `select` says which matrices are
trained; `retain_rank` projects. The catalogue's row has none of it: its moments are a curvature's,
about zero, of labels that the model draws, once, of every matrix that this covers. What the trainer
does and we don't: it sends each token's vector to its own component along C times it, where ours is
linear, C itself; and takes the gradient with an adversarial LoRA in the model, for which
`jedit.methods.sam` is the nearest here. A version that came later takes for M the left and right
singular values of the summed gradient. k is 512 as in a later release (400 in the trainer), and at
most an eighth of a factor's directions, since it is an eighth of the width of an 8B model; with all
of a narrow model's, C would whiten. SGD and η = 0.2 are the trainer's; a step's length is that of
all matrices together. What was measured of both on a small GPT, which is not the published factor:
tests/bench/claims/spectral.md.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import register_static
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT_OR_ZERO, NOT_NEGATIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.paths import exactly
from jedit.curvature import Curvature, Estimator, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.methods.trained._retain_gradient import RetainGradient
from jedit.objectives import NPO, Objective, RetainNLL
from jedit.training.method import TrainingMethod
from jedit.transforms import orthogonalize_to_retain, shrink_top_directions


def repselect(
    curvature: Curvature,
    *,
    learning_rate: float | optax.Schedule = 0.2,
    rank: int = 512,
    share: float = 0.125,
    objective: Objective = NPO(),  # noqa: B008 - frozen and hashable
    retain_rank: int = 0,
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
        retain_rank: how many of the last gradients of the retain loss steps are projected off, in
            each parameter by itself; 0, none, and no retain rows are looked at.

    Returns:
        A method for `jedit.unlearn`. A step costs one gradient and one `solve`, and with a
        projection a gradient more.

    Raises:
        ValueError: a rank, share or rate out of its range, or no block has two factors.
    """
    if not callable(learning_rate):  # a schedule is
        check_numbers(NOT_NEGATIVE, learning_rate=learning_rate)
    check_numbers(COUNT_OR_ZERO, retain_rank=retain_rank)
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(-learning_rate))
    shrink = shrink_top_directions(curvature, rank=rank, share=share)
    end = _to_unit_length(), rate(learning_rate=learning_rate)
    # Of what the curvature does not cover no gradient is taken, nor any kept.
    covered = "|".join(exactly(curvature.covered))
    if not retain_rank:
        optimizer = optax.chain(shrink, *end)
        return TrainingMethod(objective, optimizer, trainable=covered)
    # Behind the shrinking, which would turn it; a length leaves a direction as it is.
    optimizer = optax.chain(shrink, orthogonalize_to_retain(retain_rank), *end)
    return TrainingMethod(objective, optimizer, RetainGradient(RetainNLL()), covered)


@on_auto_axes
def repselect_moments(
    apply: Apply,
    params: PyTree,
    forget: Iterable[Batch],
    *,
    objective: Objective = NPO(),  # noqa: B008 - frozen and hashable
    reference: PyTree | None = None,
    select: str | Sequence[str] | None = None,
    key: Key[Array, ""],
) -> Curvature:
    """Return the moments of the trainer: of the objective's own gradients, and centred.

        moments = repselect_moments(apply, params, map(answers_only, batches(forget, 32)), key=key)
        method = repselect(moments)

    At the reference NPO's are those of `kfac(..., fisher="empirical", centred=True)` but for a
    factor, which no direction depends on; later it weighs less what is forgotten already.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: where the gradients are taken.
        forget: batches of the forget rows, of a text at its answers' tokens alone.
        objective: whose gradients; of the forget rows alone, each row's by itself, so that all rows
            weigh alike. (NPO is a mean over rows; of one over tokens, each is its row's mean.)
        reference: the params before unlearning; None: `params` are.
        select: which parameters, as in `kfac`; the paper's are the matrices of the MLPs.
        key: the key of the estimate, which draws nothing here.

    Returns:
        A curvature for `repselect`. Costs three forward passes, two of them row by row, and two
        activation-backward ones, one of them so.

    Raises:
        ValueError: as `estimate` and `kfac` refuse.
    """
    reference = params if reference is None else reference
    estimator = _centred(apply, select if select is None or isinstance(select, str) else (*select,))

    def with_gradients(batch: Batch) -> Batch:
        return batch._replace(targets=_gradients(apply, objective, params, reference, batch))

    return estimate(estimator, params, map(with_gradients, forget), key=key)


@register_static
@dataclass(frozen=True)
class _Given(Categorical):
    """A likelihood whose gradients are given in the place of labels."""

    def label_limits(self, outputs) -> None:
        del outputs

    def empirical_cotangent(self, outputs: Array, targets: Array) -> Array:
        return targets.astype(outputs.dtype)


@functools.lru_cache(maxsize=8)
def _centred(apply: Apply, select: str | tuple[str, ...] | None) -> Estimator:
    """One estimator for each model: moments that are taken anew compile nothing."""
    return kfac(apply, _Given(), select=select, fisher="empirical", centred=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    apply: Callable, objective: Objective, params: PyTree, reference: PyTree, batch: Batch
) -> Float[Array, "*lead classes"]:
    """Return the objective's gradient at the outputs of the params, row by row.

    Row by row, so that no row weighs by how many others, empty ones too, share its batch, and an
    objective that goes through a batch in blocks of rows has the outputs of its own row alone.
    """

    def of_row(row: Batch) -> Array:
        one = jax.tree.map(lambda x: x[None], row)
        outputs = jax.eval_shape(apply, params, one.inputs)

        def loss(probe):
            # It is added to the reference's outputs as well, whose gradient an objective stops.
            probed = lambda params, inputs: apply(params, inputs) + probe  # noqa: E731
            return objective(probed, params, one, None, reference)[0]

        return jax.grad(loss)(jnp.zeros(outputs.shape, outputs.dtype))[0]

    return jax.lax.map(of_row, jax.tree.map(jnp.asarray, batch))


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

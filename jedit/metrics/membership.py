"""Membership inference from a classifier's outputs: can it be told what the model was trained on?

    confidence         p_y
    entropy            -Σ_i p_i log p_i
    correctness        1 if argmax_i p_i = y, else 0
    modified_entropy   -(1 - p_y) log p_y - Σ_{i≠y} p_i log(1 - p_i)

Members of the training set have high confidence and low entropies, and are classified correctly.
The modified entropy (Song and Mittal, arXiv 2003.10595) is 0 for a row whose label is given for
certain and grows without bound for one that is given another for certain; the plain one cannot tell
these apart.

    MIA = |{forget rows that the attack calls non-members}| / |{forget rows}|

as in SalUn's tables (arXiv 2310.12508).  The attack is fitted to tell retain rows, members, from
test rows, non-members, under the model that is judged.  Best is what a retrained model has; 0 is
a model to which all forget rows still look like its own.

Differences.  The code released with SalUn has log p_i in the place of log(1 - p_i), and treats
each row's label as if it were a label of every row in the batch; ours is the formula above.  Its
attack is a support vector machine (radial kernel, C = 3) on equal numbers of retain and test rows,
which on one score a row is a smooth threshold.  Ours are two thresholds without a solver or a draw:
"midpoint", half way between the mean member and the mean non-member (linear discriminant), and
"best", that of the largest balanced accuracy, found exactly.  Where the two sets overlap nearly
whole the best one jumps: between small networks for MNIST from 0.76 to 0.9999, and MIA with it.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jedit.core.arguments import check_word
from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.metrics.streaming import each_batch
from jedit.objectives.token_nll import labelled_values

Kind = Literal["confidence", "entropy", "modified_entropy", "correctness"]
Rule = Literal["midpoint", "best"]


class MembershipAttack(NamedTuple):
    """A threshold attack: how many forget rows it calls non-members, and how good it is.

    Attributes:
        efficacy: share of the forget rows called non-members.
        threshold: rows that score at least this are called members.
        balanced_accuracy: balanced accuracy on the rows that the threshold was fitted to; 0.5 is
            chance.
    """

    efficacy: float
    threshold: float
    balanced_accuracy: float


@on_auto_axes
def membership_scores(
    apply: Apply, params: PyTree, batches: Iterable[Batch] | Batch, *, kind: Kind = "confidence"
) -> Float[np.ndarray, " n"]:
    """Return the score of every output that counts, in the order given, in float64.

    Raises:
        ValueError: an unknown kind, or batches without one label per output.
    """
    check_word(Kind, kind=kind)
    parts = jax.device_get(
        [_scores(apply, kind, params, batch) for batch in each_batch(apply, params, batches)]
    )
    return np.concatenate([np.zeros(0), *(scores[counted] for scores, counted in parts)])


def membership_attack(
    members: ArrayLike, nonmembers: ArrayLike, forget: ArrayLike, *, rule: Rule = "midpoint"
) -> MembershipAttack:
    """Fit a threshold on two sets of scores, and ask it about a third.

    The numbers of members and non-members need not be equal, since each set weighs one half.

    Args:
        members: scores of retain rows, (n,), higher for a member: entropies with their sign turned.
        nonmembers: scores of test rows, (m,).
        forget: scores of the forget rows, (k,).
        rule: "midpoint", or "best": of equally good thresholds the lowest.

    Returns:
        The attack. Costs one sort.

    Raises:
        ValueError: an unknown rule, or a set is empty, has more than one axis or holds NaN.
    """
    check_word(Rule, rule=rule)
    sets = [np.asarray(x, np.float64) for x in (members, nonmembers, forget)]
    for name, scores in zip(("members", "nonmembers", "forget"), sets, strict=True):
        if scores.ndim != 1 or scores.size == 0 or np.any(np.isnan(scores)):
            raise ValueError(
                f"{name} must be numbers of shape (n,), n > 0; got shape {scores.shape} with "
                f"{np.sum(np.isnan(scores))} NaN"
            )
    inside, outside = np.sort(sets[0]), np.sort(sets[1])
    if rule == "midpoint":
        thresholds = np.array([(np.mean(inside) + np.mean(outside)) / 2])
    else:  # between two neighbouring scores nothing changes
        thresholds = np.unique(np.concatenate([inside, outside]))
    missed = np.searchsorted(inside, thresholds) / len(inside)
    caught = np.searchsorted(outside, thresholds) / len(outside)
    # Shares, not numbers, of both sets: the larger one would else set the threshold.
    accuracy = (1 - missed + caught) / 2
    chosen = int(np.argmax(accuracy))
    efficacy = np.mean(sets[2] < thresholds[chosen])
    return MembershipAttack(float(efficacy), float(thresholds[chosen]), float(accuracy[chosen]))


@partial(jax.jit, static_argnums=(0, 1))
def _scores(
    apply: Apply, kind: Kind, params: PyTree, batch: Batch
) -> tuple[Float[Array, "*lead"], Bool[Array, "*lead"]]:
    def values(logits, targets, counted):
        return _FORMULAS[kind](jax.nn.log_softmax(logits, axis=-1), targets), counted

    return labelled_values(values, apply, params, batch)


def _confidence(log_p: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]) -> Array:
    return jnp.exp(_picked(log_p, targets))


def _entropy(log_p: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]) -> Array:
    del targets
    return -jnp.sum(_times(jnp.exp(log_p), log_p), axis=-1)


def _modified_entropy(log_p: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]) -> Array:
    log_not_p = _log_complement(log_p)
    of_target = _times(jnp.exp(_picked(log_not_p, targets)), _picked(log_p, targets))
    is_target = jax.nn.one_hot(targets, log_p.shape[-1], dtype=bool)
    of_others = _times(jnp.where(is_target, 0, jnp.exp(log_p)), log_not_p)
    return -of_target - jnp.sum(of_others, axis=-1)


def _correctness(log_p: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]) -> Array:
    return (jnp.argmax(log_p, axis=-1).astype(targets.dtype) == targets).astype(log_p.dtype)


_FORMULAS = {
    "confidence": _confidence,
    "entropy": _entropy,
    "modified_entropy": _modified_entropy,
    "correctness": _correctness,
}


def _log_complement(log_p: Float[Array, "*lead classes"]) -> Array:
    """Return log(1 - p_i): log1p(-p_i), but for the likeliest class the sum over the others.

    That class alone can have p_i near 1, where 1 - p_i has no digits left.
    """
    is_top = jax.nn.one_hot(jnp.argmax(log_p, axis=-1), log_p.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_top, -jnp.inf, log_p), axis=-1, keepdims=True)
    return jnp.where(is_top, others, jnp.log1p(-jnp.exp(jnp.where(is_top, -jnp.inf, log_p))))


def _picked(values: Float[Array, "*lead classes"], targets: Int[Array, "*lead"]) -> Array:
    return jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def _times(p: Array, log: Array) -> Array:
    """Return p log, with 0 for p = 0 also where the logarithm is infinite."""
    return p * jnp.where(p > 0, log, 0)

"""What forgetting one thing does to its neighbours: change by group, and nearness to it.

    change(g)     mean over a group's rows of  score after - score before
    nearness(g)   cos(h_g - h_0, h_f - h_0)

h_g is the mean hidden state of a group's outputs that count, h_f that of the forget rows and h_0
the mean of all groups', which all rows of a language have in common.  A rank correlation of the two
over the groups says whether nearer ones pay more.  Refusals, a probability and ROUGE are such
scores.

Differences.  All of it is ours: that unlearning in a narrow domain spreads to others is reported in
several ways, and no definition of distance is agreed on [notes].  The interval of a share is that
of Agresti and Min (2005) for a difference of paired shares, with half a row added to each of the
four cells (yes or no, before and after): rows that all went one way are not taken for certain.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from jedit.core.batch import Apply, Batch
from jedit.core.devices import on_auto_axes
from jedit.core.outputs import counted_outputs
from jedit.core.precision import wide
from jedit.metrics.streaming import each_batch
from jedit.objectives.hidden_states import Hidden


class Change(NamedTuple):
    """How a score of a group's rows changed.

    Attributes:
        before: mean of the score before.
        after: mean of the score after.
        change: mean of the rows' differences.
        low: lower end of its 95% interval over the rows, each taken for one of its own; Student's,
            NaN of one row, or of a score that is 0 or 1 of every row, Agresti and Min's.
        high: upper end, likewise.
        num_rows: number of rows.
    """

    before: float
    after: float
    change: float
    low: float
    high: float
    num_rows: int


def change_by_group(
    before: ArrayLike, after: ArrayLike, groups: Sequence[str]
) -> dict[str, Change]:
    """Return by group how a score changed, in the order in which the groups are met.

    Args:
        before: score of each row, (n,), of the model before.
        after: score of the same rows of the model after.
        groups: name of each row's group.

    Raises:
        ValueError: the three are not of one length, or a score is not finite.
    """
    scores = [np.asarray(x, np.float64) for x in (before, after)]
    if isinstance(groups, str) or any(x.shape != (len(groups),) for x in scores):
        shapes = " and ".join(str(x.shape) for x in scores)
        raise ValueError(f"expected two scores and a group for each row, got scores of {shapes}")
    if not all(np.isfinite(x).all() for x in scores):
        raise ValueError("scores must be finite; a model that is destroyed has none")
    names = np.asarray(groups, object)
    # By the whole set: a probability may happen to be 0 of all rows of a group.
    interval = _of_shares if all(np.isin(x, (0, 1)).all() for x in scores) else _students
    found = {}
    for name in dict.fromkeys(groups):
        a, b = (x[names == name] for x in scores)
        ends = interval(b - a)
        found[name] = Change(float(a.mean()), float(b.mean()), float((b - a).mean()), *ends, len(a))
    return found


def _students(moved: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    number, mean = len(moved), float(moved.mean())
    if number < 2:
        return float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, number - 1)) * float(moved.std(ddof=1)) / number**0.5
    return mean - half, mean + half


def _of_shares(moved: np.ndarray) -> tuple[float, float]:
    # Of the half rows added one went up and one down, so they move the mean by nothing.
    number = len(moved) + 2
    mean = float(moved.sum()) / number
    variance = (float(np.square(moved).sum()) + 1) / number - mean**2
    half = NormalDist().inv_cdf(0.975) * (variance / number) ** 0.5
    return max(mean - half, -1.0), min(mean + half, 1.0)


@on_auto_axes
def nearness(
    apply: Apply,
    params: PyTree,
    forget: Iterable[Batch] | Batch,
    groups: Mapping[str, Iterable[Batch] | Batch],
    *,
    hidden: Hidden,
) -> dict[str, float]:
    """Return by group the cosine of its mean hidden state and the forget rows', from -1 to 1.

    Of two groups the one's is the other's with its sign turned, as h_0 lies in the middle.  Groups
    and forget rows that ask in other words than one another differ by that too: give each the same
    mix of questions, or what is measured is the mix.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the parameters, before unlearning.
        forget: rows to be forgotten.
        groups: rows of each group, two groups at least.
        hidden: `(apply, params, inputs) -> states` with the outputs' leading shape, hashable; those
            at the outputs that count are looked at.

    Raises:
        ValueError: fewer than two groups, one that counts no output, or one whose mean is that of
            all groups, so that there is no angle.
        FloatingPointError: hidden states that are not finite.
    """
    if len(groups) < 2:
        raise ValueError(f"nearness needs two groups to tell apart, got {len(groups)}")
    mean = partial(_mean_state, apply, params, hidden)
    target, means = mean("forget", forget), {n: mean(n, rows) for n, rows in groups.items()}
    centre = np.mean(list(means.values()), axis=0)
    return {name: _cosine(name, x - centre, target - centre) for name, x in means.items()}


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation; NaN where one of the two does not vary, or holds NaN.

    Raises:
        ValueError: not as many of the one as of the other.
    """
    values = [np.asarray(given, np.float64) for given in (x, y)]
    if values[0].ndim != 1 or values[0].shape != values[1].shape:
        raise ValueError(f"expected as many of both, got {[v.shape for v in values]}")
    if values[0].size < 2 or not np.isfinite(values).all() or not np.ptp(values, axis=1).all():
        return float("nan")
    from scipy import stats

    ranks = [stats.rankdata(given) for given in values]  # of ties the mean rank
    return float(np.corrcoef(ranks)[0, 1])


def _cosine(name: str, x: np.ndarray, y: np.ndarray) -> float:
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    if not norm > 0:
        raise ValueError(f"the mean hidden state of {name!r} is that of all: there is no angle")
    return float(x @ y / norm)


def _mean_state(
    apply: Apply, params: PyTree, hidden: Hidden, name: str, rows: Iterable[Batch] | Batch
) -> np.ndarray:
    parts = [
        _state_sums(apply, hidden, params, batch)
        for batch in each_batch(apply, params, rows, has_labels=False)
    ]
    total = np.sum([np.asarray(x, np.float64) for x, _ in parts], axis=0)
    count = sum(int(n) for _, n in parts)
    if not count:
        raise ValueError(f"the rows of {name!r} count no output: mask and valid leave out all")
    if not np.isfinite(total).all():
        raise FloatingPointError(f"the hidden states of {name!r} are not finite")
    return total / count


@partial(jax.jit, static_argnums=(0, 1))
def _state_sums(
    apply: Callable, hidden: Hidden, params: PyTree, batch: Batch
) -> tuple[Float[Array, " width"], Array]:
    states = wide(hidden(apply, params, batch.inputs))
    counted = counted_outputs(batch, states.shape[:-1])
    kept = jnp.where(counted[..., None], states, 0)
    return jnp.sum(kept, axis=tuple(range(counted.ndim))), jnp.sum(counted)

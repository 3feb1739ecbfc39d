"""Numbers of rows with their 95% intervals.

    mean            percentile bootstrap over the rows, 2,000 draws (SciPy); of shares that are all
                    one value, which a bootstrap cannot doubt, Wilson's for so many rows
    several means   the same, all sets drawn anew each time, the models' values of one row together
    AUC             Newcombe (2006), method 5: the areas that the observed one is no further from
                    than z times their own standard error, by Hanley and McNeil's formula

Rows are the unit everywhere: the tokens of one answer go right or wrong together.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jedit import metrics
from jedit.report.audit_results import Estimate
from jedit.report.verdict import wilson

DRAWS = 2000
LEVEL = 0.95
BOOTSTRAP = "percentile bootstrap over rows"
NEWCOMBE = "Newcombe's interval of an area"
Values = Float[np.ndarray, " _"]  # sets of rows have sizes of their own
Numbers = Any  # an array of draws, or the one number of the rows themselves


class Compared(NamedTuple):
    """One measure of the forget rows by model, and of what stands for never having seen them.

    Attributes:
        base: values of the forget rows under the original model; higher: known better.
        edited: the same under the edited model.
        retrained: the same under the retrained model, if there is one.
        unseen_base: values of the unseen rows under the original model, if there are such rows.
        unseen: the same under the edited model.
    """

    base: Values
    edited: Values
    retrained: Values | None = None
    unseen_base: Values | None = None
    unseen: Values | None = None

    @property
    def has_reference(self) -> bool:
        """Say whether it is known what a model has that never saw the rows."""
        return self.retrained is not None or self.unseen is not None

    @property
    def models(self) -> dict[str, Estimate]:
        """Return the means by column."""
        named = {
            "base": self.base,
            "edited": self.edited,
            "retrained": self.retrained,
            "unseen": self.unseen,
        }
        return {name: mean_of(values) for name, values in named.items() if values is not None}


def mean_of(values: Values, *, level: float = LEVEL, is_share: bool = True) -> Estimate:
    """Return the mean of values; where all are one, with Wilson's interval if they are shares."""
    values = np.asarray(values, np.float64)
    found = bootstrapped(lambda x: x[0].mean(axis=-1), [values[None]], level=level)
    if is_share and len(values) > 1 and 0 <= values[0] <= 1 and np.ptp(values) == 0:
        return Estimate(float(values[0]), *wilson(float(values[0]), len(values)), len(values))
    return found


def bootstrapped(
    statistic: Callable[..., Numbers],
    groups: list[np.ndarray],
    *,
    level: float = LEVEL,
) -> Estimate:
    """Return a statistic of sets of rows with its percentile interval.

    Args:
        statistic: a function of one array (columns, ..., n) for each set of rows that takes the
            rows, the last axis, together.
        groups: the sets, (columns, n) each; the columns of one are drawn together.
        level: of the interval.

    Returns:
        The statistic; with an interval of NaN where a set has fewer than two rows, or it is not
        finite.
    """
    from scipy import stats

    num_rows = min(group.shape[1] for group in groups)
    value = float(statistic(*groups))
    if num_rows < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, num_rows)

    def of_drawn(*places: np.ndarray, axis: int) -> Numbers:
        del axis  # the last, as always
        return statistic(*(group[:, place] for group, place in zip(groups, places, strict=True)))

    # SciPy 1.15 calls it `rng`, and takes the old name still.
    seeded: Any = {"random_state": np.random.default_rng(0)}
    found = stats.bootstrap(
        tuple(np.arange(group.shape[1]) for group in groups),
        # Sets are drawn by their places, so that a row's columns stay together.
        of_drawn,
        n_resamples=DRAWS,
        batch=max(1, 4_000_000 // max(group.size for group in groups)),
        method="percentile",
        vectorized=True,
        confidence_level=level,
        **seeded,
    )
    low, high = found.confidence_interval
    return Estimate(value, float(low), float(high), num_rows)


def gap_of(known: Compared) -> Estimate:
    """Return how much more the original model has than one that never saw the rows.

    Raises:
        ValueError: there is neither a retrained model nor an unseen row.
    """
    if known.retrained is not None:
        return mean_difference(known.base, known.retrained)
    if known.unseen_base is None:
        raise ValueError("what was never seen is not known: there is no retrained model, no row")
    groups = [known.base[None], known.unseen_base[None]]
    return bootstrapped(lambda x, y: x[0].mean(-1) - y[0].mean(-1), groups)


def left_of(
    known: Compared, *, scale: Compared | None = None, level: float = LEVEL
) -> Estimate | None:
    """Return the share that is left of what the original model alone knew.

        (edited - never) / (original - never),   never the retrained model's mean on the same rows,
                                                 or each model's on the unseen rows

    Args:
        known: the measure.
        scale: the measure whose gap is the denominator; None: this one.
        level: of the interval.

    Returns:
        The share: 0 as if never seen, 1 nothing forgotten; None without a reference.
    """
    scale = known if scale is None else scale
    if known.retrained is not None and scale.retrained is not None:
        rows = np.stack([known.edited, known.retrained, scale.base, scale.retrained])

        def share(x: np.ndarray) -> Numbers:
            e, r, b, n = x.mean(axis=-1)
            return _divided(e - r, b - n)

        found = bootstrapped(share, [rows], level=level)
        spread = np.ptp(known.edited - known.retrained)
    elif known.unseen is not None and scale.unseen_base is not None:
        rows = np.stack([known.edited, scale.base])
        others = np.stack([known.unseen, scale.unseen_base])

        def share_of_two(x: np.ndarray, y: np.ndarray) -> Numbers:
            (e, b), (u, n) = x.mean(axis=-1), y.mean(axis=-1)
            return _divided(e - u, b - n)

        found = bootstrapped(share_of_two, [rows, others], level=level)
        spread = np.ptp(known.edited) + np.ptp(known.unseen)
    else:
        return None
    if spread == 0:  # no bootstrap can doubt rows that are all alike
        reach = wilson(0.0, found.num_rows).high / max(gap_of(scale).value, 1e-12)
        return found._replace(low=found.value - reach, high=found.value + reach)
    return found


def comeback_of(
    known: Compared, attacked: Values, never: Values | None = None, *, chosen: Any = slice(None)
) -> Estimate:
    """Return how much an attack brings back, as a share of what the original model alone knew.

        min( gain(edited) - gain(never),  (attacked - never attacked) ) / (original - never)

    The gain is what the attack adds.  What it adds to a model that never knew is no comeback, nor
    is what it adds to one that was pushed below such a model, up to that model's level: hence the
    smaller of the two.  Without a reference it is gain(edited) / (original - edited), a share of
    what was taken away.

    Args:
        known: the measure without an attack.
        attacked: the forget rows' values under the attacked edited model.
        never: those of the reference under the same attack: of the forget rows under the attacked
            retrained model, or of the same unseen rows under the attacked edited one; None: as
            without an attack.
        chosen: places of the forget rows that were asked about; unseen ones are given already cut.

    Returns:
        The share: 0 nothing comes back, 1 as much as the original model alone knew.
    """
    base, edited = known.base[chosen], known.edited[chosen]
    if known.retrained is not None:
        retrained = known.retrained[chosen]
        rows = [attacked, edited, base, retrained if never is None else never, retrained]

        def paired(x: np.ndarray) -> Numbers:
            a, e, b, after, before = x.mean(axis=-1)
            return _divided(np.minimum(a - e - (after - before), a - after), b - before)

        return bootstrapped(paired, [np.stack(rows)])
    if known.unseen is not None and known.unseen_base is not None:
        after = known.unseen if never is None else never
        others = [known.unseen, known.unseen_base, after]  # of the same rows, drawn together

        def unpaired(x: np.ndarray, y: np.ndarray) -> Numbers:
            (a, e, b), (before, unknown, late) = x.mean(axis=-1), y.mean(axis=-1)
            return _divided(np.minimum(a - e - (late - before), a - late), b - unknown)

        groups = [np.stack([attacked, edited, base]), np.stack(others)]
        return bootstrapped(unpaired, groups)

    def alone(x: np.ndarray) -> Numbers:
        a, e, b = x.mean(axis=-1)
        return _divided(a - e, b - e)

    return bootstrapped(alone, [np.stack([attacked, edited, base])])


def mean_difference(one: Values, other: Values) -> Estimate:
    """Return the difference of two models' means on the same rows."""
    return bootstrapped(lambda x: (x[0] - x[1]).mean(axis=-1), [np.stack([one, other])])


def ratio_of(one: Values, other: Values) -> Estimate:
    """Return the ratio of two models' means on the same rows."""
    return bootstrapped(lambda x: _divided(x[0].mean(-1), x[1].mean(-1)), [np.stack([one, other])])


def auc_of(known: Values, unseen: Values, *, level: float = LEVEL) -> Estimate:
    """Return how well scores, lower for members, tell two sets of rows apart; 1/2: not at all."""
    from scipy import optimize, stats

    sets = [np.nan_to_num(np.asarray(x, np.float64), nan=np.inf) for x in (known, unseen)]
    area = metrics.membership_auc(*sets)
    n, m = len(known), len(unseen)
    z = float(stats.norm.ppf((1 + level) / 2))

    def error(theta: float) -> float:
        size = (n + m) / 2 - 1
        inner = 1 + size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return math.sqrt(theta * (1 - theta) * inner / (n * m))

    def end(sign: int, limit: float) -> float:
        def beyond(theta: float) -> float:
            return sign * (theta - area) - z * error(theta)

        if area == limit:
            return limit
        # At an area of 0 or 1 itself the error is 0, which is no end.
        found: Any = optimize.brentq(beyond, min(max(area, 1e-9), 1 - 1e-9), limit)
        return float(found)

    return Estimate(area, end(-1, 0.0), end(1, 1.0), min(n, m))


def auc_difference(
    known: Values, unseen: Values, other: tuple[Values, Values], *, level: float = LEVEL
) -> Estimate:
    """Return by how much one model's scores tell the sets apart better than another's, by rows."""
    rows = [np.stack([known, other[0]]), np.stack([unseen, other[1]])]
    rows = [np.nan_to_num(x, nan=np.inf) for x in rows]
    return bootstrapped(lambda x, y: _areas(x[0], y[0]) - _areas(x[1], y[1]), rows, level=level)


def _areas(known: np.ndarray, unseen: np.ndarray) -> Numbers:
    """Return the areas of many draws of two sets, along the last axis."""
    from scipy.stats import rankdata

    n, m = known.shape[-1], unseen.shape[-1]
    both = np.concatenate([known, unseen], axis=-1)
    ranks = rankdata(both, axis=-1)[..., n:].sum(axis=-1)
    return (ranks - m * (m + 1) / 2) / (n * m)


def _divided(above: Numbers, below: Numbers) -> Numbers:
    """Divide; by nothing or less, infinity of the numerator's sign, which no interval forgives."""
    return above / np.maximum(below, 1e-12)

"""What a relearning attack brings back of an edit, with intervals, beside rows nobody ever knew."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.attacks import relearn
from jedit.core.batch import Apply, Batch
from jedit.requests.unseen import row_losses, take
from jedit.training.freezing import which_are_trained
from jedit.training.masters import with_masters
from jedit.training.rows import num_rows as rows_in

LESSONS = 6  # the attack teaches every so many of the forget rows
LESSON_STEPS = 20  # updates of the attack; both are those of TOFU's attack in `jedit tofu`


class Comeback(NamedTuple):
    """What a relearning attack brings back: rows are taught again, and the others are asked about.

    Every sixth row is taught, for 20 updates; probabilities are exp(-loss per output), means over
    the rows that were not taught, with 95% intervals of a bootstrap over these rows.

    Attributes:
        before: (mean, low, high) of the forget rows under the edited model.
        after: the same after the attack; NaN where that left the finite numbers.
        unseen: of the unseen rows under the edited model after the same attack with unseen rows for
            lessons: what teaching brings to rows that nothing is known of.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    unseen: tuple[float, float, float] | None


def attacked(
    apply: Apply,
    params: PyTree,
    forget: Batch,
    unseen: Batch | None,
    *,
    optimizer: optax.GradientTransformation,
    key: Array,
) -> Comeback:
    """Teach every sixth row again, and ask about the others; the same with unseen rows.

    All is taught in float32 or wider: in narrower weights small steps are lost, or make NaN.
    """
    apply, params = with_masters(apply, params, which_are_trained(params, None))

    def taught_again(rows: Batch) -> tuple[np.ndarray, np.ndarray]:
        number = rows_in(rows)
        taught = np.arange(0, number, LESSONS)
        others = take(rows, np.delete(np.arange(number), taught))

        def measure(params: PyTree) -> np.ndarray:
            return np.exp(-row_losses(apply, params, others))

        try:
            found = relearn(
                apply,
                params,
                take(rows, taught),
                optimizer=optimizer,
                looks=(LESSON_STEPS,),
                measure=measure,
                key=jax.random.clone(key),  # the same attack on both
            )
        except FloatingPointError:  # the rate was too large, which ends no edit
            before = measure(params)
            return before, np.full_like(before, np.nan)
        return found.values[0], found.values[1]

    before, after = taught_again(forget)
    control = None if unseen is None else interval(taught_again(unseen)[1])
    return Comeback(interval(before), interval(after), control)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean and 95% interval of a bootstrap over the rows."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0 or math.isnan(mean):
        return mean, mean, mean
    rng = np.random.default_rng(0)
    # SciPy 1.15 calls it `rng`, and takes the old name still.
    seeded: Any = {"random_state": rng}
    found = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", **seeded)
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)

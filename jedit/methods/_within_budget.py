"""The strongest edit whose true retain KL stays within a budget: by halving, and never above it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jedit.core.display import short_repr
from jedit.edits import Edit, dense
from jedit.geometry import RetainKl

EVALUATIONS = 12  # the first, and 11 halvings of the logarithms' range; arbitrary


class WithinBudget(NamedTuple):
    """What was found.

    Attributes:
        strength: of the edit; 0 where even the least edit costs more than the budget, and the edit
            that is given changes nothing.
        predicted_kl: (1,) its cost on the retain rows by the Gauss-Newton matrix, nats per output.
        true_kl: (1,) what it truly costs there.
        info: what the method says of the edit; None of none.
    """

    strength: float
    predicted_kl: np.ndarray
    true_kl: np.ndarray
    info: Any

    __repr__ = short_repr


NOTHING = WithinBudget(0.0, np.zeros(1), np.zeros(1), None)


def strongest_within(
    made: Callable[[float], tuple[Edit, Any]],
    price: RetainKl,
    *,
    budget: float,
    least: float,
    most: float,
) -> tuple[Edit, WithinBudget]:
    """Return the strongest edit that was seen to cost the budget at most.

    The largest strength is tried first; then the range is halved on a logarithmic scale. The cost
    is taken to rise with the strength: where it does not, the edit keeps to the budget all the
    same, since its own cost is measured, but a stronger one may too.

    Args:
        made: of a strength, an edit that changes more the larger it is.
        price: of a change, the true retain KL.
        budget: nats per counted output, positive.
        least: the least strength that is looked for, positive.
        most: the largest.

    Returns:
        The edit, and what was found. Costs as many edits and prices as there are evaluations.
    """
    edit, found, strength, seen = Edit({}), NOTHING, most, 0
    low, high = math.log(least), math.log(most)
    while seen < EVALUATIONS and low < high:
        tried, info = made(strength)
        move = {path: dense(block) for path, block in tried.blocks.items()}
        cost = price(move)
        if cost <= budget:  # NaN is not
            kls = np.array([price.predicted(move)]), np.array([cost])
            edit, found, low = tried, WithinBudget(strength, *kls, info), math.log(strength)
        else:
            high = math.log(strength)
        strength, seen = math.exp(0.5 * (low + high)), seen + 1
    return edit, found

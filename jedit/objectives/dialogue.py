"""What a method that draws answers is given: questions, and what asks and judges."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jedit.core.batch import Batch


class Played(NamedTuple):
    """Answers that a model gave, with their rewards.

    Attributes:
        rows: all answers, those to one question one after the other.
        rewards: (questions, answers to each).
    """

    rows: Batch
    rewards: Float[np.ndarray, "questions group"]


class Dialogue(NamedTuple):
    """What RULE is taught by, and asked.

    Both sets are encoded to one width.

    Attributes:
        refusals: questions to forget, with refusals for answers; the paper's code takes 12% of the
            forget set.
        boundary: questions near them that are to be answered, with their answers; there 8%.
        play: `(params, *, key) -> Played`: asks some questions, draws answers, judges them. The
            params have the dtypes of those that are edited.
        tuning_rate: Adam's learning rate of the first stage; 1e-5 is arbitrary.
        rate: Adam's learning rate of the second stage; 2e-6, the code's for models of 7B and more;
            a small model needs a hundred times as much.
    """

    refusals: Batch
    boundary: Batch
    play: Callable[..., Played]
    tuning_rate: float = 1e-5
    rate: float = 2e-6

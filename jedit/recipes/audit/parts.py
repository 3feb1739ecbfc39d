"""What the steps of an audit hand to one another: settings, encoded rows, one model's numbers."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jedit import metrics
from jedit.recipes.audit import forgotten, membership
from jedit.recipes.audit.comeback import Spending
from jedit.recipes.audit.rows import Rows

# What a part of an audit may end with, such as too little memory, without the others being lost.
FAILURES = (ArithmeticError, ImportError, MemoryError, RuntimeError, ValueError)


def described(error: Exception) -> str:
    """Return an error's kind and first line."""
    line = str(error).partition("\n")[0]
    return f"{type(error).__name__}{': ' * bool(line)}{line}"


class Settings(NamedTuple):
    """Settings of an audit.

    Attributes:
        max_len: number of tokens of a row, at most; longer ones are cut off. 256, as in `jedit
            run`.
        batch_size: number of rows evaluated at a time; 8, as there.
        most: number of rows of a set that are asked about, at most, spread over it; 400 is TOFU's.
        budget: KL that the rows to keep may pay, nats per token; 0.05 is arbitrary.
        attacks: whether the edited model is attacked.
        spending: what the attacker who trains may spend.
        group: field of the rows by which the cost is told apart.
        seed: seed of the drawn answers and of the attacks' order of rows.
    """

    max_len: int = 256
    batch_size: int = 8
    most: int = 400
    budget: float = 0.05
    attacks: bool = True
    spending: Spending = Spending()
    group: str | None = None
    seed: int = 0


class Asked(NamedTuple):
    """The encoded sets of rows; no unseen ones where there are none."""

    forget: Rows
    retain: Rows
    unseen: Rows | None


class OfModel(NamedTuple):
    """What is measured of one model by itself.

    Attributes:
        said: what it says, by set.
        seen: its membership scores; None without unseen rows.
        ratios: its truth ratios of the forget rows; None where there are no wrong answers.
        lens: probabilities by layer, by set.
        states: hidden states by layer, by set; for the probe.
        influence: how much of it holds the forget answers up, and how much down, or the reason why
            that is not known.
    """

    said: dict[str, forgotten.Said]
    seen: membership.Seen | None
    ratios: Float[np.ndarray, " n"] | None
    lens: dict[str, Float[np.ndarray, "layers n"]]
    states: dict[str, Float[np.ndarray, "layers n width"]]
    influence: metrics.Influence | str

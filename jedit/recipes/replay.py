"""What is kept of learnt tasks to be replayed: `Learner.keep` of methods that replay.

All keep as many rows in all, whatever the number of tasks, so that methods are compared at one size
of memory and each of them compiles once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.objectives import replayed_states
from jedit.objectives.hidden_states import Hidden
from jedit.recipes.learning_on import Kept


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Keeps a random sample of all tasks so far, shared equally among them.

    Attributes:
        size: rows in all; of t tasks each has size / t, the first ones one more where that leaves a
            rest.
    """

    size: int

    def __post_init__(self) -> None:
        check_numbers(COUNT, size=self.size)

    def __call__(
        self, apply: Apply, params: PyTree, rows: PyTree, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return what is kept after one more task; a smaller task's rows come again.

        Args:
            apply: not looked at.
            params: not looked at.
            rows: the task's rows, a batch or rows in several views.
            kept: what was kept before.
            key: which rows are drawn.
        """
        del apply, params
        parts = (*(() if kept is None else kept.rest), _drawn(rows, self.size, key))
        shares = [len(x) for x in np.array_split(np.arange(self.size), len(parts))]
        cut = [
            jax.tree.map(lambda x, n=n: x[:n], part) for part, n in zip(parts, shares, strict=True)
        ]
        return Kept(jax.tree.map(lambda *xs: jnp.concatenate(xs), *cut), rest=parts)


@dataclasses.dataclass(frozen=True)
class General:
    """Keeps rows of the first task alone, as GeRe keeps general texts and nothing of any task.

    Attributes:
        size: how many rows.
        hidden: whose bands are noted when the first task has been learnt; None: the rows alone are
            kept.
        spread: as `replayed_states` takes it.
    """

    size: int
    hidden: Hidden | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(COUNT, size=self.size)

    def __call__(
        self, apply: Apply, params: PyTree, rows: PyTree, kept: Kept | None, *, key: Array
    ) -> Kept:
        """Return what is kept after the first task, whichever this is.

        Args:
            apply: the model.
            params: where the model stands after the first task.
            rows: the task's rows.
            kept: what was kept before.
            key: which rows are drawn.
        """
        if kept is not None:
            return kept
        drawn = _drawn(rows, self.size, key)
        if self.hidden is None:
            return Kept(drawn)
        return Kept(replayed_states(self.hidden, apply, params, drawn, spread=self.spread))


def _drawn(rows: PyTree, size: int, key: Array) -> PyTree:
    number = len(jax.tree.leaves(rows)[0])
    chosen = jax.random.permutation(key, number)[np.arange(size) % number]
    return jax.tree.map(lambda x: jnp.asarray(x)[chosen], rows)

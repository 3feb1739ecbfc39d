"""Relearning: how fast does training bring back what was forgotten?

The edited model is trained for a stated budget on a few rows, and a metric of the *other* forget
rows is read off along the way.  Harmful: the rows are some of the forget rows.  Benign: they have
nothing to do with them (Lynch et al., arXiv 2402.16835; Hu et al., 2406.13356).

A model that never knew learns some of it too, from what the rows have in common.  So give the
retrained model the same rows, optimizer, key and budget: what the edited model gains beyond the
retrained one's was hidden and not gone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jedit.core.arguments import check_batch, check_function
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, check_numbers
from jedit.core.display import short_repr
from jedit.objectives.token_nll import counted_nll, masked_mean
from jedit.training.loop import fit
from jedit.training.rows import num_rows
from jedit.training.watch import History, LoopState, Watch


class Relearned(NamedTuple):
    """Measurements of a model while it is trained again on what it forgot.

    Attributes:
        steps: numbers of updates after which the model was measured, 0 first.
        values: results of `measure` after so many updates.
        params: the parameters after the last update.
    """

    steps: tuple[int, ...]
    values: tuple[Any, ...]
    params: PyTree

    __repr__ = short_repr


def relearn(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    optimizer: optax.GradientTransformation,
    looks: Sequence[int],
    measure: Callable[[PyTree], Any],
    key: Key[Array, ""],
    batch_size: int = 8,
) -> Relearned:
    """Train the edited model on `rows`, and measure along the way what comes back.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: the edited model's parameters; they are not changed.
        rows: the rows that the attacker trains on, by the mean loss of the outputs that count.
        optimizer: the attacker's optimizer.
        looks: numbers of updates after which to measure, rising.
        measure: a function from params to anything; the loss of the forget rows that are not in
            `rows`, say.
        key: key of the order of the rows.
        batch_size: number of rows in a step, 8 (arbitrary); a smaller set is taken whole.

    Returns:
        The measurements, one before the first update included.

    Raises:
        ValueError: `looks` does not rise from at least 1.
    """
    looks = tuple(looks)
    check_numbers(COUNT, batch_size=batch_size, looks=looks or None)
    check_function(apply)
    check_batch(rows, "rows")
    if not looks or any(a >= b for a, b in zip(looks, looks[1:], strict=False)):
        raise ValueError(f"looks must be rising numbers of steps from 1, got {looks}")
    values = [measure(params)]

    def look(state: LoopState, history: History) -> None:
        del history
        if state.step in looks:
            values.append(measure(state.params))

    rows = jax.tree.map(jnp.asarray, rows)
    count = num_rows(rows)
    end, _ = fit(
        _Loss(apply),
        optimizer,
        params,
        rows,
        epochs=looks[-1] * min(batch_size, count) / count,
        key=key,
        batch_size=batch_size,
        # The loop stops only at multiples of one number: their common divisor meets every look.
        watch=Watch(look, math.gcd(*looks)),
    )
    return Relearned((0, *looks), tuple(values), end)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The attacker's loss, equal for one model, so that another attack on it compiles nothing."""

    apply: Apply

    def __call__(self, params: PyTree, rows: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
        return masked_mean(*counted_nll(self.apply, params, rows)), {}

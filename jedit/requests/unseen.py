"""Scores of rows that a model knows and of rows that nobody trained on, and the test between them.

s_i    loss of row i less the mean loss of other answers to its question
u      the unseen rows' scores under the params before the edit, sorted
τ_i    quantile of u at the rank of row i among the forget rows
D⁺     max_x (share of s <= x - share of u <= x), with its one-sided p-value (Smirnov 1939)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jedit.core.batch import Apply, Batch
from jedit.core.devices import sharding_of
from jedit.core.outputs import by_example
from jedit.objectives.token_nll import counted_nll
from jedit.training.rows import num_rows as rows_in

CHUNK = 32  # rows of one forward pass; arbitrary


class Unseen(NamedTuple):
    """Rows that nobody trained on, with other answers to the questions of both sets.

    Attributes:
        rows: m unseen rows of the same kind as the forget rows; not packed.
        beside_forget: n·k rows: k other answers to each forget row's question, row by row, of which
            none was trained on; None: scores are losses alone.
        beside_unseen: m·k rows: the same for the unseen rows.
    """

    rows: Batch
    beside_forget: Batch | None = None
    beside_unseen: Batch | None = None


class Score:
    """Scores of the forget and of the unseen rows: losses, less those of other answers."""

    def __init__(self, apply: Apply, forget: Batch, unseen: Unseen | None):
        rows, beside, beside_unseen = (None, None, None) if unseen is None else unseen
        if (beside is None) != (beside_unseen is None):
            raise ValueError(
                "Unseen takes other answers to the forget rows' questions and to the unseen rows', "
                "beside_forget and beside_unseen, or none of both"
            )
        self._apply = apply
        self._forget, self._unseen = (forget, beside), (rows, beside_unseen)
        for name, pair in (("beside_forget", self._forget), ("beside_unseen", self._unseen)):
            if pair[1] is not None and rows_in(pair[1]) % rows_in(pair[0]):
                raise ValueError(
                    f"{name} must hold as many other answers for each of the {rows_in(pair[0])} "
                    f"rows; got {rows_in(pair[1])} rows in all"
                )

    def of(self, params: PyTree) -> np.ndarray:
        """Return the forget rows' scores."""
        return self._of(params, *self._forget)

    def level(self, params: PyTree) -> np.ndarray:
        """Return the unseen rows' scores, sorted; none where there are no such rows."""
        rows, beside = self._unseen
        return np.zeros(0) if rows is None else np.sort(self._of(params, rows, beside))

    def _of(self, params: PyTree, rows: Batch, beside: Batch | None) -> np.ndarray:
        losses = row_losses(self._apply, params, rows)
        if beside is None:
            return losses
        others = row_losses(self._apply, params, beside)
        return losses - others.reshape(len(losses), -1).mean(axis=1)


def targets(scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return for each row the quantile of the unseen scores at its rank among the rows."""
    rank = np.argsort(np.argsort(scores))
    return np.quantile(level, (rank + 0.5) / len(scores))


def p_value_of(scores: np.ndarray, level: np.ndarray) -> float:
    """Test whether the scores are smaller than unseen ones: small where they can be told apart."""
    from scipy import stats  # half a second of import, needed here alone

    found = stats.ks_2samp(scores, level, alternative="greater")
    return float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def check_power(num_rows: int, num_unseen: int, significance: float) -> None:
    """Refuse samples so small that the test could not tell them at any losses.

    Where all n rows are below all m unseen ones the p-value is 1 / C(n + m, n).

    Raises:
        ValueError: the smallest p-value is above the significance.
    """
    least = 1 / math.comb(num_rows + num_unseen, num_rows)
    if least > significance:
        raise ValueError(
            f"{num_rows} forget rows and {num_unseen} unseen ones are too few: no losses could be "
            f"told apart at {significance:g} (p is at least {least:.2g}). Give more unseen rows"
        )


def spread(length: int, number: int) -> np.ndarray:
    """Return at most so many places, at equal distances over a length."""
    return np.unique(np.linspace(0, length - 1, min(number, length)).round().astype(int))


def take(batch: PyTree, which: np.ndarray | slice) -> Any:
    """Return some rows of a batch or of several, split as they were where that can be."""

    def taken(x: Any) -> Array:
        x = jnp.asarray(x)
        rows, sharding = x[which], sharding_of(x)
        if sharding is None:
            return rows
        try:
            sharding.shard_shape(rows.shape)
        except ValueError:  # not so many rows to each device
            return rows
        return jax.device_put(rows, sharding)

    return jax.tree.map(taken, batch)


def chunks(batch: Batch) -> list[Batch]:
    """Return a batch in pieces of `CHUNK` rows; the last may have fewer."""
    return [take(batch, slice(i, i + CHUNK)) for i in range(0, rows_in(batch), CHUNK)]


def row_losses(apply: Apply, params: PyTree, batch: Batch) -> np.ndarray:
    """Return each row's loss per output that counts."""
    parts = [np.asarray(_losses(apply, params, chunk)) for chunk in chunks(batch)]
    return np.concatenate(parts).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _losses(apply: Apply, params: PyTree, batch: Batch) -> Float[Array, " rows"]:
    nll, counted = (by_example(batch, x) for x in counted_nll(apply, params, batch))
    number = jnp.maximum(jnp.sum(counted, axis=1), 1)
    return jnp.sum(nll, axis=1) / number.astype(nll.dtype)

"""GeRe, general samples replay by a threshold margin (Zhang et al., arXiv 2508.04676).

    low, high = μ - κ s, μ + κ s                          of each dimension of a hidden state
    margin(h) = relu(h - low)                             where h_ref <= low
                relu(h - high) + relu(low - h)            where low < h_ref < high
                relu(high - h)                            where h_ref >= high
    TM        = mean of the margins that are not zero     over positions of replayed texts
    loss      = (NLL_new + NLL_replayed) / 2 + w TM

    h, h_ref    hidden state now, and of the model before    `hidden`, `ReplayedStates.bands`
    μ, s        mean and deviation of h_ref over all positions of the replayed texts
    κ, w        `replayed_states(spread=)`, `weight`

A model that has not moved has no margin.  One whose states stay in their band (low, between, high)
has none either, wherever they lie in it: that is how it differs from `RetainStates`, which pulls
every state back to where it was.

Differences.  Bands, margin, its mean over the entries that are not zero, κ = 1, w = 100 and the
halves of both NLLs are those of the released code [code], which takes the last hidden state, behind
the final norm: what enters the head.  There all states of the replayed texts are saved once, as
float32; here only in which band each lies is, one byte.  Its deviation is the root of a difference
of two means, ours of centred squares.  Positions are those that are `valid`, whatever `mask` counts
in the NLL, as there.  Its other weight, TM brought to the size of the NLL anew at each step, is
left out.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, PyTree

from jedit.core.arguments import check_batch, check_function, check_kind
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, NOT_NEGATIVE, POSITIVE, check_numbers
from jedit.core.display import short_repr
from jedit.core.outputs import check_contents, counted_outputs
from jedit.core.precision import wide
from jedit.objectives.hidden_states import Hidden
from jedit.objectives.objective import Value
from jedit.objectives.token_nll import counted_nll, masked_mean


class ReplayedStates(NamedTuple):
    """Rows to be replayed, and in which band each of their hidden states lay; leads with the rows.

    Attributes:
        rows: the rows.
        bands: -1 where a state was `low` or less, 1 where it was `high` or more, 0 between.
        low: μ - κ s of each dimension, for each row.
        high: μ + κ s of each dimension, for each row.
    """

    rows: Batch
    bands: Int8[Array, "n *lead width"]
    low: Float[Array, "n width"]
    high: Float[Array, "n width"]

    __repr__ = short_repr


def replayed_states(
    hidden: Hidden,
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    spread: float = 1.0,
    chunk: int = 32,
) -> ReplayedStates:
    """Note where the hidden states of rows lie, before anything is learnt.

    Args:
        hidden: `(apply, params, inputs) -> states`, such as
            `jedit.tracing.Entering("head/kernel")`.
        apply: `apply(params, inputs) -> logits`.
        params: the parameters before.
        rows: the rows to be replayed; their padding enters no mean.
        spread: κ, how many deviations from the mean a band ends; 1, the code's.
        chunk: rows that are computed at once; 32 is arbitrary.

    Returns:
        The rows with their bands. It costs two forward passes of every row.

    Raises:
        TypeError: the rows are no batch.
        ValueError: there are no rows, or a number is out of its range.
    """
    check_numbers(POSITIVE, spread=spread)
    check_numbers(COUNT, chunk=chunk)
    check_function(hidden, "hidden", "(apply, params, inputs)")
    check_batch(rows, "rows")
    check_contents(rows, "rows")
    num_rows = len(jax.tree.leaves(rows)[0])
    parts = [
        jax.tree.map(lambda x, i=i: jnp.asarray(x)[i : i + chunk], rows)
        for i in range(0, num_rows, chunk)
    ]
    count, mean, square = _moments(hidden, apply, params, parts[0])
    for part in parts[1:]:
        # Of two sets of states, the mean and the centred squares of both together.
        n, m, s = _moments(hidden, apply, params, part)
        both = jnp.maximum(count + n, 1)  # of chunks that count nothing
        square = square + s + (m - mean) ** 2 * count * n / both
        mean, count = mean + (m - mean) * n / both, count + n
    deviation = spread * jnp.sqrt(square / jnp.maximum(count, 1))
    low, high = mean - deviation, mean + deviation
    bands = [_bands(hidden, apply, params, part, low, high) for part in parts]
    low, high = (jnp.broadcast_to(x[None], (num_rows, x.size)) for x in (low, high))
    return ReplayedStates(rows, jnp.concatenate(bands), low, high)


def threshold_margin(
    states: Float[Array, "n *lead width"],
    bands: Int8[Array, "n *lead width"],
    low: Float[Array, "n width"],
    high: Float[Array, "n width"],
) -> Float[Array, "n *lead width"]:
    """Return how far each state is out of the band that it was in, 0 within."""
    low, high = (_over_positions(x.astype(states.dtype), states.ndim) for x in (low, high))
    is_low = jax.nn.relu(states - low)
    is_high = jax.nn.relu(high - states)
    is_between = jax.nn.relu(states - high) + jax.nn.relu(low - states)
    return jnp.where(bands < 0, is_low, jnp.where(bands > 0, is_high, is_between))


@dataclasses.dataclass(frozen=True)
class RetainMargin:
    """TM, the mean margin of the replayed rows: what GeRe holds, a retain term by itself.

    Attributes:
        hidden: as `replayed_states` took it, hashable.
    """

    hidden: Hidden

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: PyTree,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the margin; retain are `ReplayedStates`, in which the reference is already.

        Raises:
            TypeError: retain is something else.
            ValueError: its bands are not those of these states.
        """
        check_kind(retain, ReplayedStates, "retain", "rows that `replayed_states` has looked at")
        states = wide(self.hidden(apply, params, retain.rows.inputs))
        if states.shape != retain.bands.shape:
            raise ValueError(
                f"the states have shape {states.shape} and the bands {retain.bands.shape}; take "
                "the same `hidden` for both"
            )
        margin = threshold_margin(states, *retain[1:])
        is_there = _positions(retain.rows, states)[..., None] & (margin > 0)
        loss = masked_mean(margin, is_there)
        return loss, {"margin": loss}


@dataclasses.dataclass(frozen=True)
class GeRe:
    """To learn rows while general texts are replayed: both NLLs, and the threshold margin.

    Attributes:
        hidden: as `replayed_states` took it, hashable.
        weight: w, of the margin; 100, the code's.
    """

    hidden: Hidden
    weight: float = 100.0

    def __post_init__(self) -> None:
        check_numbers(NOT_NEGATIVE, weight=self.weight)

    def __call__(
        self,
        apply: Apply,
        params: PyTree,
        forget: Batch,
        retain: PyTree = None,
        reference: PyTree | None = None,
    ) -> Value:
        """Return the loss; in the place of the forget rows stand those that are to be learnt."""
        check_batch(forget, "forget")
        margin, _ = RetainMargin(self.hidden)(apply, params, None, retain)
        new = masked_mean(*counted_nll(apply, params, forget))
        old = masked_mean(*counted_nll(apply, params, retain.rows))
        loss = (new + old) / 2 + self.weight * margin
        return loss, {"new_nll": new, "replayed_nll": old, "margin": margin}


def _over_positions(of_rows: Array, ndim: int) -> Array:
    return of_rows.reshape(len(of_rows), *(1,) * (ndim - 2), -1)


def _positions(rows: Batch, states: Array) -> Array:
    return counted_outputs(rows._replace(mask=None), states.shape[:-1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    hidden: Hidden, apply: Apply, params: PyTree, rows: Batch
) -> tuple[Array, Float[Array, " width"], Float[Array, " width"]]:
    states = wide(hidden(apply, params, rows.inputs))
    counted = _positions(rows, states)[..., None]
    axes = tuple(range(states.ndim - 1))
    count = jnp.sum(counted).astype(states.dtype)
    mean = jnp.sum(jnp.where(counted, states, 0), axis=axes) / jnp.maximum(count, 1)
    centred = states - mean.reshape(*(1,) * len(axes), -1)
    return count, mean, jnp.sum(jnp.where(counted, centred**2, 0), axis=axes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bands(
    hidden: Hidden, apply: Apply, params: PyTree, rows: Batch, low: Array, high: Array
) -> Int8[Array, "n *lead width"]:
    states = wide(hidden(apply, params, rows.inputs))
    low, high = (x.reshape(*(1,) * (states.ndim - 1), -1) for x in (low, high))
    return (states >= high).astype(jnp.int8) - (states <= low).astype(jnp.int8)

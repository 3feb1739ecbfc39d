"""The whole curve of the relearning attack: how much is back, by rows taught and by updates.

    v(M; f, s) = max_r measure(θ_s),   θ_s the parameters of M after s updates at the rate r
                                       on a share f of the rows

for the edited and the retrained model alike: at each point the attacker takes, of his learning
rates, the one that is best for him, on either model by itself.  What the edited curve has above the
retrained one was hidden and not gone.

One budget at one rate, `relearn`'s, can miss it: an edit that makes the first updates useless (a
flat or broken neighbourhood) looks deep at a small rate and is back at a larger one, and few rows
may do what many do.  That an attacker tunes his attack is Lucki et al.'s (arXiv 2409.18025), that a
few of the rows bring back the others Hu et al.'s (2406.13356).

The rows taught are the first of one random order, so a larger share contains the smaller ones.  The
rows behind the largest share are never taught; at every point they are what is measured.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from jedit.attacks.relearn import relearn
from jedit.core.arguments import check_batch
from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE, POSITIVE_SHARE, check_numbers
from jedit.core.display import short_repr
from jedit.training.rows import num_rows

# At a third, twice as many are left to be asked about.
SHARES = (0.0, 1 / 12, 1 / 6, 1 / 3)


class Attacker(NamedTuple):
    """What an attacker who relearns may spend, and choose among.

    Attributes:
        optimizer: function from a learning rate to an optimizer, such as `optax.adam`.
        rates: learning rates to choose among.
        looks: numbers of updates after which he measures, rising.
        shares: shares of the rows taught, one row at least; (0, 1/12, 1/6, 1/3), one row to a third
            (arbitrary). Those that come to the same number of rows are one.
        batch_size: number of rows in a step, 8 (arbitrary); a smaller set is taken whole.
    """

    optimizer: Callable[[float], optax.GradientTransformation]
    rates: Sequence[float]
    looks: Sequence[int]
    shares: Sequence[float] = SHARES
    batch_size: int = 8


class RelearningCurve(NamedTuple):
    """What an attacker gets back of what was forgotten, by the rows and the updates he spends.

    Attributes:
        taught: numbers of rows taught, rising.
        shares: the same, as shares of all rows.
        steps: numbers of updates, 0 first.
        edited: the best value of `measure` for the edited model.
        retrained: the same for the retrained model.
        edited_rates: the learning rates that were best for the edited model; NaN where none gave a
            number, and before the first update.
        retrained_rates: the same for the retrained model.
    """

    taught: Int[np.ndarray, " shares"]
    shares: Float[np.ndarray, " shares"]
    steps: Int[np.ndarray, " steps"]
    edited: Float[np.ndarray, "shares steps"]
    retrained: Float[np.ndarray, "shares steps"]
    edited_rates: Float[np.ndarray, "shares steps"]
    retrained_rates: Float[np.ndarray, "shares steps"]

    __repr__ = short_repr

    @property
    def excess(self) -> Float[np.ndarray, "shares steps"]:
        """Return what the edited model has above the retrained one; 0 or less: it was gone."""
        return self.edited - self.retrained


class TaughtByShare(NamedTuple):
    """All that an attacker who relearns measures on one model.

    Attributes:
        taught: numbers of rows taught, rising.
        asked: places, among the rows given, of those that are never taught, in the order measured.
        steps: numbers of updates, 0 first.
        values: what was measured, (shares, rates, steps, ...).
    """

    taught: Int[np.ndarray, " shares"]
    asked: Int[np.ndarray, " asked"]
    steps: Int[np.ndarray, " steps"]
    values: Shaped[np.ndarray, "shares rates steps *measured"]

    __repr__ = short_repr


def relearning_curve(
    apply: Apply,
    edited: PyTree,
    retrained: PyTree,
    rows: Batch,
    *,
    attacker: Attacker,
    measure: Callable[[PyTree, Batch], float],
    key: Key[Array, ""],
) -> RelearningCurve:
    """Attack two models by every share, budget and rate, and keep the best rate at each point.

        def known(params, rows):
            return float(np.mean(np.exp(-answer_nll_per_row(apply, params, rows))))

        attacker = Attacker(optax.adam, rates=(1e-4, 1e-3), looks=(1, 4, 16))
        curve = relearning_curve(
            apply, edited, retrained, forget, attacker=attacker, measure=known, key=key
        )

    Through low-rank adapters, which an attacker without the memory for all the weights trains, it
    is the same call on the adapted function, with an optimizer that leaves the rest as it is:

        adapted = jedit.models.with_lora(apply, edited, forget.inputs, rank=8, key=lora_key)
        attacker = Attacker(
            lambda rate: optax.multi_transform(
                {"lora": optax.adam(rate), "base": optax.set_to_zero()},
                {"lora": "lora", "base": "base"},
            ),
            rates=(1e-3, 1e-2),
            looks=(1, 4, 16),
        )
        other = adapted.params | {"base": retrained}
        relearning_curve(adapted.apply, adapted.params, other, forget, attacker=attacker, ...)

    Costs two trainings of `looks[-1]` updates and twice `len(looks)` measurements for each share
    and rate; the updates are compiled once for each rate and share.

    Args:
        apply: `apply(params, inputs) -> logits`.
        edited: parameters of the model that is to have forgotten the rows.
        retrained: parameters of a model that never learned them.
        rows: all forget rows.
        attacker: what he may spend, and choose among.
        measure: a function from params and the rows that are never taught to a number that is
            higher the more is known, such as a mean probability.
        key: key of the order in which rows are taught.

    Returns:
        The curve of either model.

    Raises:
        ValueError: no rates, or one that is not positive; a share that is not from 0 to 1; nothing
            is left to be asked about; or `relearn` refuses.
    """

    def one(params: PyTree) -> TaughtByShare:
        again = {"attacker": attacker, "key": jax.random.clone(key)}  # the same draws for both
        return taught_by_share(apply, params, rows, measure=measure, **again)

    found = one(edited)
    rates = np.asarray(tuple(attacker.rates), np.float64)
    ours, our_rates = _best(np.asarray(found.values, np.float64), rates)
    theirs, their_rates = _best(np.asarray(one(retrained).values, np.float64), rates)
    return RelearningCurve(
        taught=found.taught,
        shares=found.taught / num_rows(rows),
        steps=found.steps,
        edited=ours,
        retrained=theirs,
        edited_rates=our_rates,
        retrained_rates=their_rates,
    )


def taught_by_share(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    attacker: Attacker,
    measure: Callable[[PyTree, Batch], Any],
    key: Key[Array, ""],
) -> TaughtByShare:
    """Attack one model by every share, budget and rate, and keep all that is measured.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: parameters of the model that is attacked.
        rows: all rows of which some are taught.
        attacker: what he may spend, and choose among.
        measure: a function from params and the rows that are never taught to a number, or to an
            array of one shape, such as a probability for each of them.
        key: key of the order in which rows are taught.

    Returns:
        What was measured, by share, rate and number of updates; NaN where training diverged.

    Raises:
        ValueError: what `relearning_curve` refuses.
    """
    check_batch(rows, "rows")
    rates, shares = tuple(attacker.rates), tuple(attacker.shares)
    if not rates or not shares:
        raise ValueError(f"an attacker needs rates and shares, got {rates} and {shares}")
    check_numbers(POSITIVE, rates=rates)
    check_numbers(POSITIVE_SHARE, shares=tuple(share for share in shares if share != 0))
    number = num_rows(rows)
    taught = sorted({max(1, round(share * number)) for share in shares})
    if taught[-1] >= number:
        raise ValueError(
            f"shares {shares} of {number} rows leave none to be asked about; teach fewer"
        )
    order_key, teach_key = jax.random.split(key)
    order = jax.random.permutation(order_key, number)
    taken = jax.tree.map(lambda x: jnp.asarray(x)[order], rows)
    first = lambda count: jax.tree.map(lambda x: x[:count], taken)  # noqa: E731
    asked = jax.tree.map(lambda x: x[taught[-1] :], taken)
    # One object a rate: what is compiled for an optimizer is found again by it.
    optimizers = [attacker.optimizer(rate) for rate in rates]
    values = [
        [
            relearned_values(
                apply,
                params,
                first(count),
                optimizer=optimizer,
                looks=attacker.looks,
                measure=lambda params: measure(params, asked),
                key=jax.random.clone(teach_key),  # the same draws for all, on purpose
                batch_size=attacker.batch_size,
            )
            for optimizer in optimizers
        ]
        for count in taught
    ]
    return TaughtByShare(
        taught=np.asarray(taught),
        asked=np.asarray(order)[taught[-1] :],
        steps=np.asarray((0, *attacker.looks)),
        values=np.asarray(values),
    )


def relearned_values(
    apply: Apply,
    params: PyTree,
    rows: Batch,
    *,
    looks: Sequence[int],
    measure: Callable[[PyTree], Any],
    **given: Any,
) -> Shaped[np.ndarray, "steps *measured"]:
    """Return what `relearn` measures, and NaN for the looks that training did not live to see.

    Takes the arguments of `relearn`; `measure` returns a number, or an array of one shape.

    Raises:
        ValueError: what `relearn` refuses.
    """
    values: list[np.ndarray] = []

    def keep(params: PyTree) -> None:
        values.append(np.asarray(measure(params)))

    # A rate that breaks the model is a failed attack, and no reason to lose the others.
    with contextlib.suppress(FloatingPointError):
        relearn(apply, params, rows, looks=looks, measure=keep, **given)
    lost = 1 + len(looks) - len(values)
    return np.asarray([*values, *[np.full(values[0].shape, np.nan)] * lost])


def _best(
    values: Float[np.ndarray, "shares rates steps"], rates: Float[np.ndarray, " rates"]
) -> tuple[Float[np.ndarray, "shares steps"], Float[np.ndarray, "shares steps"]]:
    """Return the largest values over the rates, and the rates; what diverged is no one's choice."""
    known = np.where(np.isnan(values), -np.inf, values)
    best = np.argmax(known, axis=1)
    value = np.take_along_axis(values, best[:, None], axis=1)[:, 0]
    chosen = np.where(np.isnan(value), np.nan, rates[best])
    chosen[:, 0] = np.nan
    return value, chosen

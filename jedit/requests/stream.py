"""A stream of requests: each is filtered, edited as little as will do, and protected no more.

    loss of a row already at `enough`     nothing left to forget: no edit       (filter)
    d = (F + λ)⁻¹ g,  Δ = α d             α the least with which the row's loss is `enough`, and
                                          ½ Δᵀ F Δ ≤ `predicted_kl`; again from there, `tries` times
    Δ = -η (F + λ)⁻¹ g_kept               rows that stay, drawn at random, are learnt again; η the
                                          best for them with ½ Δᵀ F Δ ≤ `predicted_kl`
    S ← S - S_row                         the sums behind F lose what the row had added to them
    F from S                              decomposed anew every `every` requests
    F estimated anew                      if its age, measured on a few rows, is then `max_age`

The setting, and the filter by what is left to be forgotten, are FIT's (arXiv 2601.21682), which
looks for duplicates by the similarity of embeddings and then by the loss.  Differences [derived]:
the loss alone decides here, which finds repeated, reworded and otherwise known requests alike; a
request gets the smallest edit that does, where a fixed one for each adds up; and what is protected
follows the stream: a sum over rows can lose a row again, given the labels it was sampled with,
which depend on the row's number alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.arguments import check_batch, check_function, check_key, check_kind
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, COUNT_OR_ZERO, NOT_NEGATIVE, POSITIVE, check_numbers, culprit
from jedit.core.devices import on_auto_axes, sharding_of
from jedit.core.display import short_repr
from jedit.core.outputs import by_example, check_contents
from jedit.core.precision import wide
from jedit.curvature import Curvature, Estimator, Inverted, inverted, quadratic_form
from jedit.curvature.checks import check_has_matrices
from jedit.curvature.estimator import add_batch
from jedit.curvature.inverted import check_invertible
from jedit.curvature.kfac import KfacState
from jedit.edits import Edit, dense
from jedit.geometry.parts import Part, moved, part_of, with_part
from jedit.objectives.token_nll import counted_nll, masked_mean
from jedit.requests.batch import Solver, batch_unlearn

# Of the largest α: from a 32nd of it to the whole, by cube roots of two; and none.
RUNGS = (0.0, *(2 ** (-k / 3) for k in reversed(range(16))))


class ContinualState(NamedTuple):
    """The state between two requests: the model, the rows that are gone, and the statistics.

    Attributes:
        params: the model's parameters after the requests so far.
        gone: (n,) booleans: the rows that were asked to be forgotten.
        anchor: the params at which the sums were taken.
        sums: K-FAC's sums at the anchor, over the rows that are not gone.
        curvature: the curvature made of the sums as they were at the last refresh.
        inverse: its damped inverse, of which every request's step back makes use; None: no request
            is answered with one.
        since: number of requests since the last refresh.
    """

    params: PyTree
    gone: np.ndarray
    anchor: PyTree
    sums: KfacState
    curvature: Curvature
    inverse: Inverted | None
    since: int

    __repr__ = short_repr


class RequestInfo(NamedTuple):
    """Measurements of one request's answer: losses, price, tries, and what became of the curvature.

    Attributes:
        num_new: rows that had not been asked for before.
        num_edited: number of new rows of which something was left to forget.
        loss_before: mean loss of the edited rows before the edits, nats per token; NaN: none was
            edited.
        loss_after: mean loss of the edited rows after the edits, nats per token; NaN: none was
            edited.
        predicted_kl: sum over the tries of ½ ΔᵀFΔ, nats per counted output.
        tries: number of edits that were made.
        kept_loss: mean loss of the rows that were learnt again, before that step; NaN: there was no
            edit, or no row left.
        age: how far the statistics have moved since they were taken; NaN: not looked at.
        refresh: what was done to the curvature, "decomposed" or "estimated"; None: it stayed as it
            was.
    """

    num_new: int
    num_edited: int
    loss_before: float
    loss_after: float
    predicted_kl: float
    tries: int
    kept_loss: float
    age: float
    refresh: Literal["decomposed", "estimated"] | None


@dataclasses.dataclass(frozen=True)
class Answering:
    """Settings of how one request is answered: in how many tries, how thin, with what step back.

    Attributes:
        tries: number of edits for one request, at most; 3 is arbitrary.
        damping: λ over each block's mean eigenvalue; 0.1 is arbitrary.
        rank: rank of each matrix's change, at most; None: as many as a request has positions.
        relearn: number of kept rows drawn for a step back after each request that was edited; 0:
            none. 32 is arbitrary.
        request_size: number of rows of one request, at most; 1 is one row.
    """

    tries: int = 3
    damping: float = 0.1
    rank: int | None = None
    relearn: int = 32
    request_size: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, tries=self.tries, rank=self.rank, request_size=self.request_size)
        check_numbers(NOT_NEGATIVE, damping=self.damping)
        check_numbers(COUNT_OR_ZERO, relearn=self.relearn)


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Settings of when and how the curvature follows the stream.

    Attributes:
        every: number of requests between two looks at the curvature; 10 is arbitrary.
        max_age: the `age` from which on the curvature is estimated anew at the params as they are,
            one pass over all rows that are left. 0.5 is arbitrary: in our one measurement the
            statistics were older at every look, and it made little difference.
        probe: number of rows that its age is measured on, 32 (arbitrary).
        chunk: number of rows in one pass of the estimation, 32 (arbitrary).
    """

    every: int = 10
    max_age: float = 0.5
    probe: int = 32
    chunk: int = 32

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, every=self.every, probe=self.probe, chunk=self.chunk)
        check_numbers(POSITIVE, max_age=self.max_age)


class Continual(NamedTuple):
    """Two functions that answer requests to forget, one after the other.

    Attributes:
        init: a function `params -> state`, called once before the first request.
        forget: a function `(state, row numbers) -> (state, info)`; the state given is left as it
            is.
    """

    init: Callable[[PyTree], ContinualState]
    forget: Callable[
        [ContinualState, Sequence[int] | np.ndarray], tuple[ContinualState, RequestInfo]
    ]


def continual(
    apply: Apply,
    estimator: Estimator,
    data: Batch,
    *,
    enough: float,
    predicted_kl: float,
    key: Array,
    answering: Answering = Answering(),  # noqa: B008 - frozen and hashable
    refresh: Refresh = Refresh(),  # noqa: B008 - frozen and hashable
) -> Continual:
    """Make the two functions that unlearn on demand, request by request.

    Args:
        apply: `apply(params, inputs) -> logits`.
        estimator: an estimator that `kfac` made, of a curvature that `batch_unlearn` takes; only
            what it covers is edited.
        data: the training rows, with targets; requests name them by number.
        enough: nats per token at which a row counts as forgotten, such as the loss of a row like it
            that the model has never seen.
        predicted_kl: retain KL that one edit may cost by the quadratic model, nats per counted
            output.
        key: key of the curvature's sampled labels.
        answering: how one request is answered.
        refresh: when and how the curvature follows the edits.

    Returns:
        Two functions. A request costs a gradient and 17 forward passes of its rows for each
        try, and one pass of the estimator over its rows.

    Raises:
        TypeError: an argument of another type.
        ValueError: the data have no targets, or an argument that must be positive is not.
    """
    check_numbers(POSITIVE, enough=enough, predicted_kl=predicted_kl)
    check_kind(answering, Answering, "answering", "such as Answering(tries=3)")
    check_kind(refresh, Refresh, "refresh", "such as Refresh(every=10)")
    check_function(apply)
    check_kind(estimator, Estimator, "estimator", "such as kfac(apply, likelihood)")
    check_batch(data, "data")
    check_key(key)
    check_contents(data, "data", limits=(0, math.inf))
    if data.targets is None:
        raise ValueError("the data need targets: a request is to raise their loss")
    ones = np.ones(np.shape(data.targets), np.float32)
    mask, valid = (ones if x is None else x for x in (data.mask, data.valid))
    whole = jax.tree.map(np.asarray, data._replace(mask=mask, valid=valid))
    sums = _Sums(estimator, whole, key)
    stream = _Stream(apply, answering, refresh, sums, enough, predicted_kl)
    return Continual(
        on_auto_axes(functools.partial(_fresh, stream.sums, refresh.chunk, answering)),
        on_auto_axes(stream.forget),
    )


def age(then: KfacState, now: KfacState) -> float:
    """Return how far K-FAC's sums over the same rows have moved, relative to what they were.

    The Frobenius norm of the difference over that of the first, of all moments of what enters the
    sites, or of all those of the gradients at their outputs, whichever has moved further.
    """

    def relative(one: dict, other: dict) -> float:
        pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
        change = sum(float(jnp.sum((x - y).astype(float) ** 2)) for x, y in pairs)
        whole = sum(float(jnp.sum(x.astype(float) ** 2)) for x, _ in pairs)
        return float(np.sqrt(change / whole)) if whole > 0 else 0.0

    inputs = ({name: x.moment for name, x in state.inputs.items()} for state in (then, now))
    return max(relative(*inputs), relative(then.outputs, now.outputs))


class _Sums(NamedTuple):
    """Takes K-FAC's sums over chosen rows of the data."""

    estimator: Estimator
    data: Batch
    key: Array

    @property
    def num_rows(self) -> int:
        return len(jax.tree.leaves(self.data)[0])

    def is_counted(self, numbers: np.ndarray) -> np.ndarray:
        """Say of each of these rows whether it counts an output."""
        mask, valid = (np.asarray(x)[numbers] for x in (self.data.mask, self.data.valid))
        counted = (mask != 0) & (valid != 0)
        return counted.any(axis=tuple(range(1, counted.ndim)))

    def rows(self, numbers: np.ndarray, size: int, counts: np.ndarray | bool = True) -> Batch:
        """Return rows that count where `counts` says, filled up with some that do not."""
        # Always `size` rows, so that a request of any length meets a program that is compiled
        # already.
        filled, kept = np.zeros(size, int), np.zeros(size, np.float32)
        filled[: len(numbers)], kept[: len(numbers)] = numbers, counts
        batch = jax.tree.map(lambda x: x[filled], self.data)
        keep = kept.reshape(-1, *(1,) * (batch.mask.ndim - 1))
        batch = batch._replace(mask=batch.mask * keep, valid=batch.valid * keep)
        return jax.tree.map(jnp.asarray, batch)

    def over(
        self, params: PyTree, numbers: np.ndarray, size: int, counts: np.ndarray | None = None
    ) -> KfacState:
        """Sum over rows of consecutive numbers, `size` at a time, each with its own labels."""
        update = self.estimator.update
        if not isinstance(update, jax.tree_util.Partial):
            # As a Partial it is a pytree with a static function, which `add_batch` can compile
            # with.
            update = jax.tree_util.Partial(update)
        state = None
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            batch = self.rows(part, size, True if counts is None else counts[part])
            if state is None:
                state = self.estimator.init(params, batch, int(numbers[0]))
            state = add_batch(update, state, params, batch, self.key)
        assert state is not None
        return state


def _refreshed(
    refresh: Refresh, sums: _Sums, state: ContinualState, answering: Answering
) -> tuple[ContinualState, float, Literal["decomposed", "estimated"] | None]:
    if state.since < refresh.every or state.gone.all():
        return state, np.nan, None
    left = np.flatnonzero(~state.gone)[: refresh.probe]
    # As if they were the first rows: the labels have to be the same ones twice, no more.
    whole = sums._replace(data=sums.rows(left, refresh.probe))
    first = np.arange(refresh.probe)
    found = age(*(whole.over(p, first, refresh.probe) for p in (state.anchor, state.params)))
    if found >= refresh.max_age:
        return _fresh(sums, refresh.chunk, answering, state.params, state.gone), found, "estimated"
    # Young enough: the sums, less what is gone, are decomposed once more, without a pass.
    curvature = sums.estimator.finalize(state.sums)
    inverse = inverted(curvature, damping=answering.damping) if answering.relearn else None
    return state._replace(curvature=curvature, inverse=inverse, since=0), found, "decomposed"


def _fresh(
    sums: _Sums, chunk: int, answering: Answering, params: PyTree, gone: np.ndarray | None = None
) -> ContinualState:
    size = min(chunk, sums.num_rows)
    if gone is None:
        gone = np.zeros(sums.num_rows, bool)
        # Before the pass: of leading eigenvectors, or without damping, none could be answered.
        if sums.estimator.planned is not None:
            first = sums.rows(np.arange(size), size)
            planned = sums.estimator.planned(params, first)[1]
            check_has_matrices(planned)
            check_invertible(planned, answering.damping)
    taken = sums.over(params, np.arange(sums.num_rows), size, ~gone)
    curvature = sums.estimator.finalize(taken)
    # As large as the curvature: made for steps back alone.
    inverse = inverted(curvature, damping=answering.damping) if answering.relearn else None
    return ContinualState(params, gone, params, taken, curvature, inverse, 0)


class _Stream(NamedTuple):
    apply: Apply
    answering: Answering
    refresh: Refresh
    sums: _Sums
    enough: float
    predicted_kl: float

    def forget(
        self, state: ContinualState, numbers: Sequence[int] | np.ndarray
    ) -> tuple[ContinualState, RequestInfo]:
        size = self.answering.request_size
        asked, num_rows = np.unique(np.asarray(numbers)), self.sums.num_rows
        if not 0 < len(asked) <= size or asked[0] < 0 or asked[-1] >= num_rows:
            raise ValueError(
                f"a request is of 1 to {size} rows (request_size) numbered below "
                f"{num_rows}; got {asked.tolist()}"
            )
        new = asked[~state.gone[asked]]
        losses = _row_losses(self.apply, state.params, self.sums.rows(new, size))
        losses = np.asarray(losses)[: len(new)]
        if not np.isfinite(losses).all():
            wrong = new[~np.isfinite(losses)][:8].tolist()
            raise FloatingPointError(
                f"the losses of rows {wrong} are not finite, so it cannot be told what is left to "
                f"be forgotten: {culprit(state.params, {'data': self.sums.data})}"
            )
        # A row that counts nothing has nothing to be forgotten.
        left = (losses < self.enough) & self.sums.is_counted(new)
        params, before, after, price, tried = state.params, np.nan, np.nan, 0.0, 0
        if left.any():
            request = self.sums.rows(new[left], size)
            before = after = float(np.mean(losses[left]))
            while after < self.enough and tried < self.answering.tries:
                params, after, spent = self.edit(params, state.curvature, request)
                price, tried = price + spent, tried + 1
        gone, sums = state.gone.copy(), state.sums
        gone[new] = True
        kept_loss, kept = np.nan, np.flatnonzero(~gone)
        if tried and state.inverse is not None and len(kept):
            # Other rows for each request, the same ones for the same history.
            drawn = np.random.default_rng(int(gone.sum())).permutation(kept)
            num_rows = self.answering.relearn
            batch = self.sums.rows(drawn[:num_rows], num_rows)
            params, loss = self.restore(params, state.curvature, state.inverse, batch)
            kept_loss = float(loss)
        # One by one and at the anchor: only there, with the label of its own number, does a row add
        # what it had added when the sums were taken, so that subtracting leaves nothing of it.
        for number in new:
            sums = _without(sums, self.sums.over(state.anchor, np.array([number]), 1))
        state = state._replace(params=params, gone=gone, sums=sums, since=state.since + 1)
        state, found, done = _refreshed(self.refresh, self.sums, state, self.answering)
        info = RequestInfo(
            num_new=len(new),
            num_edited=int(left.sum()),
            loss_before=before,
            loss_after=after,
            predicted_kl=price,
            tries=tried,
            kept_loss=kept_loss,
            age=found,
            refresh=done,
        )
        return state, info

    def edit(
        self, params: PyTree, curvature: Curvature, request: Batch
    ) -> tuple[PyTree, float, float]:
        """Make one edit; return the new params, the request's loss there, and the predicted KL."""
        one = jax.tree.map(lambda x: x[None], request)
        stack, info = batch_unlearn(
            self.apply,
            params,
            curvature,
            one,
            damping=self.answering.damping,
            solver=Solver(rank=self.answering.rank),
        )
        edit, unit = jax.tree.map(lambda x: x[0], stack), info.predicted_kl[0]
        largest = jnp.sqrt(self.predicted_kl / jnp.maximum(unit, jnp.finfo(unit.dtype).tiny))
        where = (self.apply, params, edit, request, largest, jnp.asarray(self.enough))
        part, alpha, loss = _raise_loss(*where)
        return _replaced(params, part), float(loss), float(alpha**2 * unit)

    def restore(
        self, params: PyTree, curvature: Curvature, inverse: Inverted, batch: Batch
    ) -> tuple[PyTree, Array]:
        """Step down the rows' loss in the metric; return the new params and the loss before."""
        metric = (curvature, inverse)
        part, before = _lower_loss(self.apply, params, *metric, batch, self.predicted_kl)
        return _replaced(params, part), before


def _replaced(params: PyTree, part: Part) -> PyTree:
    """Return the params with the part in place, each array where the one it replaces lay."""
    places = {path: sharding_of(old) for path, old in part_of(params, part).items()}
    return with_part(params, {n: jax.device_put(x, places[n]) for n, x in part.items()})


@functools.partial(jax.jit, static_argnums=0)
def _lower_loss(
    apply: Apply,
    params: PyTree,
    curvature: Curvature,
    inverse: Inverted,
    batch: Batch,
    predicted_kl: float | Array,
) -> tuple[Part, Array]:
    """Return the covered parameters after one step down the loss, and the loss before it."""
    start = part_of(params, curvature.covered)

    def loss(part: Part) -> Array:
        return masked_mean(*counted_nll(apply, with_part(params, part), batch))

    before, gradient = jax.value_and_grad(loss)(start)
    down = jax.tree.map(lambda g: -wide(g), gradient)
    step = inverse(down)
    quadratic = quadratic_form(curvature, step)
    largest = jnp.sqrt(2 * predicted_kl / jnp.maximum(quadratic, jnp.finfo(quadratic.dtype).tiny))
    alphas = largest * jnp.asarray(RUNGS[3::3], largest.dtype)
    # One after the other: all rungs at once would hold as many copies of the parameters.
    losses = jax.lax.map(lambda alpha: loss(moved(start, step, alpha)), alphas)
    alpha = jnp.where(jnp.min(losses) < before, alphas[jnp.argmin(losses)], 0)
    return moved(start, step, alpha), before


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(apply: Apply, params: PyTree, batch: Batch) -> Array:
    values, counted = (by_example(batch, x) for x in counted_nll(apply, params, batch))
    return jax.vmap(masked_mean)(values, counted)


@functools.partial(jax.jit, static_argnums=0)
def _raise_loss(
    apply: Apply, params: PyTree, edit: Edit, batch: Batch, largest: Array, enough: Array
) -> tuple[Part, Array, Array]:
    """Go along the edit until the rows' mean loss is enough, or else to where it is highest.

    Returns the parameters that the edit names, as they are there.
    """
    _, counted = counted_nll(apply, params, batch)
    # Thin blocks are multiplied out once, and not at every rung.
    whole = {path: wide(dense(block)) for path, block in edit.blocks.items()}
    start = part_of(params, whole)

    def loss(alpha: Array) -> Array:
        found = _row_losses(apply, with_part(params, moved(start, whole, alpha)), batch)
        return masked_mean(found, jnp.any(by_example(batch, counted), axis=1))

    alphas = largest * jnp.asarray(RUNGS, largest.dtype)  # rising from zero
    losses = jax.lax.map(loss, alphas)
    reached = losses >= enough
    # argmax of booleans is the first that holds: the least α that is enough.
    rung = jnp.where(jnp.any(reached), jnp.argmax(reached), jnp.argmax(losses))
    return moved(start, whole, alphas[rung]), alphas[rung], losses[rung]


@jax.jit
def _without(state: KfacState, part: KfacState) -> KfacState:
    """Subtract from the sums what some rows had added to them."""
    left = jax.tree.map(jnp.subtract, state, part)
    return dataclasses.replace(left, next_example=state.next_example)

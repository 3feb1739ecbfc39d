"""Forget one set of rows, from the sets to the edit: natural steps that stop by themselves (ours).

    F         curvature of the retain outputs at θ₀                             estimated, or given
    Δ         natural steps of an objective, NPO with its retain term           `methods.natural`
    s_i       loss of row i less the mean loss of other answers to its question the row's score
    u         scores of unseen rows under θ₀, sorted                            `unseen`
    τ_i       quantile of u at the rank of row i among the forget rows          the row's target
    done_i    s_i >= τ_i: the row is drawn no more
    stop      D⁺ = max_x (share of s <= x - share of u <= x) passes the one-sided test of two
              samples (Smirnov 1939) at `significance`
    budget    KL(θ₀ ‖ θ) on retain rows that no step sees; a piece of the path that passes it is
              shortened until it does not, and is the last

A model retrained without the rows treats them as any model treats what it never saw.  Nobody who
needs an edit has that model; but rows that nobody trained on show what such scores are.  The forget
rows are raised until they cannot be told from them, each to its own quantile.

Losses alone mislead: some rows are harder than others to a model that knows neither, and the
*retrained* model fails a test of losses (on TOFU its forget rows have 7.0 nats, holdout rows 7.5;
p = 3e-8).  Other answers that nobody learned, to the same question, are as hard as the row's own to
such a model.  The difference, a log truth ratio, is alike for both (p = 0.4) and is the score where
other answers are given.  Rewording the forget rows with other names does not make unseen rows: what
else a question says brings the answer back.

What comes of it, and where it fails: `tests/bench/claims/natural.md`.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jedit.attacks import relearn
from jedit.core.arguments import check_batch, check_function, check_key, check_kind, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import COUNT, POSITIVE, Range, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.outputs import by_example
from jedit.curvature import Curvature, choose_temperature, estimate, kfac
from jedit.curvature.checks import check_covers
from jedit.curvature.likelihoods import Categorical, Likelihood
from jedit.edits import Edit, edit_between
from jedit.geometry import RetainKl, largest_step_within
from jedit.geometry.parts import ahead, moved
from jedit.methods.curvature.natural import falling, natural
from jedit.objectives import NPO, Objective, with_retain
from jedit.objectives.token_nll import counted_nll
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from jedit.training.rows import num_rows as rows_in
from jedit.training.watch import History

HELD_OUT = 10  # every so many of the retain rows are held out of the steps; arbitrary
MOST_HELD_OUT = 64  # rows: a KL of 64 texts is a tenth of a forget step's price; arbitrary
LESSONS = 6  # the attack teaches every so many of the forget rows
LESSON_STEPS = 20  # updates of the attack; both are those of TOFU's attack in `jedit run tofu`
CHUNK = 32  # rows of one forward pass
PROBED = 4  # chunks of retain rows that tell the temperature

Stopped = Literal["unseen", "budget", "steps"]


@dataclasses.dataclass(frozen=True, eq=False)
class Forgetting:
    """Settings of `forget`; the defaults are those of our tables.

    Attributes:
        objective: what is lowered, best one that saturates; NPO at beta 0.04 with the retain loss.
        likelihood: what the outputs mean, for the metric and the price; None: `Categorical`, in the
            metric at the temperature of `choose_temperature`.
        curvature: of the retain outputs at the given params; None: K-FAC is estimated of the retain
            rows that are not held out.
        select: regular expression; a parameter in whose path it is not found is not edited. It is
            looked at where the curvature is estimated.
        damping: λ, in units of each block's mean eigenvalue.
        predicted_kl: predicted retain KL of the first step at most, nats per output; it falls to
            nothing at the last, as `methods.falling` says.
        batch_size: forget rows, and retain rows, of one step.
        steps: how many steps are made at most.
        every: number of steps between two looks at the rows and at the price.
        significance: the edit stops when the test's p-value is above it; 0.05, the usual one, is
            also what Forget Quality is held against.
        method: any other `TrainingMethod`, in place of natural steps on the objective; the same
            rows stop it.
        heldout: retain rows on which the price is measured; None: every tenth, 64 at most, which no
            step and no curvature sees.
        attack: the optimizer of a relearning attack on the result; None: it is not attacked.
    """

    objective: Objective = with_retain(NPO(beta=0.04))  # noqa: RUF009 - frozen and hashable
    likelihood: Likelihood | None = None
    curvature: Curvature | None = None
    select: str | None = None
    damping: float = 0.01
    predicted_kl: float = 1e-4
    batch_size: int = 16
    steps: int = 96
    every: int = 4
    significance: float = 0.05
    method: TrainingMethod | None = None
    heldout: Batch | None = None
    attack: optax.GradientTransformation | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, batch_size=self.batch_size, steps=self.steps, every=self.every)
        check_numbers(POSITIVE, predicted_kl=self.predicted_kl)
        check_numbers(Range(0, 1), significance=self.significance)


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


class Comeback(NamedTuple):
    """What a relearning attack brings back: rows are taught again, and the others are asked about.

    Every sixth row is taught, for 20 updates; probabilities are exp(-loss per output), means over
    the rows that were not taught, with 95% intervals of a bootstrap over these rows.

    Attributes:
        before: (mean, low, high) of the forget rows under the edited model.
        after: the same after the attack.
        unseen: of the unseen rows under the edited model after the same attack with unseen rows for
            lessons: what teaching brings to rows that nothing is known of.
    """

    before: tuple[float, float, float]
    after: tuple[float, float, float]
    unseen: tuple[float, float, float] | None


class ForgetInfo(NamedTuple):
    """What `forget` found: why it stopped, which rows are done, what it cost.

    Attributes:
        stopped: "unseen": the forget rows cannot be told from unseen ones; "budget": the price is
            spent; "steps": neither, after all the steps.
        steps: number of steps taken.
        is_done: (n,), the rows whose score has reached its target; without unseen rows, none.
        loss_before: (n,), losses of the forget rows under θ₀, nats per output.
        loss_after: (n,), the same under the edited model.
        score: (n,), scores of the forget rows under the edited model.
        unseen_score: (m,), scores of the unseen rows under θ₀, sorted; empty where none were given.
        p_value: (looks,), the test's p-value at each look; NaN without unseen rows.
        true_kl: (looks,), KL(θ₀ ‖ θ) on the held-out retain rows at each look, nats per output.
        predicted_kl: the second-order KL of the whole edit on the same rows.
        comeback: what an attack brings back; None where none was asked for.
    """

    stopped: Stopped
    steps: int
    is_done: Bool[np.ndarray, " n"]
    loss_before: Float[np.ndarray, " n"]
    loss_after: Float[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    unseen_score: Float[np.ndarray, " m"]
    p_value: Float[np.ndarray, " looks"]
    true_kl: Float[np.ndarray, " looks"]
    predicted_kl: float
    comeback: Comeback | None

    __repr__ = short_repr


@on_auto_axes
def forget(
    apply: Apply,
    params: PyTree,
    forget: Batch,
    retain: Batch,
    *,
    key: Array,
    unseen: Batch | Unseen | None = None,
    budget: float | None = None,
    how: Forgetting = Forgetting(),  # noqa: B008 - frozen
) -> tuple[Edit, ForgetInfo]:
    """Make a model forget rows until it treats them as rows it never saw, at a price that is kept.

        edit, info = jedit.forget(apply, params, forget, retain, unseen=unseen, budget=0.1, key=key)
        print(info.stopped, info.is_done.mean(), info.predicted_kl, info.true_kl[-1])

    Not to be traced: the number of steps depends on what they do.

    Args:
        apply: `apply(params, inputs) -> outputs`.
        params: the trained parameters θ₀.
        forget: rows to forget, with targets; not packed.
        retain: rows to keep, with targets.
        key: of the curvature's labels and of the order of the rows.
        unseen: rows of the same kind that nobody trained on, best an `Unseen`, with other answers
            to their questions. None: nothing but the budget and the number of steps ends the edit.
        budget: true retain KL that the edit may cost on the held-out rows, nats per output; None:
            it may cost anything.
        how: the settings.

    Returns:
        The edit, of the parameters that the curvature covers, in float32 or wider; and what was
        found.  It costs one pass for the curvature, a forward and a backward pass for every row of
        a step, and at every look a forward pass of the forget and of the held-out rows.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of its range, rows that count no output, or a curvature of other
            parameters.
        FloatingPointError: a loss or a parameter is not finite, as `unlearn` says it.
    """
    check_kind(how, Forgetting, "how", "such as Forgetting(steps=48)")
    check_function(apply)
    check_params(params)
    check_key(key)
    check_numbers(POSITIVE, budget=budget)
    if isinstance(unseen, Batch):
        unseen = Unseen(unseen)
    if unseen is not None:
        check_kind(unseen, Unseen, "unseen", "such as Unseen(rows)")
    check_batch(forget, "forget")
    check_batch(retain, "retain")
    score = _Score(apply, forget, unseen)
    seen, heldout = (retain, how.heldout) if how.heldout is not None else _held_out(retain)
    curvature_key, order_key, attack_key = jax.random.split(key, 3)
    method = how.method
    if method is None:
        curvature = how.curvature
        if curvature is None:
            metric = how.likelihood
            if metric is None:
                metric = Categorical(choose_temperature(apply, params, _chunks(seen)[:PROBED]))
            estimator = kfac(apply, metric, select=how.select)
            curvature = estimate(estimator, params, _chunks(seen), key=curvature_key)
        check_covers(curvature, params)
        price_of_steps = falling(how.predicted_kl, how.steps)
        settings = {"damping": how.damping, "predicted_kl": price_of_steps}
        method = natural(how.objective, curvature, batch_size=how.batch_size, **settings)
    likelihood = Categorical() if how.likelihood is None else how.likelihood
    price = RetainKl(apply, params, _chunks(heldout), likelihood=likelihood)
    before = _losses(apply, params, forget)
    level = score.level(params)
    path = _Path(apply, params, method, forget, seen, order_key)
    looks, done, after = [], np.zeros(len(before), bool), score.of(params)
    stopped, change = "steps", {}
    while path.state.step < how.steps:
        number = min(how.every, how.steps - path.state.step)
        now = path.ahead(number, ~done)
        spent = price(now)
        is_over = budget is not None and spent > budget
        if is_over:
            assert budget is not None
            now, spent = _back(price, change, now, budget)
        change = now
        after = score.of(moved(params, change))
        p_value = math.nan
        if len(level):
            done = after >= _targets(after, level)
            p_value = _p_value(after, level)
        looks.append((p_value, spent))
        if is_over or p_value > how.significance:
            stopped = "budget" if is_over else "unseen"
            break
    edited = moved(params, change)
    comeback = None
    if how.attack is not None:
        control = None if unseen is None else unseen.rows
        comeback = _comeback(apply, edited, forget, control, how.attack, attack_key)
    p_values, costs = np.asarray(looks).T
    info = ForgetInfo(
        stopped=stopped,
        steps=path.state.step,
        is_done=done,
        loss_before=before,
        loss_after=_losses(apply, edited, forget),
        score=after,
        unseen_score=level,
        p_value=p_values,
        true_kl=costs,
        predicted_kl=price.predicted(change),
        comeback=comeback,
    )
    return Edit(change), info


class _Path:
    """The loop, piece by piece: where it stands, and the rows that are still to be raised."""

    def __init__(self, apply, params, method, forget, retain, key):
        self._given = (method, apply)
        self._sets, self._key = (forget, retain), key
        self._start = params
        self.state = LoopState(0, params, None)

    def ahead(self, steps: int, is_left: np.ndarray) -> dict[str, Array]:
        """Take so many steps; return the change from the start, by path."""
        forget, retain = self._sets
        # As many rows as there were, those that are left several times over: one shape, and so one
        # program.
        left = np.flatnonzero(is_left)
        number = len(is_left)
        rows = np.resize(left, number) if len(left) else np.arange(number)
        forget = jax.tree.map(lambda x: jnp.asarray(x)[rows], forget)
        reached: list[LoopState] = []

        def keep(state: LoopState, history: History) -> None:
            del history
            reached.append(state)

        unlearn(
            *self._given,
            self.state,
            forget,
            retain,
            steps=self.state.step + steps,
            key=self._key,
            watch=Watch(keep),
        )
        self.state = reached[-1]
        return _difference(self._start, self.state.params)


class _Score:
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
        return np.zeros(0) if self._unseen[0] is None else np.sort(self._of(params, *self._unseen))

    def _of(self, params: PyTree, rows: Batch, beside: Batch | None) -> np.ndarray:
        losses = _losses(self._apply, params, rows)
        if beside is None:
            return losses
        others = _losses(self._apply, params, beside)
        return losses - others.reshape(len(losses), -1).mean(axis=1)


def _difference(before: PyTree, after: PyTree) -> dict[str, Array]:
    return {p: c for p, c in edit_between(before, after).blocks.items() if bool(jnp.any(c != 0))}


def _back(
    price: RetainKl, before: dict[str, Array], now: dict[str, Array], budget: float
) -> tuple[dict[str, Array], float]:
    """Shorten the last piece of the path to what the budget allows; return it and its price."""
    move = ahead(now, before, -1.0)

    def along(alpha: float) -> float:
        return price(move, alpha, start=before)

    # The root of the KL is nearly linear between the ends of a short piece.
    low, high = (math.sqrt(max(along(alpha), 0.0)) for alpha in (0.0, 1.0))
    guess = (0.9975 * math.sqrt(budget) - low) / (high - low)
    alpha = largest_step_within(along, max(guess, 0.0), budget, limit=1.0)
    return ahead(before, move, alpha), along(alpha)


def _held_out(retain: Batch) -> tuple[Batch, Batch]:
    """Split off every tenth row.

    Raises:
        ValueError: there are fewer than two rows.
    """
    number = rows_in(retain)
    away = np.arange(0, number, HELD_OUT)[:MOST_HELD_OUT]
    if number < 2:
        raise ValueError(
            "forget holds retain rows out to measure the price on, so at least 2 are needed; got "
            f"{number}. Give heldout= in how"
        )
    stays = np.delete(np.arange(number), away)
    return _rows(retain, stays), _rows(retain, away)


def _rows(batch: Batch, which: np.ndarray | slice) -> Batch:
    return jax.tree.map(lambda x: jnp.asarray(x)[which], batch)


def _chunks(batch: Batch) -> list[Batch]:
    return [_rows(batch, slice(i, i + CHUNK)) for i in range(0, rows_in(batch), CHUNK)]


def _losses(apply: Apply, params: PyTree, batch: Batch) -> np.ndarray:
    """Return each row's loss per output that counts."""
    parts = [np.asarray(_row_losses(apply, params, chunk)) for chunk in _chunks(batch)]
    return np.concatenate(parts).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _row_losses(apply: Apply, params: PyTree, batch: Batch) -> Float[Array, " rows"]:
    nll, counted = (by_example(batch, x) for x in counted_nll(apply, params, batch))
    number = jnp.maximum(jnp.sum(counted, axis=1), 1)
    return jnp.sum(nll, axis=1) / number.astype(nll.dtype)


def _targets(scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return for each row the quantile of the unseen scores at its rank among the rows."""
    rank = np.argsort(np.argsort(scores))
    return np.quantile(level, (rank + 0.5) / len(scores))


def _p_value(scores: np.ndarray, level: np.ndarray) -> float:
    """Test whether the scores are smaller than unseen ones: small where they can be told apart."""
    from scipy import stats  # half a second of import, needed here alone

    found = stats.ks_2samp(scores, level, alternative="greater")
    return float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def _comeback(apply, params, forget, unseen, optimizer, key) -> Comeback:
    """Teach every sixth row again, and ask about the others; the same with unseen rows."""

    def attacked(rows: Batch) -> tuple[np.ndarray, np.ndarray]:
        number = rows_in(rows)
        taught = np.arange(0, number, LESSONS)
        others = _rows(rows, np.delete(np.arange(number), taught))
        found = relearn(
            apply,
            params,
            _rows(rows, taught),
            optimizer=optimizer,
            looks=(LESSON_STEPS,),
            measure=lambda p: np.exp(-_losses(apply, p, others)),
            key=key,
        )
        return found.values[0], found.values[1]

    before, after = attacked(forget)
    control = None if unseen is None else _interval(attacked(unseen)[1])
    return Comeback(_interval(before), _interval(after), control)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean and 95% interval of a bootstrap over the rows."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    seeded = {"random_state": np.random.default_rng(0)}
    found = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", **seeded)
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)

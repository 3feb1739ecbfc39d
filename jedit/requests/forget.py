"""Forget one set of rows, from the sets to the edit: natural steps that stop by themselves (ours).

    F         curvature of the retain outputs at θ₀                             estimated, or given
    Δ         natural steps of an objective, NPO with its retain term           `methods.natural`
    s_i       loss of row i less the mean loss of other answers to its question the row's score
    u         scores of unseen rows under θ₀, sorted                            `unseen`
    τ_i       quantile of u at the rank of row i among the forget rows          the row's target
    done_i    s_i >= τ_i: the row is not drawn while that holds
    stop      D⁺ = max_x (share of s <= x - share of u <= x) passes the one-sided test of two
              samples (Smirnov 1939) at `significance`
    recovery  steps in Adam's direction, of the same predicted KL, on γ f + R where natural steps
              lowered f + R: what they cost comes back, and f, which has saturated, is held
    budget    KL(θ₀ ‖ θ) on retain rows that no step sees, at every look; a piece of the path that
              passes it is shortened until it does not, and is the last

A model retrained without the rows treats them as any model treats what it never saw.  Nobody who
needs an edit has that model; but rows that nobody trained on show what such scores are.  The forget
rows are raised until they cannot be told from them, each to its own quantile.

Losses alone mislead: some rows are harder than others to a model that knows neither, and the
*retrained* model fails a test of losses (on TOFU its forget rows have 7.0 nats, holdout rows 7.5;
p = 3e-8).  Other answers that nobody learned, to the same question, are as hard as the row's own to
such a model.  The difference, a log truth ratio, is alike for both (p = 0.4) and is the score where
other answers are given.  Rewording the forget rows with other names does not make unseen rows: what
else a question says brings the answer back.

The price goes up before it comes down: on TOFU in small to 0.4 or 0.6 after 8 to 12 steps, and down
to 0.06 when the rest has settled.  A budget that is kept all the way has to let it over that.  What
comes of it, and where it fails: `tests/bench/claims/natural.md`.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_batch, check_function, check_key, check_kind, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    check_numbers,
)
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.paths import exactly
from jedit.curvature import Curvature, choose_temperature, estimate, kfac
from jedit.curvature.checks import check_covers
from jedit.curvature.likelihoods import Categorical, Likelihood
from jedit.edits import Edit, edit_between
from jedit.geometry import RetainKl, largest_step_within
from jedit.geometry.parts import ahead, moved
from jedit.methods.curvature.natural import natural
from jedit.objectives import NPO, Objective, with_retain
from jedit.objectives.held import WithRetain
from jedit.requests.comeback import Comeback, attacked
from jedit.requests.unseen import (
    Score,
    Unseen,
    check_power,
    chunks,
    p_value_of,
    row_losses,
    spread,
    take,
    targets,
)
from jedit.training import LoopState, TrainingMethod, Watch, unlearn
from jedit.training.rows import num_rows as rows_in
from jedit.training.watch import History
from jedit.transforms import clip_by_curvature_norm, falling

HELD_OUT = 10  # one of so many retain rows is held out of the steps; arbitrary
MOST_HELD_OUT = 64  # rows; arbitrary
PROBED = 128  # retain rows that tell the temperature; arbitrary

Stopped = Literal["unseen", "budget", "steps"]


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Settings of Adam's steps after natural ones (ours).

    Natural steps end at a retain loss that their metric holds and does not lower; NPO has saturated
    there, so that the retain term, at full weight, has its way. Alone it would bring the rows back.

    Attributes:
        steps: number of steps, after those of `Forgetting.steps`; 48, on TOFU in small.
        predicted_kl: predicted retain KL of the first step, 1e-4, nats per output; it falls to
            nothing at the last, as `transforms.falling` says. Adam gives the direction alone.
        forget_weight: γ, of the objective on the forget rows beside its retain term; 0.2.
        batch_size: forget rows, and retain rows, of one step; 16.
    """

    steps: int = 48
    predicted_kl: float = 1e-4
    forget_weight: float = 0.2
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, steps=self.steps, batch_size=self.batch_size)
        check_numbers(POSITIVE, predicted_kl=self.predicted_kl)
        check_numbers(NOT_NEGATIVE, forget_weight=self.forget_weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Natural:
    """Settings of the natural steps that `forget` takes; the defaults are those of our tables.

    Attributes:
        objective: what is lowered, best one that saturates; NPO at beta 0.04 with the retain loss.
        curvature: of the retain outputs at the given params; None: K-FAC is estimated of the retain
            rows that are not held out. The optimizer's state holds two copies of it.
        select: regular expression; a parameter in whose path it is not found is not edited. It is
            looked at where the curvature is estimated.
        damping: λ, in units of each block's mean eigenvalue; 0.01 is `natural`'s.
        predicted_kl: predicted retain KL of the first step at most, nats per output, 1e-4 as there;
            it falls to nothing at the last, as `transforms.falling` says.
        batch_size: forget rows, and retain rows, of one step; 16, as there.
        recovery: settings of what follows them; None: nothing does.
    """

    objective: Objective = with_retain(NPO(beta=0.04))  # noqa: RUF009 - frozen and hashable
    curvature: Curvature | None = None
    select: str | None = None
    damping: float = 0.01
    predicted_kl: float = 1e-4
    batch_size: int = 16
    recovery: Recovery | None = Recovery()

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name, or a recovery without a retain term.
        """
        check_function(self.objective, "objective", "(apply, params, forget, retain, reference)")
        if self.recovery is not None and not isinstance(self.objective, WithRetain):
            raise ValueError(
                "recovery weighs an objective against its retain term, so the objective has to be "
                "made by with_retain; give recovery=None to go without"
            )
        check_numbers(NOT_NEGATIVE, damping=self.damping)
        check_numbers(POSITIVE, predicted_kl=self.predicted_kl)
        check_numbers(COUNT, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Forgetting:
    """Settings of `forget`: how it steps, and what it is stopped and judged by.

    Attributes:
        method: settings of the natural steps; or any other `TrainingMethod`, which the same rows
            then stop.
        likelihood: what the outputs mean; None: `Categorical`, at the temperature of
            `choose_temperature`. The temperature is the metric's alone: the price is of the outputs
            as they are.
        steps: number of steps at most, before those of a recovery; 48 was enough on TOFU in small
            (ours).
        every: number of steps between two looks at the rows and at the price; 4 is arbitrary.
        significance: the edit stops when the test's p-value is above it; 0.05 is
            also what Forget Quality is held against.
        heldout: retain rows on which the price is measured; None: a tenth of them, 64 at most, at
            equal distances, which no step and no curvature sees.
        attack: the optimizer of a relearning attack on the result; None: it is not attacked.
    """

    method: Natural | TrainingMethod = Natural()  # noqa: RUF009 - frozen
    likelihood: Likelihood | None = None
    steps: int = 48
    every: int = 4
    significance: float = 0.05
    heldout: Batch | None = None
    attack: optax.GradientTransformation | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            ValueError: a number out of its range, by its name.
        """
        check_numbers(COUNT, steps=self.steps, every=self.every)
        check_numbers(SHARE, significance=self.significance)


class ForgetInfo(NamedTuple):
    """What `forget` found: why it stopped, which rows are done, what it cost.

    Attributes:
        stopped: "unseen": the forget rows could not be told from unseen ones at a look, maybe
            before the first step; in the recovery some may fall back, which `p_value` says.
            "budget": the price is spent; "steps": neither, after all the steps.
        steps: number of steps taken, those of the recovery included.
        is_done: (n,), the rows whose score has reached its target; without unseen rows, none.
        loss_before: (n,), losses of the forget rows under θ₀, nats per output.
        loss_after: (n,), the same under the edited model.
        score: (n,), scores of the forget rows under the edited model.
        unseen_score: (m,), scores of the unseen rows under θ₀, sorted; empty where none were given.
        p_value: (looks,), the test's p-value before the first step and at each look; NaN without
            unseen rows.
        true_kl: (looks,), KL(θ₀ ‖ θ) on the held-out retain rows there, nats per output.
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

        edit, info = jedit.forget(apply, params, forget, retain, unseen=unseen, budget=0.5, key=key)
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
        budget: true retain KL that the edit may cost on the held-out rows at any look, nats per
            output; None: it may cost anything.
        how: the settings.

    Returns:
        The edit, of the parameters that the curvature covers, in float32 or wider; and what was
        found.  It costs one pass for the curvature, a forward and a backward pass for every row of
        a step, and at every look a forward pass of the forget and of the held-out rows.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of its range, rows that count no output, a curvature of other
            parameters, or fewer rows than the test needs to tell anything.
        FloatingPointError: a loss or a parameter is not finite, as `unlearn` says it.
    """
    check_numbers(POSITIVE, budget=budget)
    check_kind(how, Forgetting, "how", "such as Forgetting(steps=96)")
    check_function(apply)
    check_params(params)
    check_key(key)
    if isinstance(unseen, Batch):
        unseen = Unseen(unseen)
    if unseen is not None:
        check_kind(unseen, Unseen, "unseen", "such as Unseen(rows)")
    check_batch(forget, "forget")
    check_batch(retain, "retain")
    if unseen is not None:
        check_power(rows_in(forget), rows_in(unseen.rows), how.significance)
    if how.attack is not None and rows_in(forget) < 2:
        raise ValueError("an attack teaches some forget rows and asks about others; there is one")
    score = Score(apply, forget, unseen)
    seen, heldout = (retain, how.heldout) if how.heldout is not None else _held_out(retain)
    curvature_key, order_key, attack_key = jax.random.split(key, 3)
    method, recovery = how.method, None
    if isinstance(method, Natural):
        method, recovery = _natural(method, how, apply, params, seen, key=curvature_key)
    likelihood = Categorical() if how.likelihood is None else how.likelihood
    if isinstance(likelihood, Categorical):
        likelihood = Categorical()
    price = RetainKl(apply, params, chunks(heldout), likelihood=likelihood)
    before = row_losses(apply, params, forget)
    level = score.level(params)
    path = _Path(apply, params, method, forget, seen, order_key)
    after, change, stopped = score.of(params), {}, "steps"
    done, looks = _judged(after, level), [(_p_value(after, level), 0.0)]
    last, recovers = how.steps, False
    while True:
        if stopped == "steps" and looks[-1][0] > how.significance:
            stopped = "unseen"
            last = last if recovers else path.state.step
        if path.state.step >= last:
            if recovery is None or recovers or not last:
                break
            recovers = True
            path.go_on_by(recovery[0])
            last += recovery[1]
        left = np.ones_like(done) if recovers else ~done
        now = path.ahead(min(how.every, last - path.state.step), left)
        spent = price(now)
        is_over = budget is not None and not spent <= budget  # NaN is over, too
        if is_over:
            assert budget is not None
            now, spent = _back(price, (change, now), (looks[-1][1], spent), budget)
        change, after = now, score.of(moved(params, now))
        done = _judged(after, level)
        looks.append((_p_value(after, level), spent))
        if is_over:
            stopped = "budget"
            break
    edited, comeback = moved(params, change), None
    if how.attack is not None:
        control = None if unseen is None else unseen.rows
        comeback = attacked(apply, edited, forget, control, optimizer=how.attack, key=attack_key)
    p_values, costs = np.asarray(looks).T
    info = ForgetInfo(
        stopped=stopped,
        steps=path.state.step,
        is_done=done,
        loss_before=before,
        loss_after=row_losses(apply, edited, forget),
        score=after,
        unseen_score=level,
        p_value=p_values,
        true_kl=costs,
        predicted_kl=price.predicted(change) if change else 0.0,
        comeback=comeback,
    )
    return Edit(change), info


def _natural(
    steps: Natural, how: Forgetting, apply: Apply, params: PyTree, seen: Batch, *, key: Array
) -> tuple[TrainingMethod, tuple[TrainingMethod, int] | None]:
    """Make the natural steps, and the recovery of the same parameters with its number of steps."""
    curvature = steps.curvature
    if curvature is None:
        metric = how.likelihood
        if metric is None:
            probed = take(seen, spread(rows_in(seen), PROBED))
            metric = Categorical(choose_temperature(apply, params, chunks(probed)))
        estimator = kfac(apply, metric, select=steps.select)
        curvature = estimate(estimator, params, chunks(seen), key=key)
    check_covers(curvature, params)
    method = natural(
        steps.objective,
        curvature,
        damping=steps.damping,
        predicted_kl=falling(steps.predicted_kl, how.steps),
        batch_size=steps.batch_size,
    )
    if (then := steps.recovery) is None:
        return method, None
    assert isinstance(steps.objective, WithRetain)
    covered = [path for block in curvature.blocks.values() for path in block.weight.paths]
    after = TrainingMethod(
        dataclasses.replace(steps.objective, forget_weight=then.forget_weight),
        # Adam's steps have length one in every coordinate, so it is the bound that sets it.
        optax.chain(
            optax.scale_by_adam(),
            optax.scale(-1.0),
            clip_by_curvature_norm(curvature, falling(then.predicted_kl, then.steps)),
        ),
        trainable="|".join(exactly(covered)),
        batch_size=then.batch_size,
    )
    return method, (after, then.steps)


class _Path:
    """The loop, piece by piece: where it stands, and the rows that are still to be raised."""

    def __init__(self, apply, params, method, forget, retain, key):
        self._apply, self._method = apply, method
        self._sets, self._key = (forget, retain), key
        self._start = params
        self.state = LoopState(0, params, None)

    def go_on_by(self, method: TrainingMethod) -> None:
        """Take another method from here."""
        self._method = method
        self.state = self.state._replace(optimizer_state=None)

    def ahead(self, steps: int, is_left: np.ndarray) -> dict[str, Array]:
        """Take so many steps; return the change from the start, by path."""
        forget, retain = self._sets
        # As many rows as there were, those that are left several times over: one shape, and so one
        # program.
        left = np.flatnonzero(is_left) if is_left.any() else np.arange(len(is_left))
        forget = take(forget, np.resize(left, len(is_left)))
        reached: list[LoopState] = []

        def keep(state: LoopState, history: History) -> None:
            del history
            reached.append(state)

        unlearn(
            self._method,
            self._apply,
            self.state,
            forget,
            retain,
            steps=self.state.step + steps,
            # One key for all pieces: the rows of a step depend on its number.
            key=jax.random.clone(self._key),
            watch=Watch(keep),
        )
        self.state = reached[-1]
        return _difference(self._start, self.state.params)


def _judged(scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return which rows have reached their targets; none where there are no unseen rows."""
    return scores >= targets(scores, level) if len(level) else np.zeros(len(scores), bool)


def _p_value(scores: np.ndarray, level: np.ndarray) -> float:
    return p_value_of(scores, level) if len(level) else math.nan


def _difference(before: PyTree, after: PyTree) -> dict[str, Array]:
    return {p: c for p, c in edit_between(before, after).blocks.items() if bool(jnp.any(c != 0))}


def _back(
    price: RetainKl,
    ends: tuple[dict[str, Array], dict[str, Array]],
    prices: tuple[float, float],
    budget: float,
) -> tuple[dict[str, Array], float]:
    """Shorten the last piece of the path, between two changes, to what the budget allows.

    Returns:
        The change where it ends now, and its price.
    """
    before, now = ends
    move = ahead(now, before, -1.0)

    def along(alpha: float) -> float:
        return price(move, alpha, start=before)

    # The root of the KL is nearly linear between the ends of a short piece.
    low, high = (math.sqrt(max(kl, 0.0)) for kl in prices)
    guess = 0.2
    if math.isfinite(high):
        guess = max((0.9975 * math.sqrt(budget) - low) / (high - low), 0.0)
    alpha = largest_step_within(along, guess, budget, limit=1.0)
    return ahead(before, move, alpha), along(alpha)


def _held_out(retain: Batch) -> tuple[Batch, Batch]:
    """Split off a tenth of the rows.

    Raises:
        ValueError: there are fewer than two rows.
    """
    number = rows_in(retain)
    away = spread(number, min(-(-number // HELD_OUT), MOST_HELD_OUT))
    if number < 2:
        raise ValueError(
            "forget holds retain rows out to measure the price on, so at least 2 are needed; got "
            f"{number}. Give heldout= in how"
        )
    stays = np.delete(np.arange(number), away)
    return take(retain, stays), take(retain, away)

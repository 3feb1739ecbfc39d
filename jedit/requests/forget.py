"""Forget one set of rows, from the sets to the edit: natural steps that stop by themselves (ours).

    F         curvature of the retain outputs where natural steps begin         estimated, or given
    Δ         natural steps of an objective, NPO with its retain term           `methods.natural`
    s_i       loss of row i less the mean loss of other answers to its question the row's score
    u         scores of unseen rows under θ₀, sorted                            `unseen`
    τ_i       quantile of u at the rank of row i among the forget rows          the row's target
    done_i    s_i >= τ_i: the row is not drawn while that holds
    stop      D⁺ = max_x (share of s <= x - share of u <= x) passes the one-sided test of two
              samples (Smirnov 1939) at `significance`; a piece of the path that leads past the
              unseen rows is shortened to where D⁺ = D⁻
    rewind    θ₀ + share (θ_start - θ₀), then Adam on γ f + R: a way that lasts, and costs more
    recovery  steps in Adam's direction, of the same predicted KL, on γ f + R where natural steps
              lowered f + R: what they cost comes back, and f, which has saturated, is held; on R
              alone while the rows are past the unseen ones, told from them by their higher scores
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jedit.core.arguments import check_batch, check_function, check_key, check_kind, check_params
from jedit.core.batch import Apply, Batch
from jedit.core.checks import POSITIVE, check_numbers
from jedit.core.devices import on_auto_axes
from jedit.core.display import short_repr
from jedit.core.paths import matcher, parameter_paths
from jedit.curvature import Curvature, Factorize, choose_temperature, estimate, kfac
from jedit.curvature.checks import check_covers
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit, edit_between
from jedit.geometry import RetainKl
from jedit.geometry.parts import moved
from jedit.methods.curvature.natural import covered, natural
from jedit.objectives.held import WithRetain
from jedit.requests.comeback import Comeback, attacked
from jedit.requests.forgetting import Forgetting, Natural, Rewind, Watching
from jedit.requests.unseen import (
    Score,
    Unseen,
    check_power,
    chunks,
    row_losses,
    spread,
    take,
)
from jedit.requests.walk import Judging, Stopped, Walk
from jedit.training import TrainingMethod
from jedit.training.freezing import which_are_trained
from jedit.training.masters import with_masters
from jedit.training.rows import num_rows as rows_in
from jedit.transforms import clip_by_curvature_norm, falling

HELD_OUT = 10  # one of so many retain rows is held out of the steps; arbitrary
MOST_HELD_OUT = 64  # rows; arbitrary
WARM_UP = 6  # a part of the steps of a rewind; arbitrary
PROBED = 128  # retain rows that tell the temperature; arbitrary


class ForgetInfo(NamedTuple):
    """What `forget` found: why it stopped, which rows are done, what it cost.

    Attributes:
        stopped: "unseen": the forget rows could not be told from unseen ones at a look, maybe
            before the first step; in the recovery some may fall back, which `p_value` says.
            "budget": the price is spent; "steps": neither, after all the steps.
        steps: number of steps taken, those of the rewind and of the recovery included.
        is_done: (n,), the rows whose score has reached its target; without unseen rows, none.
        loss_before: (n,), losses of the forget rows under θ₀, nats per output.
        loss_after: (n,), the same under the edited model.
        score: (n,), scores of the forget rows under the edited model.
        unseen_score: (m,), scores of the unseen rows under θ₀, sorted; empty where none were given.
        p_value: (looks,), the test's p-value before the first step and at each look; NaN without
            unseen rows.
        true_kl: (looks,), KL(θ₀ ‖ θ) on the held-out retain rows there, nats per output.
        mean_score: (looks,), mean score of the forget rows there.
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
    mean_score: Float[np.ndarray, " looks"]
    predicted_kl: float
    comeback: Comeback | None

    __repr__ = short_repr


@on_auto_axes
def forget(
    apply: Apply,
    params: PyTree,
    forget: Batch | tuple[Any, ...],
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
        params: the trained parameters θ₀. Those that are edited and narrower than float32 are kept
            in float32 meanwhile, in which small steps add up, and computed with as they were.
        forget: rows to forget, with targets; not packed. Where the method wants more than these, a
            tuple that begins with them, row by row: `(rows, refusals)`, say, or `GradedRows`.
        retain: rows to keep, with targets.
        key: of the curvature's labels and of the order of the rows.
        unseen: rows of the same kind that nobody trained on, best an `Unseen`, with other answers
            to their questions. None: nothing but the budget and the number of steps ends the edit.
        budget: true retain KL that the edit may cost on the held-out rows at any look, nats per
            output; None: it may cost anything. Where a rewind has spent it, the way to where that
            ended is shortened, and nothing follows.
        how: the settings.

    Returns:
        The edit, of the parameters that the curvature covers, or of all after a rewind, in float32
        or wider; and what was found.  It costs one pass for the curvature, a forward and a backward
        pass for every row of a step, and at every look a forward pass of the forget and of the
        held-out rows.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of its range, rows that count no output, a curvature or a start of
            other parameters, or fewer rows than the test needs to tell anything.
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
    if isinstance(how.method, Natural) and how.method.rewind is not None:
        _check_start(how.method.rewind.start, params)
    drawn, forget = forget, _first(forget)
    check_batch(forget, "forget")
    check_batch(retain, "retain")
    if unseen is not None:
        check_power(rows_in(forget), rows_in(unseen.rows), how.significance)
    if how.attack is not None and rows_in(forget) < 2:
        raise ValueError("an attack teaches some forget rows and asks about others; there is one")
    apply, params = with_masters(apply, params, _which_are_edited(params, how.method))
    score = Score(apply, forget, unseen)
    seen, heldout = (retain, how.heldout) if how.heldout is not None else held_out(retain)
    curvature_key, order_key, attack_key = jax.random.split(key, 3)
    likelihood = Categorical() if how.likelihood is None else how.likelihood
    if isinstance(likelihood, Categorical):
        likelihood = Categorical()
    price = RetainKl(apply, params, chunks(heldout), likelihood=likelihood)
    before = row_losses(apply, params, forget)
    watch = Watching() if how.watch is None else how.watch
    walk = Walk(
        apply,
        params,
        (drawn, seen),
        Judging(score, price, how.significance, budget, watch.callback),
        key=order_key,
        checkpoint=watch.checkpoint,
    )
    method, recovery = how.method, None
    if isinstance(method, Natural):
        if (rewind := method.rewind) is not None and walk.stopped == "steps":
            walk.begin_at(_rewound(params, rewind))
            back = _way_back(method, rewind)
            walk.go("rewind", back, rewind.steps, every=rewind.steps, is_raising=False)
        if walk.stopped == "steps" or (walk.stopped == "unseen" and walk.state.step):
            method, recovery = _natural(
                method, how, apply, walk.state.params, seen, key=curvature_key
            )
    if isinstance(method, TrainingMethod):
        walk.go("steps", method, how.steps, every=how.every, is_raising=True)
    if recovery is not None and walk.state.step:
        held, let_go, steps = recovery
        reached, loss = walk.change, _mean_loss(apply, walk.state.params, heldout)
        walk.go("recovery", held, steps, every=how.every, is_raising=False, letting_go=let_go)
        # A recovery lowers the loss of what is kept, or is none.
        if not _mean_loss(apply, moved(params, walk.change), heldout) <= loss:
            walk.back_to(reached)
    edited, comeback = moved(params, walk.change), None
    if how.attack is not None:
        control = None if unseen is None else unseen.rows
        comeback = attacked(apply, edited, forget, control, optimizer=how.attack, key=attack_key)
    _, p_values, costs, mean_scores = np.asarray(walk.looks).T
    info = ForgetInfo(
        stopped=walk.stopped,
        steps=walk.state.step,
        is_done=walk.is_done,
        loss_before=before,
        loss_after=row_losses(apply, edited, forget),
        score=walk.score,
        unseen_score=walk.level,
        p_value=p_values,
        true_kl=costs,
        mean_score=mean_scores,
        predicted_kl=price.predicted(walk.change) if walk.change else 0.0,
        comeback=comeback,
    )
    return Edit(walk.change), info


def _which_are_edited(params: PyTree, method: Natural | TrainingMethod) -> tuple[bool, ...]:
    """Return, leaf by leaf, what may be edited, where it is told before a curvature is there."""
    if isinstance(method, TrainingMethod):
        return which_are_trained(params, method.trainable)
    given = method.curvature
    select = covered(given) if isinstance(given, Curvature) else method.select
    is_found = matcher("" if select is None else select, "select")
    named = parameter_paths(params)
    return tuple(
        jnp.issubdtype(jnp.result_type(x), jnp.floating) and is_found(path) for path, x in named
    )


def _check_start(start: PyTree, params: PyTree) -> None:
    """Refuse what a rewind cannot go back to, and weights in which its steps would not add up.

    Raises:
        ValueError: another structure or shape, or real parameters narrower than float32.
    """
    ours, theirs = (
        {path: jnp.shape(leaf) for path, leaf in parameter_paths(x)} for x in (params, start)
    )
    if differing := sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k)):
        raise ValueError(
            "the start of a rewind has to be of the params' structure and shapes; they differ in "
            f"{', '.join(differing[:3])}"
        )
    for path, leaf in parameter_paths(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"a rewind trains, and {path} is {dtype}, in which small steps are lost; give "
                "jedit.models.cast_params(params, jnp.float32), and mixed_precision(apply, "
                f"jnp.{dtype}) to compute as before"
            )


def _rewound(params: PyTree, rewind: Rewind) -> PyTree:
    """Draw the parameters back, a share of the way."""
    return apply_edit(params, edit_between(params, rewind.start), rewind.share)


def _way_back(method: Natural, rewind: Rewind) -> TrainingMethod:
    """Make what trains the model on from there."""
    objective = method.objective
    assert isinstance(objective, WithRetain)
    if rewind.forget_weight:
        objective = dataclasses.replace(objective, forget_weight=rewind.forget_weight)
    else:
        objective = objective.held
    rate = optax.warmup_cosine_decay_schedule(
        0.0, rewind.learning_rate, rewind.steps // WARM_UP, rewind.steps
    )
    return TrainingMethod(objective, optax.adam(rate), batch_size=rewind.batch_size)


def _first(forget: Batch | tuple[Any, ...]) -> Batch:
    """Return the rows to forget, of what stands beside them: batches, or an array of a value each.

    Raises:
        TypeError: one is no batch, or no array beside one.
        ValueError: there are not as many rows in each.
    """
    if isinstance(forget, Batch) or not isinstance(forget, tuple):
        return forget
    check_batch(forget[0], "forget")
    for part in forget[1:]:
        if not isinstance(part, (jax.Array, np.ndarray)) or not part.ndim:
            check_batch(part, "forget")
    if len(numbers := {rows_in(part) for part in forget}) > 1:
        raise ValueError(
            "batches beside the rows to forget belong to them, row by row; they have "
            f"{', '.join(map(str, sorted(numbers)))} rows"
        )
    return forget[0]


def _natural(
    steps: Natural, how: Forgetting, apply: Apply, params: PyTree, seen: Batch, *, key: Array
) -> tuple[TrainingMethod, tuple[TrainingMethod, TrainingMethod, int] | None]:
    """Make the natural steps, and the recovery of the same parameters.

    A recovery is what holds the rows, what lets them go, and the number of steps.
    """
    curvature = steps.curvature
    if not isinstance(curvature, Curvature):
        metric = how.likelihood
        if metric is None:
            probed = take(seen, spread(rows_in(seen), PROBED))
            metric = Categorical(choose_temperature(apply, params, chunks(probed)))
        kept = Factorize() if curvature is None else curvature
        estimator = kfac(apply, metric, select=steps.select, factorize=kept)
        job = None if how.watch is None else how.watch.checkpoint
        part = None if job is None else job.part("curvature")
        curvature = estimate(estimator, params, chunks(seen), key=key, checkpoint=part)
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
    after = TrainingMethod(
        dataclasses.replace(steps.objective, forget_weight=then.forget_weight),
        # Adam's steps have length one in every coordinate, so it is the bound that sets it.
        optax.chain(
            optax.scale_by_adam(),
            optax.scale(-1.0),
            clip_by_curvature_norm(curvature, falling(then.predicted_kl, then.steps)),
        ),
        trainable=method.trainable,
        batch_size=then.batch_size,
    )
    letting_go = after._replace(objective=steps.objective.held)
    return method, (after, letting_go, then.steps)


def _mean_loss(apply: Apply, params: PyTree, rows: Batch) -> float:
    if rows.targets is None:  # held-out rows need none for their KL
        return 0.0
    return float(np.mean(row_losses(apply, params, rows)))


def held_out(retain: Batch) -> tuple[Batch, Batch]:
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

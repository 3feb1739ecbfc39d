"""The shared comparison: edit one model by every method over its strength, and judge each point.

The curvature is fitted, and what training methods hold on to is taken, from `retain` alone;
`heldout` are rows that the model was trained on as well and no edit sees, so the retain KL measured
there is honest.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.curvature import (
    Curvature,
    Estimator,
    Factorize,
    choose_temperature,
    ekfac,
    estimate,
    kfac,
)
from jedit.curvature.likelihoods import Categorical
from jedit.data import answers_only, batches
from jedit.edits import Edit, apply_edit
from jedit.methods import fit_latents, kfade
from jedit.methods.row import (
    ByBudget,
    ByDraws,
    ByScale,
    BySteps,
    Material,
    Need,
    Reach,
    Row,
)
from jedit.objectives import Dialogue, LatentMeans
from jedit.recipes.comparison.judge import Judge, probe_batch
from jedit.recipes.comparison.task import Grid, Task
from jedit.recipes.comparison.trajectories import ascend, destroyed
from jedit.recipes.factorizing import FITTED, factorize_for
from jedit.recipes.fitting import rows_of
from jedit.recipes.named import check_grid, check_needs, rows_named
from jedit.recipes.progress import Say, tell
from jedit.report import Curve, Method, NumJudged, Point, best_point, best_quality
from jedit.tracing import Entering
from jedit.tracing.attention_maps import AttentionMaps, attention_of
from jedit.training import run_method

MOMENTS = {Need.TARGET_MOMENTS, Need.REST_MOMENTS}


class Judged(NamedTuple):
    """What a comparison found, before it is put into words.

    Attributes:
        num_judged: rows that judged a point.
        original: the untouched model.
        retrained: the model trained without the forget rows.
        methods: what was compared.
        curves: every setting of every method.
        best: by method its best point by the rule, or None.
        chosen: the method whose best point is the best of all by the rule; None if there is none.
    """

    num_judged: NumJudged

    original: Point
    retrained: Point
    methods: tuple[Method, ...]
    curves: tuple[Curve, ...]
    best: dict[str, tuple[Curve, Point] | None]
    chosen: str | None


class Fitted(NamedTuple):
    """What is estimated once for all methods, and how long one takes that is compiled.

    Attributes:
        plain: K-FAC of the retain outputs by temperature; empty where no method needs one.
        corrected: EK-FAC of the same; empty where no method needs it.
        moments: K-FAC of the forget and of the retain answers, by the need; likewise.
        temperature: the one of the grid's that methods without one of their own step at.
        alternates: the forget rows' alternate answers; None where no method needs them.
        dialogue: what RULE is taught by and asks; likewise.
        attention: how attention is read; None where no method does, or the model has none.
        latents: of the hidden site; None where no method needs them, or the task has no unknown
            rows.
        seconds: of one K-FAC.
        corrected_seconds: of one K-FAC and its EK-FAC.
        moment_seconds: of the moments.
    """

    plain: dict[float, Curvature] = {}
    corrected: dict[float, Curvature] = {}
    moments: dict[Need, Curvature] = {}
    temperature: float = 1.0
    alternates: Batch | None = None
    dialogue: Dialogue | None = None
    attention: AttentionMaps | None = None
    latents: LatentMeans | None = None
    seconds: float = 0.0
    corrected_seconds: float = 0.0
    moment_seconds: float = 0.0


def compare(
    task: Task,
    grid: Grid,
    *,
    key: Array,
    say: Say,
    hold: Callable[[PyTree], PyTree] = lambda params: params,
) -> tuple[Judged, dict[str, PyTree]]:
    """Edit by every method of the grid, judge every point.

    Args:
        task: the model and the sets.
        grid: what to try.
        key: of the curvature's labels and of the baselines' batches.
        say: told of each stage, in a few words.
        hold: makes of the params that are returned what is kept of them; `jax.device_get` keeps
            them in the host's memory.

    Returns:
        The numbers, and for each method with a point within budget the params of its best point.

    Raises:
        ValueError: a method that the catalogue does not have, or that needs what the task, or how
            the grid keeps factors, lacks.
    """
    rows = rows_named(grid.methods)
    check_grid(grid, rows)
    grid = grid._replace(factorize=factorize_for(rows, grid.factorize))
    check_needs(rows, material_of(task, grid, Fitted()), but=_fitted_for(task))
    judge = Judge(task, grid.lost_kl)
    curvature_key, ascent_key = (jax.random.fold_in(key, i) for i in range(2))
    original = judge(task.original, 0.0, 0.0)
    retrained = judge(task.retrained, 0.0, 0.0)
    found, models, methods = [], {}, []

    def best_of(name: str | None) -> tuple[Curve, Point] | None:
        if grid.utility_share is None:
            return best_point(found, name, grid.kl_budget)
        return best_quality(found, name, grid.utility_share, original)

    def keep(curve: Curve, params_of_points: list[PyTree]) -> None:
        # Only the best so far is held, so that memory does not grow with the grid.
        found.append(curve)
        best = best_of(curve.method)
        if best is not None and best[0] is curve:
            models[curve.method] = hold(params_of_points[curve.points.index(best[1])])

    fitted = fit_material(task, grid, rows, key=curvature_key, say=say)
    material = material_of(task, grid, fitted)
    # What is fitted by temperature is put in for each.
    check_needs(rows, material, but=frozenset({Need.CORRECTED}))
    for row in rows:
        if isinstance(row, ByBudget):
            curves, method = _by_budget(row, task, grid, judge, material, fitted)
        elif isinstance(row, ByDraws):
            curves, method = _by_draws(row, task, grid, judge, material, key=ascent_key)
        elif isinstance(row, ByScale):
            curves, method = _by_scale(row, task, grid, judge, material)
        else:
            assert isinstance(row, BySteps)
            curves, method = _by_steps(row, task, grid, judge, material, key=ascent_key)
        tried = math.prod(len(values) for values in method.grid.values())
        say(f"{row.name}: {tried} settings")
        for i, (curve, params) in enumerate(curves, 1):
            keep(curve, params)
            tell(say, i, tried)
        methods.append(method._replace(fit_seconds=fit_seconds(row, fitted)))
    best = {m.name: best_of(m.name) for m in methods}
    overall = best_of(None)
    judged = Judged(
        num_judged=judge.num_judged,
        original=original,
        retrained=retrained,
        methods=tuple(methods),
        curves=tuple(found),
        best=best,
        chosen=None if overall is None else overall[0].method,
    )
    return judged, models


def _fitted_for(task: Task) -> frozenset[Need]:
    """Return what `fit_material` makes of a task, or finds in its model."""
    made = {
        Need.ALTERNATES: task.alternates,
        Need.DIALOGUE: task.dialogue,
        Need.LATENTS: task.unknown,
    }
    return FITTED | {Need.ATTENTION} | {need for need, by in made.items() if by is not None}


def material_of(task: Task, grid: Grid, fitted: Fitted) -> Material:
    """Return what a task can give to the methods, with what was fitted for them."""
    outputs = jax.eval_shape(task.apply, task.original, task.forget.inputs)
    plain = fitted.plain
    return Material(
        apply=task.apply,
        params=task.original,
        forget=task.forget,
        curvature=plain[fitted.temperature] if plain else None,
        hidden_site=task.hidden_site,
        layers=task.layers,
        subjects=_last_prompt_token(task.forget),
        refusals=task.refusals,
        alternates=fitted.alternates,
        dialogue=fitted.dialogue,
        num_classes=outputs.shape[-1],
        retain=task.retain,
        steps=grid.looks[-1],
        attention=fitted.attention,
        latents=fitted.latents,
        has_positions=outputs.ndim > 2,
        target_moments=fitted.moments.get(Need.TARGET_MOMENTS),
        rest_moments=fitted.moments.get(Need.REST_MOMENTS),
    )


def kfade_on(task: Task, curvature: Curvature, damping: float) -> Callable:
    """K-FADE on a task's batches, to be called with `budget=` and `ascent=`."""
    forget, retain = searched(task)
    return functools.partial(
        kfade, task.apply, task.original, curvature, forget, retain, damping=damping
    )


def searched(task: Task) -> tuple[list[Batch], list[Batch]]:
    """Return the forget rows, and the retain rows of a line search, in chunks."""
    forget = list(batches(task.forget, min(task.chunk, rows_of(task.forget))))
    retain = list(batches(probe_batch(task.retain, task.probe), min(task.chunk, task.probe)))
    return forget, retain


def fit_material(task: Task, grid: Grid, rows: Sequence[Row], *, key: Array, say: Say) -> Fitted:
    """Estimate what one of the rows needs."""
    needed = frozenset().union(*(row.needs for row in rows))
    fitted = Fitted()
    if needed & {Need.CURVATURE, Need.CORRECTED}:
        fitted = _fit_retained(task, grid, Need.CORRECTED in needed, key=key, say=say)
    if needed & MOMENTS:
        say("taking moments at the answers of the forget and of the retain rows")
        moments, seconds = _fit_moments(task, grid.factorize, key=key)
        fitted = fitted._replace(moments=moments, moment_seconds=seconds)
    if Need.ALTERNATES in needed and task.alternates is not None:
        say("sampling alternate answers to the forget rows' questions")
        fitted = fitted._replace(alternates=task.alternates())
    if Need.DIALOGUE in needed and task.dialogue is not None:
        fitted = fitted._replace(dialogue=task.dialogue())
    if Need.ATTENTION in needed:  # looking for it traces the whole model
        attention = attention_of(task.apply, task.original, task.forget.inputs)
        fitted = fitted._replace(attention=attention)
    if Need.LATENTS in needed and task.unknown is not None:
        say("training a sparse autoencoder of the hidden site")
        hidden, latents_key = Entering(task.hidden_site), jax.random.fold_in(key, 4)
        given = (task.apply, task.original, hidden, task.retain, task.unknown)
        fitted = fitted._replace(latents=fit_latents(*given, key=latents_key)[0])
    return fitted


def _fit_retained(task: Task, grid: Grid, with_corrected: bool, *, key: Array, say: Say) -> Fitted:
    """Fit K-FAC of the retain outputs, and EK-FAC if it is wanted, at each temperature."""
    kinds = "K-FAC and EK-FAC" if with_corrected else "K-FAC"
    plain: dict[float, Curvature] = {}
    corrected: dict[float, Curvature] = {}
    seconds = np.zeros(2)
    chunks = list(batches(task.retain, task.chunk))
    for temperature in grid.temperatures:
        say(f"fitting {kinds} on the retain rows, temperature {temperature:g}")
        likelihood = Categorical(temperature)
        estimator = _kfac(task.apply, likelihood, task.select, grid.factorize)
        plain[temperature], first = _timed(estimator, task.original, chunks, key=key)
        second = 0.0
        if with_corrected:
            estimator = ekfac(task.apply, likelihood, plain[temperature])
            ekfac_key = jax.random.fold_in(key, 1)
            corrected[temperature], second = _timed(estimator, task.original, chunks, key=ekfac_key)
        seconds += np.array([first, first + second]) / len(grid.temperatures)
    temperature = choose_temperature(task.apply, task.original, chunks[0], among=grid.temperatures)
    if len(grid.temperatures) > 1:
        say(f"methods without a temperature of their own step at {temperature:g}")
    first, both = seconds.tolist()
    return Fitted(plain, corrected, temperature=temperature, seconds=first, corrected_seconds=both)


def _fit_moments(task: Task, how: Factorize, *, key: Array) -> tuple[dict[Need, Curvature], float]:
    """Fit the curvatures that engrams want: of both sets, at the answers alone."""
    estimator = _kfac(task.apply, Categorical(), task.select, how)
    moments, total = {}, 0.0
    for i, (need, rows) in enumerate(
        ((Need.TARGET_MOMENTS, task.forget), (Need.REST_MOMENTS, task.retain)), start=2
    ):
        chunks = list(map(answers_only, batches(rows, min(task.chunk, rows_of(rows)))))
        rng = jax.random.fold_in(key, i)
        moments[need], seconds = _timed(estimator, task.original, chunks, key=rng)
        total += seconds
    return moments, total


def fit_seconds(row: Row, fitted: Fitted) -> float:
    """Return what a method needs once before any edit."""
    if Need.CORRECTED in row.needs:
        return fitted.corrected_seconds
    if row.needs & MOMENTS:
        return fitted.moment_seconds
    return fitted.seconds if Need.CURVATURE in row.needs else 0.0


def _timed(
    estimator: Estimator, params: PyTree, chunks: list[Batch], *, key: Array
) -> tuple[Curvature, float]:
    """A curvature, and the seconds its estimation takes once it is compiled."""
    jax.block_until_ready(estimate(estimator, params, chunks[:1], key=key))
    start = time.perf_counter()
    curvature = jax.block_until_ready(estimate(estimator, params, chunks, key=key))
    return curvature, time.perf_counter() - start


@functools.cache
def _kfac(
    apply: Callable, likelihood: Categorical, select: str | None, how: Factorize
) -> Estimator:
    """One estimator for each model and likelihood: a second use of it compiles nothing."""
    return kfac(apply, likelihood, select=select, factorize=how)


Curves = Iterator[tuple[Curve, list[PyTree]]]


def _by_budget(
    row: ByBudget, task: Task, grid: Grid, judge: Judge, material: Material, fitted: Fitted
) -> tuple[Curves, Method]:
    own = {"damping": grid.damping, "steps": grid.kfade_steps}
    tried = {"temperature": grid.temperatures}
    tried |= {name: values for name, values in own.items() if name in row.settings}
    forget, retain = searched(task)

    def curves() -> Curves:
        for temperature, *values in itertools.product(*tried.values()):
            given = dataclasses.replace(
                material,
                curvature=fitted.plain[temperature],
                corrected=fitted.corrected.get(temperature),
            )
            settings = dict(zip(list(tried)[1:], values, strict=True))
            method = row.of(given, **settings)
            setting = {"temperature": temperature, **settings}

            def run(budget: float, method=method):
                bound = functools.partial(method, budget=budget)
                return run_method(bound, task.apply, task.original, forget, retain)

            # Compiles, so that the seconds below are the edit's own.
            once = {name: 1 for name in settings if name == "steps"}
            run(grid.budgets[0], row.of(given, **{**settings, **once}))
            points, models = [], []
            for budget in grid.budgets:
                start = time.perf_counter()
                edit, info = run(budget)
                params = jax.block_until_ready(apply_edit(task.original, edit))
                seconds = time.perf_counter() - start
                kls = (float(info.predicted_kl[-1]), float(info.true_kl[-1]))
                points.append(judge(params, budget, seconds, predicted_kl=kls[0], true_kl=kls[1]))
                models.append(params)
            yield Curve(row.name, setting, tuple(points)), models

    strength = "budget (true retain KL on the line search's rows, nats per output)"
    return curves(), Method(row.name, row.description, strength, tried, keeps_budget=True)


def _by_scale(
    row: ByScale, task: Task, grid: Grid, judge: Judge, material: Material
) -> tuple[Curves, Method]:
    scales = grid.scales[row.reach]
    # One edit for all scales, but for a share, which is a matter of what is edited.
    is_made_anew = row.reach is Reach.SHARE

    def curves() -> Curves:
        def run(scale: float) -> tuple[Edit, float]:
            method, left = row.scaled(material, scale)
            given = (method, task.apply, task.original, task.forget, task.retain)
            return jax.block_until_ready(run_method(*given)[0]), left

        start = time.perf_counter()
        try:
            run(scales[0])  # the clock must not see the compiler
            start = time.perf_counter()
            edits = [run(scale) for scale in (scales if is_made_anew else scales[:1])]
        except FloatingPointError:  # one that trains its edit has run away
            models, seconds = [destroyed(task.original)] * len(scales), time.perf_counter() - start
        else:
            seconds = (time.perf_counter() - start) / len(edits)
            if not is_made_anew:
                edits = [(edits[0][0], scale) for scale in scales]
            models = [apply_edit(task.original, edit, left) for edit, left in edits]
        points = [judge(m, scale, seconds) for m, scale in zip(models, scales, strict=True)]
        yield Curve(row.name, {}, tuple(points)), models

    strength = f"scale (of the {'share' if is_made_anew else 'edit'})"
    return curves(), Method(row.name, row.description, strength, {})


def _by_steps(
    row: BySteps, task: Task, grid: Grid, judge: Judge, material: Material, *, key: Array
) -> tuple[Curves, Method]:
    rates = grid.rates[row.pace]

    def curves() -> Curves:
        by_rate = ascend(
            row.of(material)._replace(batch_size=grid.batch_size),
            task.apply,
            task.original,
            row.forget_rows(material),
            task.retain,
            learning_rates=rates,
            looks=grid.looks,
            key=key,
        )
        for rate, found in zip(rates, by_rate, strict=True):
            points = tuple(judge(params, float(steps), seconds) for steps, seconds, params in found)
            yield Curve(row.name, {"learning rate": rate}, points), [p for *_, p in found]

    strength = f"steps (batches of {grid.batch_size} rows)"
    return curves(), Method(row.name, row.description, strength, {"learning rate": rates})


def _by_draws(
    row: ByDraws, task: Task, grid: Grid, judge: Judge, material: Material, *, key: Array
) -> tuple[Curves, Method]:
    def curves() -> Curves:
        learn = functools.partial(row.of(material), task.apply, task.original, key=key)
        found: list[tuple[int, float, PyTree]] = []

        def look(draws: int, params: PyTree) -> None:
            if draws in grid.draws:
                jax.block_until_ready(params)
                seconds = time.perf_counter() - start
                found.append((draws, seconds, jax.tree.map(jnp.copy, params)))

        start = time.perf_counter()
        try:
            learn(steps=1)  # the clock must not see the compiler
            start = time.perf_counter()
            learn(steps=grid.draws[-1], look=look)
        except FloatingPointError:  # the rate was too large
            lost, seconds = destroyed(task.original), time.perf_counter() - start
            found += [(n, seconds, lost) for n in grid.draws[len(found) :]]
        points = tuple(judge(params, float(n), seconds) for n, seconds, params in found)
        yield Curve(row.name, {}, points), [params for *_, params in found]

    strength = "draws (of answers, after the same rejection tuning)"
    return curves(), Method(row.name, row.description, strength, {})


def _last_prompt_token(forget: Batch) -> Array | None:
    """Where the first counted output is read off; None for outputs without positions."""
    if forget.mask is None or forget.mask.ndim < 2:
        return None
    return jnp.argmax(jnp.asarray(forget.mask) > 0, axis=1).astype(jnp.int32)

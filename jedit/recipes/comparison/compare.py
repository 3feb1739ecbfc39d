"""The shared comparison: edit one model by every method over its strength, and judge each point.

The curvature is fitted, and what training methods hold on to is taken, from `retain` alone;
`heldout` are rows that the model was trained on as well and no edit sees, so the retain KL measured
there is honest.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.core.outputs import counted_outputs
from jedit.curvature import Curvature, Estimator, ekfac, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import answers_only, batches
from jedit.edits import apply_edit
from jedit.geometry import null_space
from jedit.methods import Ascent, kfade
from jedit.metrics import forget_quality
from jedit.objectives import token_kl, token_nll
from jedit.recipes.comparison.closed_form import Editor, make_editors
from jedit.recipes.comparison.trained import (
    SOFT,
    Trainer,
    kuda_before,
    natural_npo,
    projected_ascent,
    trainers,
)
from jedit.recipes.comparison.trajectories import ascend
from jedit.recipes.fitting import rows_of
from jedit.report import Curve, Method, Point, best_point, best_quality
from jedit.tracing import intervene

Say = Callable[[str], None]
NULL_SPACE = 0.01  # share of the retained inputs' energy that is given up


class Grid(NamedTuple):
    """What every method is tried at; it is written into the report.

    Attributes:
        budgets: strengths of K-FADE, true retain KL in nats per output.
        temperatures: of the likelihood whose curvature K-FADE steps in.
        damping: of K-FADE, in units of each block's mean eigenvalue.
        kfade_steps: numbers of steps of one edit.
        scales: by method that gives one edit (`make_editors`), what the edit is multiplied by.
        learning_rates: by method that trains (`trainers`), with Adam; those named are run.
        looks: strengths of the methods that train, in optimizer steps.
        batch_size: forget rows, and retain rows, of one such step.
        kl_budget: the held-out retain KL under which a best point is chosen.
        utility_share: None, or what a best point has to keep of the Model Utility; see
            `QUALITY_RULE`.
        curvatures: whose metric K-FADE steps in, each a method of its own.
        lost_kl: the held-out retain KL beyond which Model Utility is not measured.
    """

    budgets: tuple[float, ...]
    temperatures: tuple[float, ...]
    damping: tuple[float, ...]
    kfade_steps: tuple[int, ...]
    learning_rates: dict[str, tuple[float, ...]]
    looks: tuple[int, ...]
    batch_size: int
    kl_budget: float
    scales: dict[str, tuple[float, ...]] = {}
    utility_share: float | None = None
    curvatures: tuple[str, ...] = ("K-FAC", "EK-FAC")
    lost_kl: float = math.inf


# At about the same learning rates; GU, in a metric of its own, at a third of them.
BY_ADAM = ("SimNPO", "WGA", "SatImp", "UNDIAL", "CE-U", "random label", "RMU", "SAM", "UAM", "ROSU")
BY_ADAM += ("ROSU (push)", "null-space GradDiff", "KUDA")
BY_GU = ("GU (leaf)", "GU (global)")
# These train in a metric or a null space of the retain rows' curvature.
NATURAL, SOFT_NATURAL = "NPO (natural)", f"NPO (natural, beta {SOFT:g})"
FITTED = (NATURAL, SOFT_NATURAL, "null-space GradDiff", "KUDA")


def with_all_methods(
    grid: Grid, rates: tuple[float, ...], scales: tuple[float, ...], *more: str
) -> Grid:
    """The grid with the methods that fit any scene, and those named besides."""
    added = dict.fromkeys((*BY_ADAM, *more), rates) | dict.fromkeys(BY_GU, (3e-5, 1e-4, 3e-4))
    return grid._replace(
        scales=dict.fromkeys(("engram", "engram (output metric)"), scales)
        | dict.fromkeys(("AlphaEdit", "MEMIT"), (0.3, 1.0, 3.0)),
        learning_rates=grid.learning_rates | added,
    )


class Task(NamedTuple):
    """A model, what it was trained on, and what of it is to be forgotten.

    Attributes:
        apply: `apply(params, inputs) -> logits`.
        original: the params of the model trained on everything.
        retrained: the params of the one trained without the forget rows.
        forget: rows to be forgotten.
        retain: rows that curvature and edits see.
        heldout: other retain rows of the training set.
        test: rows no model was trained on, or None.
        truth_ratio: params to the truth ratio of each forget row, or None.
        select: regular expression: which parameters K-FADE edits; None: all that can be.
        chunk: rows evaluated at a time.
        probe: how many retain rows the line search measures on.
        hidden_site: what enters this site is the hidden state of RMU.
        layers: paths of the matrices that AlphaEdit and MEMIT edit, by depth.
        refusals: what DPO prefers to the answers of the forget rows, row by row, or None.
        utility: params to Model Utility, or None.
        judged_rows: retain and held-out rows that judge a point, the first ones; None: all.
        pack: makes fewer sequences of the rows that judge a point; None: they stay as they are.
    """

    apply: Callable
    original: PyTree
    retrained: PyTree
    forget: Batch
    retain: Batch
    heldout: Batch
    test: Batch | None
    truth_ratio: Callable[[PyTree], np.ndarray] | None
    select: str | None
    chunk: int
    probe: int
    hidden_site: str
    layers: tuple[str, ...]
    refusals: Batch | None = None
    utility: Callable[[PyTree], float] | None = None
    judged_rows: int | None = None
    pack: Callable[[Batch], Batch] | None = None


class Judged(NamedTuple):
    """What a comparison found, before it is put into words; `best` is by method, by the rule."""

    original: Point
    retrained: Point
    methods: tuple[Method, ...]
    curves: tuple[Curve, ...]
    best: dict[str, tuple[Curve, Point] | None]


def compare(
    task: Task,
    grid: Grid,
    *,
    key: Array,
    say: Say,
    hold: Callable[[PyTree], PyTree] = lambda params: params,
) -> tuple[Judged, dict[str, PyTree]]:
    """Edit by every method, judge every point.

    Args:
        task: the model and the sets.
        grid: what to try.
        key: of the curvature's labels and of the baselines' batches.
        say: told of each stage, in a few words.
        hold: what the params that are returned are made to; `jax.device_get` keeps them elsewhere.

    Returns:
        The numbers, and for each method with a point within budget the params of its best point.
    """
    judge = Judge(task, grid.lost_kl)
    curvature_key, ascent_key = (jax.random.fold_in(key, i) for i in range(2))
    original = judge(task.original, 0.0, 0.0)
    retrained = judge(task.retrained, 0.0, 0.0)
    found, models = [], {}

    def best_of(name: str) -> tuple[Curve, Point] | None:
        if grid.utility_share is None:
            return best_point(found, name, grid.kl_budget)
        return best_quality(found, name, grid.utility_share, original)

    def keep(curve: Curve, params_of_points: list[PyTree]) -> None:
        # Only the best so far is held, so that memory does not grow with the grid.
        found.append(curve)
        best = best_of(curve.method)
        if best is not None and best[0] is curve:
            models[curve.method] = hold(params_of_points[curve.points.index(best[1])])

    methods = []
    fitted = _fit(task, grid, key=curvature_key, say=say)
    for name in (f"K-FADE ({kind})" for kind in grid.curvatures):
        curvatures, seconds = fitted[name]
        settings = list(itertools.product(curvatures, grid.damping, grid.kfade_steps))
        say(f"{name}: {len(grid.budgets) * len(settings)} edits")
        for temperature, damping, steps in settings:
            setting = {"temperature": temperature, "damping": damping, "steps": steps}
            keep(*_kfade_curve(task, grid, judge, name, curvatures[temperature], setting))
        methods.append(_kfade_method(name, grid, seconds))
    plain, fit_seconds = fitted["K-FADE (K-FAC)"]
    retained = plain[min(plain)]
    editors = _editors(task, retained, key=curvature_key) if grid.scales else {}
    for name, scales in grid.scales.items():
        editor = editors[name]
        say(f"{name}: {len(scales)} scales")
        keep(*_scaled_curve(task, judge, name, editor, scales))
        strength = "scale (of the edit)"
        # Engrams want moments of their own: of the forget rows as well, and at answers alone.
        methods.append(Method(name, editor.description, strength, {}, fit_seconds))
    trained_by = _trainers(task, retained, plain[max(plain)])
    for name, rates in grid.learning_rates.items():
        trainer = trained_by[name]
        say(f"{name}: {len(rates)} learning rates")
        for curve, params in _trained_curves(task, grid, judge, name, trainer, rates, ascent_key):
            keep(curve, params)
        strength = f"steps (batches of {grid.batch_size} rows)"
        fitting = fit_seconds if name in FITTED else 0.0
        grid_of = {"learning rate": rates}
        methods.append(Method(name, trainer.description, strength, grid_of, fitting))
    best = {m.name: best_of(m.name) for m in methods}
    return Judged(original, retrained, tuple(methods), tuple(found), best), models


def probe_batch(batch: Batch, num_rows: int | None) -> Batch:
    """The first rows of a batch; None: all."""
    return jax.tree.map(lambda x: x[:num_rows], batch)


class Judge:
    """Measures any params on the task's sets.

    What `jedit.metrics` gives one by one comes out of one forward pass here, a half of the time.
    """

    def __init__(self, task: Task, lost_kl: float):
        self.task, self.lost_kl = task, lost_kl
        names = ("forget", "retain", "heldout", "test")
        self.sets = {
            name: list(batches(_judged(task, name), task.chunk))
            for name in names
            if getattr(task, name) is not None
        }
        self.reference = (
            None if task.truth_ratio is None else _finite(task.truth_ratio(task.retrained))
        )

    def __call__(
        self, params: PyTree, strength: float, seconds: float, **predictions: float
    ) -> Point:
        """Judge params that an edit of this strength made in so many seconds."""
        task, apply = self.task, self.task.apply
        values: dict[str, float | None] = {}
        references = {"heldout": task.original, "forget": task.retrained}
        for name, chunks in self.sets.items():
            reference = references.get(name)
            sums = [_sums(apply, params, reference, chunk) for chunk in chunks]
            totals = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
            loss, hits, divergence, count = totals.tolist()
            values[f"{name}_nll"] = loss / count
            values[f"{name}_accuracy"] = hits / count
            if reference is not None:
                values[f"{name}_kl"] = divergence / count
        if task.truth_ratio is not None and self.reference is not None:
            ratios = _finite(task.truth_ratio(params))
            values["truth_ratio"] = float(np.mean(ratios))
            values["forget_quality"] = forget_quality(ratios, self.reference)
        # An edited model this far off has lost its utility; asking it costs the most.
        is_lost = strength > 0 and (values["heldout_kl"] or 0) > self.lost_kl
        if task.utility is not None and not is_lost:
            values["model_utility"] = task.utility(params)
        return Point(strength=strength, edit_seconds=seconds, **values, **predictions)  # type: ignore[arg-type]


def _judged(task: Task, name: str) -> Batch:
    rows = getattr(task, name)
    if name != "forget":
        rows = probe_batch(rows, task.judged_rows)
    return rows if task.pack is None else task.pack(rows)


@functools.partial(jax.jit, static_argnames="apply")
def _sums(apply: Callable, params: PyTree, reference: PyTree | None, batch: Batch) -> Array:
    """Loss, hits, KL(reference || params) and number of counted outputs, from one forward pass."""
    logits = apply(params, batch.inputs)
    counted = counted_outputs(batch, logits.shape[:-1])
    targets = jnp.asarray(batch.targets)
    loss = token_nll(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(loss.dtype)
    divergence = jnp.zeros_like(loss)
    if reference is not None:
        divergence = token_kl(apply(reference, batch.inputs), logits)
    rows = (loss, hits, divergence, jnp.ones_like(loss))
    return jnp.stack([jnp.sum(jnp.where(counted, row, 0)) for row in rows])


def _finite(ratios: np.ndarray) -> np.ndarray:
    # To a destroyed model a wrong answer can be infinitely likelier than a right one; the test
    # looks at ranks alone.
    return np.nan_to_num(ratios, nan=1e30, posinf=1e30)


def _fit(
    task: Task, grid: Grid, *, key: Array, say: Say
) -> dict[str, tuple[dict[float, Curvature], float]]:
    """K-FAC and, if it is wanted, EK-FAC at each temperature, with the seconds that one takes."""
    plain: dict[float, Curvature] = {}
    corrected: dict[float, Curvature] = {}
    seconds = np.zeros(2)
    chunks = list(batches(task.retain, task.chunk))
    for temperature in grid.temperatures:
        kinds = " and ".join(dict.fromkeys(("K-FAC", *grid.curvatures)))
        say(f"fitting {kinds} on the retain rows, temperature {temperature:g}")
        likelihood = Categorical(temperature)
        estimator = _kfac(task.apply, likelihood, task.select)
        plain[temperature], first = _timed(estimator, task.original, chunks, key=key)
        second = 0.0
        if "EK-FAC" in grid.curvatures:
            estimator = ekfac(task.apply, likelihood, plain[temperature])
            ekfac_key = jax.random.fold_in(key, 1)
            corrected[temperature], second = _timed(estimator, task.original, chunks, key=ekfac_key)
        seconds += np.array([first, first + second]) / len(grid.temperatures)
    return {
        "K-FADE (K-FAC)": (plain, float(seconds[0])),
        "K-FADE (EK-FAC)": (corrected, float(seconds[1])),
    }


def _timed(
    estimator: Estimator, params: PyTree, chunks: list[Batch], *, key: Array
) -> tuple[Curvature, float]:
    """A curvature, and the seconds its estimation takes once it is compiled."""
    jax.block_until_ready(estimate(estimator, params, chunks[:1], key=key))
    start = time.perf_counter()
    curvature = jax.block_until_ready(estimate(estimator, params, chunks, key=key))
    return curvature, time.perf_counter() - start


@functools.cache
def _kfac(apply: Callable, likelihood: Categorical, select: str | None) -> Estimator:
    """One estimator for each model and likelihood: a second use of it compiles nothing."""
    return kfac(apply, likelihood, select=select)


def kfade_on(task: Task, curvature: Curvature, damping: float) -> Callable:
    """K-FADE on a task's batches, to be called with `budget=` and `ascent=`."""
    forget = list(batches(task.forget, min(task.chunk, rows_of(task.forget))))
    retain = list(batches(probe_batch(task.retain, task.probe), min(task.chunk, task.probe)))
    return functools.partial(
        kfade, task.apply, task.original, curvature, forget, retain, damping=damping
    )


def _kfade_method(name: str, grid: Grid, seconds: float) -> Method:
    kind = "EK-FAC" if "EK" in name else "K-FAC"
    description = (
        f"Ascends the forget loss in the {kind} metric of the retain outputs, in one or a few "
        "steps whose length a line search on the true retain KL sets."
    )
    strength = "budget (true retain KL on the line search's rows, nats per output)"
    tried = {
        "temperature": grid.temperatures,
        "damping": grid.damping,
        "steps": grid.kfade_steps,
    }
    return Method(name, description, strength, tried, seconds)


def _kfade_curve(
    task: Task,
    grid: Grid,
    judge: Judge,
    name: str,
    curvature: Curvature,
    setting: dict[str, float],
) -> tuple[Curve, list[PyTree]]:
    run = kfade_on(task, curvature, setting["damping"])
    # Compiles, so that the seconds below are the edit's own.
    run(budget=grid.budgets[0], ascent=Ascent(1))
    points, models = [], []
    for budget in grid.budgets:
        start = time.perf_counter()
        edit, info = run(budget=budget, ascent=Ascent(int(setting["steps"])))
        params = jax.block_until_ready(apply_edit(task.original, edit))
        seconds = time.perf_counter() - start
        predictions = {
            "predicted_kl": float(info.predicted_kl[-1]),
            "true_kl": float(info.true_kl[-1]),
        }
        points.append(judge(params, budget, seconds, **predictions))
        models.append(params)
    return Curve(name, setting, tuple(points)), models


def _editors(task: Task, retained: Curvature, *, key: Array) -> dict[str, Editor]:
    estimator = _kfac(task.apply, Categorical(), task.select)
    target, rest = (
        estimate(
            estimator,
            task.original,
            map(answers_only, batches(rows, min(task.chunk, rows_of(rows)))),
            key=jax.random.fold_in(key, i),
        )
        for i, rows in ((2, task.forget), (3, task.retain))
    )
    return make_editors(task.apply, task.original, task.forget, target, rest, retained, task.layers)


def _scaled_curve(
    task: Task, judge: Judge, name: str, editor: Editor, scales: tuple[float, ...]
) -> tuple[Curve, list[PyTree]]:
    edit, seconds = editor.timed()
    models = [apply_edit(task.original, edit, scale) for scale in scales]
    points = [judge(m, scale, seconds) for m, scale in zip(models, scales, strict=True)]
    return Curve(name, {}, tuple(points)), models


def _trainers(task: Task, retained: Curvature, tempered: Curvature) -> dict[str, Trainer]:
    inputs = jax.tree.map(lambda x: x[:1], task.forget.inputs)
    found = intervene(task.apply, task.original, inputs)
    width = found.activations[task.hidden_site].shape[-1]
    projector = null_space(retained, threshold=NULL_SPACE)
    made = trainers(task.apply, task.hidden_site, width, found.outputs.shape[-1])
    sites = list(found.activations)
    earlier = [name for name in sites[: sites.index(task.hidden_site)] if name in retained.blocks]
    if earlier:
        model = (task.apply, task.hidden_site, width)
        made = made | {"KUDA": kuda_before(*model, retained, earlier)}
    return made | {
        "null-space GradDiff": projected_ascent(task.apply, projector),
        NATURAL: natural_npo(task.apply, tempered),
        SOFT_NATURAL: natural_npo(task.apply, tempered, beta=SOFT),
    }


def _trained_curves(
    task: Task,
    grid: Grid,
    judge: Judge,
    name: str,
    trainer: Trainer,
    rates: tuple[float, ...],
    key: Array,
) -> Iterator[tuple[Curve, list[PyTree]]]:
    forget = task.forget
    if trainer.prepare is not None:
        forget = trainer.prepare(forget, task.refusals)
    by_rate = ascend(
        trainer.method,
        task.original,
        forget,
        task.retain,
        learning_rates=rates,
        looks=grid.looks,
        batch_size=grid.batch_size,
        key=key,
    )
    for rate, found in zip(rates, by_rate, strict=True):
        points = tuple(judge(params, float(steps), seconds) for steps, seconds, params in found)
        yield Curve(name, {"learning rate": rate}, points), [params for *_, params in found]

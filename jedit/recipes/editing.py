"""One method at one point of its settings, on a model of a folder: what benchmarks share."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Factorize, choose_temperature
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.methods.row import ADAM, ByDraws, ByScale, BySteps, Material, Need, Pace, Row
from jedit.recipes.comparison.compare import (
    Fitted,
    fit_material,
    fit_seconds,
    material_of,
    searched,
)
from jedit.recipes.comparison.task import Grid, Task
from jedit.recipes.comparison.trajectories import destroyed, start_at
from jedit.recipes.factorizing import factorize_for
from jedit.recipes.fitting import rows_of
from jedit.recipes.named import check_methods
from jedit.recipes.progress import Say
from jedit.recipes.sweep import RETRAINED, UNTOUCHED, Found, Point, Record, Trial, sweep
from jedit.recipes.tofu.models import Start
from jedit.requests.unseen import spread, take
from jedit.training import TrainingMethod, run_method, unlearn

RATE, STEPS, BATCH, SCALE, BUDGET = "learning_rate", "steps", "batch_size", "scale", "budget"
DRAWS = "draws"  # of RULE
# What a method that trains calls its rate, where it is none of Adam's.
RATES = {Pace.PREDICTED_KL: "predicted_kl", Pace.STEP_LENGTH: "step_length"}
# What texts without questions give: no position of a fact, no refusals, no other
# answers, nothing to be asked.
OF_TEXTS = frozenset(Need) - {
    *(Need.SUBJECTS, Need.REFUSALS, Need.ALTERNATES, Need.DIALOGUE, Need.LATENTS),
}
FITTED = frozenset(
    {
        *(Need.CURVATURE, Need.CORRECTED, Need.TARGET_MOMENTS, Need.REST_MOMENTS),
        *(Need.ALTERNATES, Need.DIALOGUE),
    }
)
PROBE = 32  # retain rows on which a budget is kept


class Strength(NamedTuple):
    """How strongly each kind of method edits.

    Attributes:
        steps: number of steps of the methods that train.
        batch_size: number of forget rows, and of retain rows, of one step.
        learning_rate: Adam's; 1e-5 is open-unlearning's.
        predicted_kl: retain KL that one natural step is predicted to cost, nats per token.
        step_length: length of one step where steps have one (RepSelect).
        scale: what an edit in closed form is multiplied by, or the share that a pruning takes.
        budget: true retain KL that K-FADE may cost, nats per token.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-5
    predicted_kl: float = 1e-4
    step_length: float = 0.1
    scale: float = 1.0
    budget: float = 0.05

    def point(self, row: Row) -> Point:
        """Return the settings at which a row of the catalogue is run, with those of its own."""
        own = {k: v for k, v in row.settings.items() if isinstance(v, int | float)}
        if isinstance(row, BySteps):
            rate = RATES.get(row.pace, RATE)
            return own | {STEPS: self.steps, BATCH: self.batch_size, rate: getattr(self, rate)}
        if isinstance(row, ByScale):
            return own | {SCALE: self.scale}
        return own | {BUDGET: self.budget}


class Runs(NamedTuple):
    """What a benchmark runs.

    Attributes:
        names: names of the methods.
        strength: how strongly they edit.
        seeds: seeds of the curvature's labels and of the batches.
    """

    names: Sequence[str]
    strength: Strength
    seeds: Sequence[int]


# Of a point and a task's material, a method that trains: where a catalogue row has no setting for
# what a published grid varies.
Make = Callable[[Material, Point], TrainingMethod]


class Editor:
    """Makes the edited parameters of a task's model, by any method at any point and seed.

    What a method needs is estimated for a seed when it is first needed, at the one temperature that
    the model's outputs choose, and held until a method needs something else: curvatures are large.
    """

    def __init__(
        self,
        task: Task,
        has: frozenset[Need],
        *,
        say: Say,
        temperatures: tuple[float, ...] = (1.0,),
        optimizer: optax.GradientTransformation = ADAM,
        fitted_rows: int | None = None,
        factorize: Factorize = Factorize(),  # noqa: B008 - frozen
    ):
        """Take a task, of which no retrained model is looked at.

        Args:
            task: the model and its sets.
            has: what can be given to methods.
            say: a watcher, told of each stage.
            temperatures: of the curvatures; where there are several, the model's outputs choose.
            optimizer: what methods that train step by, with the rate in its state.
            fitted_rows: rows of each set that curvatures are estimated on, at equal distances;
                None: all.
            factorize: how the factors of curvatures are kept; "auto" comes to what each method
                takes of them.
        """
        self.task, self.has, self.say, self.temperatures = task, has, say, temperatures
        self.optimizer, self.fitted_rows, self.factorize = optimizer, fitted_rows, factorize
        self._seed: int | None = None
        self._fitted: dict[tuple[frozenset[Need], Factorize], Fitted] = {}
        self._temperature: float | None = None

    def __call__(self, row: Row, point: Point, seed: int, make: Make | None = None) -> PyTree:
        """Return the edited parameters; of a run that leaves the finite numbers, NaN.

        Raises:
            ValueError: what the method refuses, by its name; or the factors are not to hold what
                it takes of them, as `factorize_for` says it.

        Args:
            row: the method's row of the catalogue.
            point: its settings, as `Strength.point` names them.
            seed: seed of the curvature's labels and of the batches.
            make: makes the method in the row's stead; the row says what it needs.
        """
        self._wanted(row)  # its refusal names the method, and says what to do
        try:
            return self._edited(row, point, seed, make)
        except FloatingPointError:  # the rate or the step was too large
            return destroyed(self.task.original)
        except ValueError as error:  # such as a gradient of zero, which shows at the run alone
            raise ValueError(
                f"{row.name}: {error}; run the others without it (--methods)"
            ) from error

    def fit(self, row: Row, point: Point, seed: int) -> float:
        """Estimate what the row needs, where it is not held, before its edit is timed.

        Args:
            row: the method's row of the catalogue.
            point: its settings, as a call has them.
            seed: seed of the curvature's labels.

        Returns:
            The seconds that the estimation takes once it is compiled, also where it is held: a
            part of what the method costs. 0 of a method that needs none.
        """
        if not row.needs & FITTED:
            return 0.0
        self._material(row, point, seed, self._keys(seed)[0])
        return fit_seconds(row, self._fitted[self._wanted(row)])

    def _wanted(self, row: Row) -> tuple[frozenset[Need], Factorize]:
        """Return what is estimated for a row, and how the factors of it are kept.

        Raises:
            ValueError: they are not to hold what the method takes of them.
        """
        return row.needs & FITTED, factorize_for([row], self.factorize)

    def _keys(self, seed: int) -> tuple[Array, Array]:
        """Return the keys of the curvature and of the batches."""
        key = jax.random.fold_in(jax.random.key(seed), 2)
        return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def _edited(self, row: Row, point: Point, seed: int, make: Make | None) -> PyTree:
        task = self.task
        curvature_key, batches_key = self._keys(seed)
        material = self._material(row, point, seed, curvature_key)
        rate = RATES.get(row.pace, RATE) if isinstance(row, BySteps) else None
        # A rate is set in the optimizer's state.
        own = {k: v for k, v in point.items() if k in row.settings and k != rate}
        if isinstance(row, BySteps):
            method = row.of(material, **own) if make is None else make(material, point)
            return self._train(method, row, material, point, key=batches_key)
        if isinstance(row, ByDraws):
            given = (task.apply, task.original)
            edit, _ = row.of(material, **own)(*given, steps=int(point[DRAWS]), key=batches_key)
            return apply_edit(task.original, edit)
        if isinstance(row, ByScale):
            method, scale = row.scaled(material, point[SCALE], **own)
            edit, _ = run_method(method, task.apply, task.original, task.forget, task.retain)
            return apply_edit(task.original, edit, scale)
        method = row.of(material, **own)
        method = functools.partial(method, budget=point[BUDGET])
        edit, _ = run_method(method, task.apply, task.original, *searched(task))
        return apply_edit(task.original, edit)

    def _train(
        self,
        method: TrainingMethod,
        row: BySteps,
        material: Material,
        point: Point,
        *,
        key: Array,
    ) -> PyTree:
        task = self.task
        forget, retain = (
            jax.tree.map(jnp.asarray, rows) for rows in (row.forget_rows(material), task.retain)
        )
        params, _ = unlearn(
            method._replace(batch_size=int(point[BATCH])),
            task.apply,
            start_at(method, task.original, point[RATES.get(row.pace, RATE)]),
            forget,
            retain,
            steps=int(point[STEPS]),
            key=key,
        )
        return params

    def _material(self, row: Row, point: Point, seed: int, key: Array) -> Material:
        if seed != self._seed:
            self._seed, self._fitted = seed, {}
        needs, how = wanted = self._wanted(row)
        grid = Grid(
            methods=(row.name,),
            budgets=(),
            temperatures=(self._chosen(needs),),
            damping=(),
            kfade_steps=(),
            looks=(int(point.get(STEPS, 1)),),
            batch_size=1,
            kl_budget=0.0,
            factorize=how,
        )
        if needs and wanted not in self._fitted:
            self._fitted = {}  # before the others are made
            self._fitted = {wanted: self._fit(grid, row, key=key)}
        fitted = self._fitted[wanted] if needs else Fitted()
        material = material_of(self.task, grid, fitted)
        corrected = fitted.corrected.get(fitted.temperature)
        subjects = material.subjects if Need.SUBJECTS in self.has else None
        return dataclasses.replace(
            material, corrected=corrected, subjects=subjects, optimizer=self.optimizer
        )

    def _fit(self, grid: Grid, row: Row, *, key: Array) -> Fitted:
        """Estimate what a row needs, on some of the rows where that is asked for."""
        task, number = self.task, self.fitted_rows
        if number is None:
            return fit_material(task, grid, [row], key=key, say=self.say)
        some = task._replace(forget=fewer(task.forget, number), retain=fewer(task.retain, number))
        fitted = fit_material(some, grid, [row], key=key, say=self.say)
        # What is estimated on a part of a set counts for the whole of it where two sets are added.
        shares = {
            Need.TARGET_MOMENTS: rows_of(task.forget) / rows_of(some.forget),
            Need.REST_MOMENTS: rows_of(task.retain) / rows_of(some.retain),
        }
        moments = {
            need: dataclasses.replace(found, num_outputs=found.num_outputs * shares[need])
            for need, found in fitted.moments.items()
        }
        return fitted._replace(moments=moments)

    def _chosen(self, needs: frozenset[Need]) -> float:
        """Return the temperature of the curvatures, chosen when the first one is to be fitted."""
        if not needs & {Need.CURVATURE, Need.CORRECTED}:
            return 1.0
        if self._temperature is None and len(self.temperatures) == 1:
            (self._temperature,) = self.temperatures
        if self._temperature is None:
            task = self.task
            rows = next(iter(batches(task.retain, task.chunk)))
            among = self.temperatures
            self._temperature = choose_temperature(task.apply, task.original, rows, among=among)
        return self._temperature


def task_of(start: Start, forget: Batch, retain: Batch, refusals: Batch | None = None) -> Task:
    """Return the task of an edit that is judged by a benchmark of its own.

    Args:
        start: the model, and the retrained one, if there is one.
        forget: rows to be forgotten.
        retain: rows that curvature and edits see.
        refusals: the forget rows' questions with refusals, row by row, if there are any.
    """
    number = rows_of(retain)
    if number > PROBE:  # a budget is kept on the first rows, which are to stand for all
        first = spread(number, PROBE)
        rest = np.setdiff1d(np.arange(number), first)
        retain = take(retain, np.concatenate([first, rest]))
    return Task(
        apply=start.model.apply,
        original=start.params,
        retrained=start.retrained,
        forget=forget,
        retain=retain,
        heldout=retain,
        test=None,
        truth_ratio=None,
        select=start.select,
        chunk=start.model.chunk,
        probe=PROBE,
        hidden_site=start.hidden_site,
        layers=start.layers,
        refusals=refusals,
    )


def fewer(rows: Batch, number: int) -> Batch:
    """Return at most so many rows, at equal distances."""
    found = rows_of(rows)
    return rows if found <= number else take(rows, spread(found, number))


def run_methods(
    task: Task,
    has: frozenset[Need],
    runs: Runs,
    out: Path,
    about: Mapping[str, Any],
    *,
    evaluate: Callable[[PyTree], Found],
    say: Say,
) -> list[Record]:
    """Run methods by several seeds, each at its one point, beside the untouched model.

    Args:
        task: the model and its sets; where it has a retrained model, that is measured too.
        has: what the benchmark can give to methods, for `check_methods`.
        runs: the methods, how strongly they edit, and the seeds; the untouched model is measured
            once.
        out: folder of the records.
        about: what the runs are made of, as `sweep` takes it.
        evaluate: measures a model.
        say: a watcher, told of each run.

    Raises:
        ValueError: what `check_methods` and `sweep` refuse.
    """
    names, strength, seeds = runs
    rows = {row.name: row for row in check_methods(names, has, str(about["benchmark"]))}
    editor = Editor(task, has, say=say)
    references = {UNTOUCHED: task.original}
    if task.retrained is not None:
        references[RETRAINED] = task.retrained
    trials = [Trial(name, {}, seeds[0]) for name in references]
    trials += [
        Trial(row.name, strength.point(row), seed) for seed in seeds for row in rows.values()
    ]

    def edit(trial: Trial) -> PyTree:
        if trial.method in references:
            return references[trial.method]
        return editor(rows[trial.method], trial.point, trial.seed)

    return sweep(trials, out, about, edit=edit, evaluate=evaluate, say=say)

"""The steps of a run on an accelerator, timed, what compiles apart from what runs.

Each step is called once on as little as compiles the same programs: an epoch, a batch, or all of it
where no part would do. Then it is called again and timed until the device is done.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jedit.core.batch import Batch
from jedit.curvature import Curvature, Estimator, ekfac, kfac
from jedit.curvature.estimator import add_batch
from jedit.curvature.likelihoods import Categorical
from jedit.data import batches
from jedit.edits import apply_edit
from jedit.methods import Ascent
from jedit.recipes.comparison.compare import kfade_on
from jedit.recipes.comparison.judge import Judge
from jedit.recipes.comparison.task import Task
from jedit.recipes.fitting import Recipe, rows_of, train
from jedit.report import Point
from tests.bench.gpu_run.rates import (
    Flops,
    Rates,
    eigenvalue_flops,
    factor_flops,
    matrices_of,
    peak_gib,
)

BUDGET = 0.2  # nats an output: about where K-FADE's best points of TOFU lie

Found = TypeVar("Found")


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        name: what was done.
        first_seconds: of the first call, which compiles.
        seconds: of the step itself, nothing left to compile.
        rows: question-answer rows that it went through; None where that says nothing.
        tokens: of them, padding left out.
        peak_gib: the most memory of the device so far, what ran before included; None: not told.
        share: of the matmul rate in the model's dtype, what the step's floor of flops comes to.
        share_of_both: the same, with the statistics' flops counted at the rate of float32 at full
            precision, where they are not products of the model's narrower rows.
    """

    name: str
    first_seconds: float
    seconds: float
    rows: float | None = None
    tokens: float | None = None
    peak_gib: float | None = None
    share: float | None = None
    share_of_both: float | None = None


class Fitted(NamedTuple):
    """What fitting came to.

    Attributes:
        curvature: K-FAC's.
        steps: factors, their eigendecomposition, EK-FAC's eigenvalues.
        rates: around the factors.
        matrices: (d_in, d_out) of each block.
        positions: of a batch, padding included: all of them are computed.
        flops: by step, of a position.
    """

    curvature: Curvature
    steps: list[Step]
    rates: Rates
    matrices: list[tuple[int, int]]
    positions: int
    flops: dict[str, Flops]


def timed_training(
    apply: Callable, params: PyTree, sequences: Batch, recipe: Recipe, *, key: Array
) -> tuple[PyTree, Step]:
    """Train by the recipe.

    Args:
        apply: `apply(params, inputs) -> logits`.
        params: where to begin.
        sequences: packed rows, with `valid`.
        recipe: one number of epochs.
        key: of the order of the sequences.

    Returns:
        The params, and the step without its name; its `rows` are the passes over all of them.
    """
    first = timed(lambda: train(apply, params, sequences, recipe._replace(epochs=(1,)), key=key))[0]
    seconds, found = timed(lambda: train(apply, params, sequences, recipe, key=key))
    # An epoch is of whole batches, so that it is a little less than a pass.
    size = min(recipe.batch_size, rows_of(sequences))
    passes = max(recipe.epochs) * (rows_of(sequences) // size * size / rows_of(sequences))
    _, tokens = _counted([sequences])
    return found[-1].params, Step("", first, seconds, passes, tokens * passes, peak_gib())


def fit(
    task: Task, temperature: float, rates: Callable[[], Rates], *, is_narrow: bool, key: Array
) -> Fitted:
    """Fit K-FAC and EK-FAC on the rows that edits see, as `compare` does.

    Args:
        task: the model and the rows.
        temperature: of the likelihood.
        rates: measures the matmul rates, before and after each pass.
        is_narrow: whether the model computes in less than float32.
        key: of the labels.
    """
    chunks = list(batches(task.retain, task.chunk))
    assert task.select is not None
    matrices = matrices_of(task.apply, task.original, chunks[0].inputs, task.select)
    flops = {
        "factors": factor_flops(matrices, is_narrow=is_narrow),
        "eigenvalues": eigenvalue_flops(matrices),
    }
    likelihood, params = Categorical(temperature), task.original
    plain = kfac(task.apply, likelihood, select=task.select)
    state, factors, measured = _accumulate(plain, params, chunks, flops["factors"], rates, key=key)
    first = timed(lambda: plain.finalize(state))[0]
    seconds, curvature = timed(lambda: plain.finalize(state))
    decomposed = Step("eigendecomposition", first, seconds, peak_gib=peak_gib())
    del state
    corrected = ekfac(task.apply, likelihood, curvature)
    ekfac_key = jax.random.fold_in(key, 1)
    floor = flops["eigenvalues"]
    _, eigenvalues, _ = _accumulate(corrected, params, chunks, floor, rates, key=ekfac_key)
    return Fitted(
        curvature,
        [
            factors._replace(name="factors"),
            decomposed,
            eigenvalues._replace(name="eigenvalues (EK-FAC)"),
        ],
        measured,
        matrices,
        _num_positions(chunks[:1]),
        flops,
    )


def _accumulate(
    estimator: Estimator,
    params: PyTree,
    chunks: list[Batch],
    flops: Flops,
    rates: Callable[[], Rates],
    *,
    key: Array,
) -> tuple[Any, Step, Rates]:
    """The sums over all batches, the step without its name, and the rates around it."""

    def add_all(state: Any, given: list[Batch]) -> Any:
        for batch in given:
            state = add_batch(estimator.update, state, params, batch, key)  # type: ignore[arg-type]
        return state

    # Taken out at once: a name for the sums would keep them, and raise the peak.
    first = timed(lambda: add_all(estimator.init(params, chunks[0]), chunks[:1]))[0]
    # Traces the model, on the host: no part of a pass.
    zero = jax.block_until_ready(estimator.init(params, chunks[0]))
    before = rates()
    seconds, state = timed(lambda: add_all(zero, chunks))
    rate = before.between(rates())
    positions = _num_positions(chunks)
    at_peak = positions * flops.all / rate.peak
    at_both = positions * (flops.model / rate.peak + flops.statistics / rate.full)
    rows, tokens = _counted(chunks)
    shares = (at_peak / seconds, at_both / seconds)
    return state, Step("", first, seconds, rows, tokens, peak_gib(), *shares), rate


def edit_and_judge(
    task: Task, curvature: Curvature, damping: float
) -> tuple[list[Step], dict[str, Point]]:
    """K-FADE in one step, and what three models are worth.

    Returns:
        The steps; by "untouched", "retrained" and "edited", what `compare` measures.
    """
    run = kfade_on(task, curvature, damping)

    def edit():
        made, info = run(budget=BUDGET, ascent=Ascent(1))
        return apply_edit(task.original, made), info

    first = timed(edit)[0]
    seconds, (edited, info) = timed(edit)
    rows, tokens = _counted([task.forget])
    editing = Step("edit (K-FADE)", first, seconds, rows, tokens, peak_gib())

    def judged_first() -> tuple[Judge, Point]:
        judge = Judge(task, math.inf)
        return judge, judge(task.original, 0.0, 0.0)

    first, (judge, original) = timed(judged_first)
    retrained = judge(task.retrained, 0.0, 0.0)
    predictions = {name: float(getattr(info, name)[-1]) for name in ("predicted_kl", "true_kl")}
    evaluate, point = timed(lambda: judge(edited, BUDGET, seconds, **predictions))
    points = {"untouched": original, "retrained": retrained, "edited": point}
    return [editing, Step("evaluate", first, evaluate, peak_gib=peak_gib())], points


def timed(job: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds until the device is done, and what came of it."""
    begin = time.perf_counter()
    found = jax.block_until_ready(job())
    return time.perf_counter() - begin, found


def _counted(given: Iterable[Batch]) -> tuple[float, float]:
    """Rows and tokens of batches that are filled up with padding."""
    valid = [np.asarray(batch.valid) > 0 for batch in given]
    return float(sum(v.any(axis=1).sum() for v in valid)), float(sum(v.sum() for v in valid))


def _num_positions(given: Iterable[Batch]) -> int:
    return sum(np.asarray(batch.valid).size for batch in given)

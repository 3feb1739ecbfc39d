"""The comparison on a toy task: every number is there, and the same key gives it again."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.core.batch import Batch
from jedit.curvature import Factorize
from jedit.data import batches
from jedit.methods import CATALOGUE, ByBudget, ByScale, Pace, Reach
from jedit.objectives import Dialogue, Played
from jedit.recipes.by_itself import run_by_itself
from jedit.recipes.comparison import compare as compare_module
from jedit.recipes.comparison.compare import compare, fit_material
from jedit.recipes.comparison.judge import Judge
from jedit.recipes.comparison.task import MAIN, Grid, Task
from jedit.recipes.factorizing import RANK
from jedit.recipes.scenes import authors
from jedit.report import best_point
from jedit.requests import Unseen

GRID = Grid(
    budgets=(0.003, 0.03),
    temperatures=(4.0,),
    damping=(0.1,),
    kfade_steps=(1, 2),
    methods=MAIN,
    rates={Pace.PLAIN_ASCENT: (0.03,), Pace.UNBOUNDED: (0.01, 0.03)},
    looks=(2, 5),
    batch_size=8,
    kl_budget=0.05,
)
METHODS = list(MAIN)


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """What optax's Adam mixes, its counter and its decay rates, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def task():
    """A linear classifier of 8 features; its last class is what a retrained one never saw."""
    rng = np.random.default_rng(0)
    labels = np.arange(120, dtype=np.int32) % 4
    means = 2 * rng.normal(size=(4, 8))
    inputs = (means[labels] + rng.normal(size=(120, 8))).astype(np.float32)

    def apply(params, inputs):
        return inputs @ params["kernel"] + params["bias"][None]

    def rows(chosen):
        return Batch(inputs[chosen], labels[chosen])

    kernel = jnp.asarray(0.3 * means.T, jnp.float32)
    unseen = kernel.at[:, 3].set(0)
    bias = jnp.zeros(4, jnp.float32)
    retain = np.flatnonzero(labels < 3)
    return Task(
        apply=apply,
        original={"kernel": kernel, "bias": bias},
        retrained={"kernel": unseen, "bias": bias},
        forget=rows(np.flatnonzero(labels == 3)),
        retain=rows(retain[:50]),
        heldout=rows(retain[50:]),
        test=None,
        truth_ratio=lambda params: np.exp(np.asarray(params["kernel"])[:, 3]),
        select=None,
        chunk=16,
        probe=32,
        hidden_site="kernel",
        layers=("kernel",),
    )


@pytest.fixture(scope="module")
def judged_and_models(task):
    stages = []
    found = compare(task, GRID, key=jax.random.key(1), say=stages.append)
    assert len(stages) == 6  # one fit for each temperature, one line for each method
    return found


def test_every_method_has_a_curve_for_every_setting(judged_and_models):
    judged, _ = judged_and_models
    assert [m.name for m in judged.methods] == METHODS
    kfades = [METHODS[0], METHODS[0], METHODS[1], METHODS[1]]  # at two numbers of steps
    assert [c.method for c in judged.curves] == [
        *kfades,
        METHODS[2],
        *2 * METHODS[3:4],
        *2 * METHODS[4:],
    ]
    assert [p.strength for p in judged.curves[0].points] == [0.003, 0.03]
    assert [p.strength for p in judged.curves[-1].points] == [2, 5]
    assert [c.setting for c in judged.curves[-2:]] == [
        {"learning rate": 0.01},
        {"learning rate": 0.03},
    ]


def test_a_run_that_stops_by_itself(task):
    rng = np.random.default_rng(1)
    unseen = Batch(rng.normal(size=(30, 8)).astype(np.float32), np.full(30, 3, np.int32))
    run = run_by_itself(task, Unseen(unseen), Judge(task, math.inf), key=jax.random.key(2))
    assert run.point.forget_nll > metrics.nll(task.apply, task.original, task.forget) + 0.1
    for name, value in (
        ("forget_nll", metrics.nll(task.apply, run.params, task.forget)),
        ("heldout_kl", metrics.output_kl(task.apply, task.original, run.params, task.heldout)),
    ):
        np.testing.assert_allclose(getattr(run.point, name), value, rtol=1e-5)
    steps = int(run.point.strength)
    assert steps > 0
    assert run.sentence.startswith(f"{steps} steps in all: ")
    assert re.search(r"\d+ of 30 rows are done \(p = .*before and after a sixth", run.sentence)


def test_one_curvature_alone(task, judged_and_models):
    grid = GRID._replace(methods=METHODS[:1])
    stages = []
    judged, _ = compare(task, grid, key=jax.random.key(1), say=stages.append)
    assert [m.name for m in judged.methods] == METHODS[:1]
    assert not any("EK-FAC" in stage for stage in stages)
    for got, want in zip(judged.curves, judged_and_models[0].curves[:2], strict=True):
        for a, b in zip(got.points, want.points, strict=True):
            assert a._replace(edit_seconds=b.edit_seconds) == b


def test_every_method_of_the_demo_moves_the_model(task):
    # Before a linear classifier's inputs nothing can be trained, and fine-tuning forgets nothing.
    names = [n for n in authors.ALL.methods if n not in ("RMU", "KUDA", "fine-tune", "l1-sparse")]
    grid = GRID._replace(
        methods=names,
        budgets=(0.01,),
        kfade_steps=(1,),
        rates=dict.fromkeys(Pace, (0.03,)),
        scales=dict.fromkeys(Reach, (0.2, 1.0)) | {Reach.SHARE: (10.0, 40.0)},
        looks=(4,),
        draws=(2, 4),
    )
    others = [task.forget._replace(targets=task.forget.targets - i) for i in (3, 2)]

    def play(params, *, key):
        """Wrong labels are wanted of eight forget rows."""
        rows = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:8], 4, axis=0), task.forget)
        drawn = jax.random.categorical(key, task.apply(params, rows.inputs))
        rewards = np.asarray(drawn != rows.targets).astype(float).reshape(8, 4)
        return Played(rows._replace(targets=drawn), rewards)

    with_answers = task._replace(
        refusals=others[0],
        alternates=lambda: others[1],
        dialogue=lambda: Dialogue(others[0], task.retain, play, 0.03, 0.03),
    )
    judged, _ = compare(with_answers, grid, key=jax.random.key(1), say=lambda _: None)
    assert [m.name for m in judged.methods] == names
    for curve in judged.curves:
        for point in curve.points:
            assert point.heldout_kl > 0, curve.method
            assert point.forget_nll != judged.original.forget_nll, curve.method
        if isinstance(CATALOGUE[curve.method], ByScale):
            assert curve.points[0].forget_nll < curve.points[1].forget_nll, curve.method
        if curve.method == "RULE":
            assert [point.strength for point in curve.points] == [2, 4]
            assert curve.points[0].forget_nll != curve.points[1].forget_nll


def test_references_are_at_zero_from_themselves(judged_and_models):
    judged, _ = judged_and_models
    assert judged.original.heldout_kl == pytest.approx(0, abs=1e-7)
    assert judged.retrained.forget_kl == pytest.approx(0, abs=1e-7)
    assert judged.retrained.forget_quality == pytest.approx(1)
    assert judged.original.forget_kl > 0.1
    assert judged.original.test_nll is None


def test_a_budget_is_kept_in_truth_and_shown_beside_the_prediction(judged_and_models):
    judged, _ = judged_and_models
    for curve in judged.curves:
        for point in curve.points:
            has_budget = isinstance(CATALOGUE[curve.method], ByBudget)
            assert (point.true_kl is not None) == (point.predicted_kl is not None) == has_budget
            assert point.edit_seconds > 0
            if curve.method == "curvature pruning":  # in steps of whole directions
                assert point.true_kl <= point.strength * 1.001
            elif has_budget:
                assert 0.9 * point.strength < point.true_kl <= point.strength * 1.001
                # A linear classifier is nearly quadratic at so small a price.
                assert point.predicted_kl == pytest.approx(point.true_kl, rel=0.5)
    assert all(
        (m.fit_seconds > 0) == isinstance(CATALOGUE[m.name], ByBudget) for m in judged.methods
    )


def test_all_methods_forget_more_the_more_they_are_turned_up(judged_and_models):
    judged, _ = judged_and_models
    for curve in judged.curves:
        weak, strong = curve.points
        assert judged.original.forget_nll < weak.forget_nll < strong.forget_nll


def test_numbers_are_those_of_numpy(task, judged_and_models):
    judged, models = judged_and_models
    name = "K-FADE (K-FAC)"
    _, point = best_point(judged.curves, name, GRID.kl_budget)

    def log_p(params, batch):
        kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
        z = batch.inputs @ kernel + bias
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def kl(one, other, batch):
        p, q = log_p(one, batch), log_p(other, batch)
        return (np.exp(p) * (p - q)).sum(axis=1).mean()

    edited = models[name]
    on_forget = log_p(edited, task.forget)[np.arange(30), task.forget.targets]
    assert point.forget_nll == pytest.approx(-on_forget.mean(), rel=1e-4)
    assert point.heldout_kl == pytest.approx(kl(task.original, edited, task.heldout), rel=1e-3)
    assert point.forget_kl == pytest.approx(kl(task.retrained, edited, task.forget), rel=1e-4)
    # What one pass counts together is what the metrics count one by one.
    chunks = list(batches(task.forget, 7))
    assert point.forget_nll == pytest.approx(metrics.nll(task.apply, edited, chunks), rel=1e-5)
    assert point.forget_accuracy == metrics.accuracy(task.apply, edited, chunks)
    divergence = metrics.output_kl(task.apply, task.retrained, edited, chunks)
    assert point.forget_kl == pytest.approx(divergence, rel=1e-4)
    hits = log_p(edited, task.heldout).argmax(axis=1) == task.heldout.targets
    assert point.heldout_accuracy == pytest.approx(hits.mean())


def test_the_models_kept_are_the_best_points(judged_and_models):
    judged, models = judged_and_models
    assert judged.best == {m: best_point(judged.curves, m, GRID.kl_budget) for m in METHODS}
    assert set(models) == {name for name, pair in judged.best.items() if pair is not None}
    nearest = min(pair[1].forget_kl for pair in judged.best.values() if pair is not None)
    assert judged.best[judged.chosen][1].forget_kl == nearest
    assert judged.num_judged == (30, 40)


def test_the_same_key_gives_the_same_numbers_and_another_one_others(task, judged_and_models):
    def numbers(judged):
        points = [p for c in judged.curves for p in c.points]
        return np.array(
            [p._replace(edit_seconds=0, test_nll=0, test_accuracy=0)[:10] for p in points]
        )

    first = numbers(judged_and_models[0])
    again, _ = compare(task, GRID, key=jax.random.key(1), say=lambda _: None)
    np.testing.assert_array_equal(numbers(again), first)
    other, _ = compare(task, GRID, key=jax.random.key(2), say=lambda _: None)
    assert np.abs(numbers(other) - first).max() > 1e-6


@pytest.mark.usefixtures("unchecked_annotations")
def test_engrams_of_texts_are_of_the_answers_tokens(task):
    """A task's mask is enough: what goes to the engrams is measured where the loss is."""
    rng = np.random.default_rng(2)
    masks = [np.arange(5)[None] >= rng.integers(1, 5, size=(n, 1)) for n in (7, 20)]
    sets = [
        Batch(rng.normal(size=(*m.shape, 8)).astype(np.float32), m.astype(np.int32), m)
        for m in masks
    ]
    apply = lambda p, x: x @ p["kernel"] + p["bias"][None, None]  # noqa: E731
    texts = task._replace(apply=apply, forget=sets[0], retain=sets[1])
    rows_of_engrams = [CATALOGUE["engram"]]
    fitted = compare_module.fit_material(
        texts, GRID, rows_of_engrams, key=jax.random.key(0), say=lambda _: None
    )
    assert not fitted.plain, "an engram needs no curvature of the outputs"
    assert fitted.moment_seconds > 0
    material = compare_module.material_of(texts, GRID, fitted)
    moments = (material.target_moments, material.rest_moments)
    for curvature, rows, mask in zip(moments, sets, masks, strict=True):
        inputs = np.concatenate([rows.inputs[mask], np.ones((mask.sum(), 1))], axis=1)
        moment = curvature.factors[curvature.blocks["kernel"].input].matrix[0]
        np.testing.assert_allclose(moment, inputs.T @ inputs / len(inputs), atol=1e-5)


def test_curvatures_are_kept_as_the_grid_says(task):
    how = Factorize("cholesky")
    names = ("K-FADE (K-FAC)", "engram")
    grid = GRID._replace(methods=names, factorize=how)
    rows = [CATALOGUE[name] for name in names]
    fitted = fit_material(task, grid, rows, key=jax.random.key(0), say=lambda _: None)
    for curvature in (*fitted.plain.values(), *fitted.moments.values()):
        assert {factor.form for factor in curvature.factors.values()} == {"undecomposed"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"factorize": Factorize("cholesky")},
            r"^K-FADE \(EK-FAC\) takes leading eigenvectors .*cholesky",
        ),
        ({"methods": ("SAE-guided",)}, "^SAE-guided needs latents .*, which this task has not"),
        ({"methods": ("IdkDPO",)}, "^IdkDPO needs refusals, which this task has not"),
        ({"methods": ("AltPO",)}, "^AltPO needs alternate answers, which this task has not"),
        ({"methods": ("NOP",)}, "^unknown methods: NOP; there are K-FADE"),
        ({"methods": ("RMU",)}, "^RMU: the grid has no rates for"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(task, monkeypatch, given, said):
    never = lambda *_, **__: pytest.fail("work was begun")  # noqa: E731
    for name in ("Judge", "fit_material"):
        monkeypatch.setattr(compare_module, name, never)
    rates = {pace: (0.1,) for pace in Pace if "rates for" not in said}
    grid = GRID._replace(rates=rates, **given)
    with pytest.raises(ValueError, match=said):
        compare(task, grid, key=jax.random.key(0), say=lambda _: None)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("K-FADE (K-FAC)", Factorize("auto", eigh_dim=2)),
        ("K-FADE (EK-FAC)", Factorize("auto", RANK, eigh_dim=2)),
        ("curvature pruning", Factorize()),
    ],
)
def test_auto_comes_to_what_a_method_takes(task, name, kept, monkeypatch):
    """From Python too, where long axes would have no eigenvectors."""

    class EnoughError(Exception):
        pass

    def fitted(*given, **_):
        raise EnoughError(given[1].factorize)

    monkeypatch.setattr(compare_module, "fit_material", fitted)
    scales = {reach: (1.0,) for reach in Reach}
    grid = GRID._replace(methods=(name,), scales=scales, factorize=Factorize("auto", eigh_dim=2))
    with pytest.raises(EnoughError) as caught:
        compare(task, grid, key=jax.random.key(0), say=lambda _: None)
    assert caught.value.args == (kept,)

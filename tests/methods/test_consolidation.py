"""Consolidation, against dense algebra in NumPy: penalties, projections, noise, and boxes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jedit.core.batch import Batch
from jedit.curvature import diagonal, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import project_out
from jedit.methods import (
    EWC,
    Anchor,
    InTAct,
    Intervals,
    Stored,
    activation_intervals,
    anchored,
    ogd,
    refresh_learning,
    stored_gradients,
)
from jedit.methods.consolidation.intact import VARIANCE_ALONE, interval_bounds
from jedit.objectives import LearnNLL, with_retain
from jedit.training import LoopState, TrainingMethod, unlearn
from jedit.transforms.unlearn_first import unlearning_step
from tests.curvature.references import dense_fisher

SITES = ("w1", "w2")


@pytest.fixture(autouse=True, scope="module")
def _standard_promotion():
    """Optax mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def apply(params, inputs):
    x = jnp.tanh(inputs @ params["w0"] + params["b0"][None])
    x = jnp.maximum(x @ params["w1"] + params["b1"][None], 0)
    return x @ params["w2"]


def model(seed, dtype=None):
    rng = np.random.default_rng(seed)
    shapes = {"w0": (4, 5), "b0": (5,), "w1": (5, 6), "b1": (6,), "w2": (6, 3)}
    return {k: jnp.asarray(rng.normal(size=s) / 2, dtype) for k, s in shapes.items()}


def rows(seed, n=12, dtype=None):
    rng = np.random.default_rng(seed)
    mask = jnp.asarray((np.arange(n) % 4 > 0).astype(np.float32))
    inputs = jnp.asarray(rng.normal(size=(n, 4)), dtype)
    return Batch(inputs, jnp.asarray(rng.integers(3, size=n), jnp.int32), mask, None)


EXACT = {"fisher": "exact"}


# EWC


def dense_penalty(anchor_params, params, matrix):
    moved = np.asarray(ravel_pytree(params)[0] - ravel_pytree(anchor_params)[0], np.float64)
    return moved @ matrix @ moved / 2


@pytest.mark.float64
def test_ewc_is_the_dense_fishers_quadratic():
    """Two tasks: the diagonals add up, each taken at its own parameters."""
    first, second, now = model(0), model(1), model(2)
    estimator = diagonal(apply, Categorical(), **EXACT)
    sets = rows(3), rows(4)
    anchor = anchored(estimator, first, sets[0], key=jax.random.key(0))
    anchor = anchored(estimator, second, sets[1], key=jax.random.key(1), before=anchor)
    assert float(anchor.weight) == 2
    dense = [
        np.diag(np.diag(dense_fisher(apply, Categorical(), p, b)))
        for p, b in zip((first, second), sets, strict=True)
    ]
    penalty, aux = EWC()(apply, now, reference=anchor)
    assert penalty == pytest.approx(dense_penalty(second, now, sum(dense)), rel=1e-10)
    assert aux["ewc"] == penalty
    # And the paper's own: a penalty for every task, each around its own parameters.
    apart = tuple(
        anchored(estimator, p, b, key=jax.random.key(0))
        for p, b in zip((first, second), sets, strict=True)
    )
    expected = sum(dense_penalty(p, now, m) for p, m in zip((first, second), dense, strict=True))
    assert EWC()(apply, now, reference=apart)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.float64
def test_ewc_in_kronecker_factors_is_exact_where_they_are():
    """One linear-softmax layer and one row: F = A ⊗ G."""

    def linear(params, inputs):
        return inputs @ params["w"]

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    now = {"w": params["w"] + jnp.asarray(rng.normal(size=(4, 3)))}
    row = Batch(jnp.asarray(rng.normal(size=(1, 4))), jnp.asarray([1]), None, None)
    anchor = anchored(kfac(linear, Categorical(), **EXACT), params, row, key=jax.random.key(0))
    matrix = dense_fisher(linear, Categorical(), params, row)
    penalty, _ = EWC()(linear, now, reference=anchor)
    assert penalty == pytest.approx(dense_penalty(params, now, matrix), rel=1e-8)
    assert penalty > 0.01


def test_kronecker_sums_of_two_tasks_are_those_of_both_together(tolerance):
    """At the same parameters the second task's sums make the anchor of all rows."""
    params, both = model(0), rows(3, 24)
    estimator = kfac(apply, Categorical(), **EXACT)
    halves = [jax.tree.map(lambda x, s=s: x[s], both) for s in (np.s_[:12], np.s_[12:])]
    anchor = anchored(estimator, params, halves[0], key=jax.random.key(0))
    anchor = anchored(estimator, params, halves[1], key=jax.random.key(1), before=anchor)
    whole = estimate(estimator, params, both, key=jax.random.key(0))
    matrices = [{k: f.matrix for k, f in c.factors.items()} for c in (anchor.curvature, whole)]
    tolerance.check(*matrices)


def test_ewc_pulls_a_model_that_learns_on_back():
    params, task = model(0), rows(5)
    anchor = anchored(diagonal(apply, Categorical()), params, rows(3), key=jax.random.key(0))

    def moved(weight, steps=20):
        method = TrainingMethod(with_retain(LearnNLL(), EWC(), weight=weight), optax.sgd(0.2))
        start = LoopState(0, params, None, anchor)
        after, history = unlearn(method, apply, start, task, steps=steps, key=jax.random.key(1))
        assert history["ewc"][0] == 0
        return float(EWC()(apply, after, reference=anchor)[0])

    assert moved(10.0) < 0.5 * moved(0.0)
    with pytest.raises(TypeError, match="what `anchored` returns.*got dict"):
        EWC()(apply, params, reference=params)
    with pytest.raises(TypeError, match="what `anchored` returns.*got nothing"):
        EWC()(apply, params, reference=())


# OGD


def logit_gradients(params, batch):
    """Each row's gradient of its target's logit, flat, by NumPy out of a Jacobian."""
    flat, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jacrev(lambda x: apply(unravel(x), batch.inputs))(flat))
    picked = jacobian[np.arange(len(jacobian)), np.asarray(batch.targets)]
    return picked * np.asarray(batch.mask)[:, None]


def test_stored_gradients_span_those_of_the_logits(tolerance):
    params, task = model(0), rows(3, 8)
    stored = stored_gradients(apply, params, task, rank=10, samples=8, key=jax.random.key(0))
    basis = np.stack(
        [ravel_pytree(jax.tree.map(lambda x, i=i: x[i], stored.basis))[0] for i in range(10)]
    )
    expected = logit_gradients(params, task)
    inside = basis.T @ (basis @ expected.T)
    tolerance.check(inside, expected.T, "factorization")
    assert np.linalg.matrix_rank(basis, tol=1e-3) == 6  # two rows do not count
    tolerance.check(basis @ basis.T, np.diag(np.any(basis != 0, axis=1) * 1.0), "factorization")


def test_ogds_realised_change_is_orthogonal_to_every_stored_gradient():
    """Through Adam, momentum and weight decay, over two tasks; the logits stay to first order."""
    params = model(0)
    first, second = rows(3, 8), rows(4, 8)
    keys = jax.random.split(jax.random.key(0), 2)
    stored = stored_gradients(apply, params, first, rank=16, samples=8, key=keys[0])
    stored = stored_gradients(apply, params, second, rank=16, samples=8, key=keys[1], before=stored)
    method = ogd(LearnNLL(), optax.adamw(1e-3, weight_decay=0.1))
    after, _ = unlearn(
        method, apply, LoopState(0, params, None, stored), rows(5), steps=5, key=jax.random.key(2)
    )
    change = np.asarray(ravel_pytree(after)[0] - ravel_pytree(params)[0], np.float64)
    assert np.linalg.norm(change) > 1e-3
    for task in (first, second):
        gradients = logit_gradients(params, task).astype(np.float64)
        sizes = np.linalg.norm(gradients, axis=1) * np.linalg.norm(change)
        assert np.all(np.abs(gradients @ change) <= 1e-4 * sizes + 1e-12)


def test_a_full_store_forgets_the_oldest_and_another_rank_is_refused(tolerance):
    params, task = model(0), rows(3, 8)._replace(mask=None)
    key = jax.random.key(0)
    stored = stored_gradients(apply, params, task, rank=3, samples=8, key=key)
    chosen = np.asarray(jax.random.permutation(jax.random.clone(key), 8))
    batch = task._replace(mask=jnp.ones(8))
    last = logit_gradients(params, batch)[chosen][-3:]
    found = np.stack(
        [
            ravel_pytree(jax.tree.map(lambda x, i=i: x[i], stored.gradients.rows))[0]
            for i in range(3)
        ]
    )
    order = np.argsort(found[:, 0]), np.argsort(last[:, 0])
    tolerance.check(found[order[0]], last[order[1]])
    with pytest.raises(ValueError, match="rank must be that of before, 3; got 4"):
        stored_gradients(
            apply, params, task, rank=4, samples=8, key=jax.random.key(1), before=stored
        )
    start = LoopState(0, params, None, params)
    with pytest.raises(TypeError, match="what `stored_gradients` returns"):
        unlearn(ogd(LearnNLL(), optax.sgd(0.1)), apply, start, task, steps=1, key=jax.random.key(1))


# Refresh


def test_the_noise_has_the_covariance_that_is_said():
    """By Monte Carlo, within five standard errors of every entry of the dense covariance."""
    params, batch, rate, damping, draws = model(0), rows(3), 0.03, 0.5, 4000
    curvature = estimate(
        kfac(apply, Categorical(), select="^w2$", **EXACT), params, batch, key=jax.random.key(0)
    )
    zero = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def draw(key):
        taken = unlearning_step(curvature, zero, rate=rate, damping=damping, key=key)
        assert taken.keys() == params.keys()
        return taken["w2"].reshape(-1), taken["w0"]

    drawn, uncovered = jax.vmap(draw)(jax.random.split(jax.random.key(1), draws))
    assert not np.any(uncovered)
    a, g = (
        np.asarray(curvature.factors[f].matrix[0], np.float64)
        for f in (curvature.blocks["w2"].input, curvature.blocks["w2"].output)
    )
    fisher = np.kron(a, g)
    covariance = (
        2
        * rate
        * np.linalg.inv(
            fisher + damping * np.mean(np.linalg.eigvalsh(fisher)) * np.eye(len(fisher))
        )
    )
    drawn = np.asarray(drawn, np.float64)
    found = drawn.T @ drawn / draws
    error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / draws)
    assert np.all(np.abs(found - covariance) < 5 * error)
    # Far from a multiple of the identity, so that another power of F would be seen.
    assert np.linalg.cond(covariance) > 5


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_a_refresh_step_is_ascent_then_noise_then_descent(tolerance, inner_steps):
    """By dense algebra, the noise taken from the same function."""
    params, batch, rate, damping = model(0), rows(3), 0.02, 0.3
    anchor = anchored(diagonal(apply, Categorical()), params, rows(4), key=jax.random.key(0))
    method = refresh_learning(
        LearnNLL(), optax.sgd(0.1), rate=rate, inner_steps=inner_steps, damping=damping, seed=7
    )
    start = LoopState(0, params, None, anchor)
    after, _ = unlearn(method, apply, start, batch, steps=1, key=jax.random.key(1))

    def gradient(params):
        return jax.grad(lambda p: LearnNLL()(apply, p, batch)[0])(params)

    zero, here = jax.tree.map(jnp.zeros_like, params), params
    key = jax.random.fold_in(jax.random.key(7), 0)
    blocks = anchor.curvature.blocks
    for step in range(inner_steps):
        noise = unlearning_step(
            anchor.curvature, zero, rate=rate, damping=damping, key=jax.random.fold_in(key, step)
        )
        grads, there = gradient(here), {}
        for name, block in blocks.items():
            values = np.asarray(block.values[0], np.float64)
            values = values + damping * values.mean()
            parts = (
                {name: values}
                if block.weight.bias_path is None
                else {name: values[:-1], block.weight.bias_path: values[-1]}
            )
            for path, f in parts.items():
                there[path] = here[path] + rate * grads[path] / f + noise[path]
        here = there
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, here, gradient(here))
    tolerance.check(after, {k: expected[k] for k in after})


def test_refresh_needs_an_anchor_and_moves_what_is_not_covered(tolerance):
    params, batch = model(0), rows(3)
    method = refresh_learning(LearnNLL(), optax.sgd(0.1), rate=0.01)
    with pytest.raises(TypeError, match="what `anchored` returns"):
        unlearn(method, apply, params, batch, steps=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="needs params and the extra arguments"):
        method.optimizer.update(params, method.optimizer.init(params), params)
    # Two steps differ in their noise, and the same seed draws the same again.
    anchor = anchored(diagonal(apply, Categorical()), params, rows(4), key=jax.random.key(0))

    def run(seed):
        method = refresh_learning(LearnNLL(), optax.sgd(0.0), rate=0.01, seed=seed)
        start = LoopState(0, params, None, anchor)
        return unlearn(method, apply, start, batch, steps=2, key=jax.random.key(1))[0]

    tolerance.check(run(0), run(0))
    assert not np.allclose(run(0)["w1"], run(1)["w1"])


# InTAct


def test_interval_bounds_are_the_corners_of_the_box():
    rng = np.random.default_rng(0)
    move, low = rng.normal(size=(5, 3)), rng.normal(size=4)
    high = low + rng.random(4)
    corners = np.array([np.where(bits, high, low) for bits in itertools.product((0, 1), repeat=4)])
    for has_bias in (True, False):
        matrix = move if has_bias else move[:4]
        outputs = corners @ move[:4] + (move[4] if has_bias else 0)
        lo, hi = interval_bounds(*map(jnp.asarray, (matrix, low, high)), has_bias=has_bias)
        np.testing.assert_allclose(lo, outputs.min(axis=0), atol=1e-5)
        np.testing.assert_allclose(hi, outputs.max(axis=0), atol=1e-5)


def features(params, batch):
    """What enters w1 and w2, of rows that count, by NumPy."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    x = np.asarray(batch.inputs, np.float64)[np.asarray(batch.mask) > 0]
    first = np.tanh(x @ p["w0"] + p["b0"])
    return {"w1": first, "w2": np.maximum(first @ p["w1"] + p["b1"], 0)}


def terms_by_hand(params, before, boxes, batch):
    """V, H, D and C in NumPy, element by element."""
    now, then = features(params, batch), features(before, batch)
    variance = sum(np.mean(np.var(now[s], axis=0)) for s in SITES)
    held = 0
    for site, bias in (("w1", "b1"), ("w2", None)):
        low, high = boxes[site]
        d = np.asarray(params[site], np.float64) - np.asarray(before[site], np.float64)
        b = 0 if bias is None else np.asarray(params[bias] - before[bias], np.float64)
        best = np.array(
            [
                [
                    sum(min(w * x, w * y) for w, x, y in zip(column, low, high, strict=True)),
                    sum(max(w * x, w * y) for w, x, y in zip(column, low, high, strict=True)),
                ]
                for column in d.T
            ]
        )
        held += np.mean((best[:, 0] + b) ** 2) + np.mean((best[:, 1] + b) ** 2)
    low, high = boxes["w1"]
    is_inside = (now["w1"] >= low) & (now["w1"] <= high)
    drift = np.mean((now["w1"] - then["w1"])[is_inside] ** 2) if is_inside.any() else 0
    align = 0
    for site in SITES:
        low, high = boxes[site]
        least, most = now[site].min(axis=0), now[site].max(axis=0)
        apart = (least > high) | (most < low)
        gap = ((least + most) / 2 - (low + high) / 2)[apart]
        align += np.linalg.norm(gap) / (np.mean((high - low) / 2) + 1e-8)
    return {"variance": variance, "held": held, "drift": drift, "align": align}


@pytest.mark.parametrize("masked", [True, False])
def test_every_term_of_intact_by_hand(masked, tolerance):
    before, params, batch = model(0), model(1), rows(3, 10)
    batch = batch if masked else batch._replace(mask=jnp.ones(10))
    intervals = activation_intervals(apply, before, rows(4, 20), SITES)
    # Some features of the second site are out of their box, so that all terms are there.
    lower = {**intervals.lower, "w2": intervals.lower["w2"].at[:2].set(7.0)}
    upper = {**intervals.upper, "w2": intervals.upper["w2"].at[:2].set(8.0)}
    intervals = Intervals(before, lower, upper)
    boxes = {s: (np.asarray(lower[s], np.float64), np.asarray(upper[s], np.float64)) for s in SITES}
    expected = terms_by_hand(params, before, boxes, batch)
    loss, aux = jax.jit(lambda p, r: InTAct(SITES)(apply, p, batch, None, r))(params, intervals)
    tolerance.check({k: aux[k] for k in expected}, {k: np.asarray(v) for k, v in expected.items()})
    assert all(v > 0 for v in expected.values())
    assert float(loss) == pytest.approx(
        0.01 * expected["variance"] + expected["held"] + expected["drift"] + expected["align"],
        rel=1e-4,
    )
    weights = {"variance_weight": 0.5, "held_weight": 2.0, "drift_weight": 3.0, "align_weight": 0.7}
    other = InTAct(SITES, **weights)(apply, params, batch, None, intervals)[0]
    assert float(other) == pytest.approx(
        sum(expected[k.removesuffix("_weight")] * w for k, w in weights.items()), rel=1e-4
    )


def test_an_unheld_layer_is_free_and_gradients_are_finite_at_the_start():
    params, batch = model(0), rows(3)
    intervals = activation_intervals(apply, params, batch, SITES, share=0.0)
    turned = {**params, "w2": params["w2"] + 1}
    free = InTAct(SITES, unheld=("w2",))(apply, turned, batch, None, intervals)[1]
    assert free["held"] == 0
    assert InTAct(SITES)(apply, turned, batch, None, intervals)[1]["held"] > 0
    gradient = jax.grad(lambda p: InTAct(SITES)(apply, p, batch, None, intervals)[0])(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    # Without intervals, as in a first task, only the variance may be asked for.
    alone = InTAct(SITES, **VARIANCE_ALONE)
    assert set(alone(apply, params, batch, None, params)[1]) == {"variance"}
    with pytest.raises(TypeError, match="what `activation_intervals` returns.*got dict"):
        InTAct(SITES)(apply, params, batch, None, params)


def test_intervals_are_percentiles_and_only_grow():
    params, batch = model(0), rows(3, 60)
    values = np.sort(features(params, batch)["w1"], axis=0)  # 45 rows that count
    found = activation_intervals(apply, params, batch, SITES, share=0.1)
    np.testing.assert_allclose(found.lower["w1"], values[4], atol=1e-5)
    np.testing.assert_allclose(found.upper["w1"], values[-5], atol=1e-5)
    other = activation_intervals(apply, params, rows(4, 60), SITES, share=0.1)
    both = activation_intervals(apply, params, rows(4, 60), SITES, share=0.1, before=found)
    for site in SITES:
        assert np.array_equal(both.lower[site], np.minimum(found.lower[site], other.lower[site]))
        assert np.array_equal(both.upper[site], np.maximum(found.upper[site], other.upper[site]))
    with pytest.raises(ValueError, match="'b0' must be a dense or convolutional site"):
        activation_intervals(apply, params, batch, ("b0",))
    with pytest.raises(ValueError, match="unheld among them; got unheld=\\['w0'\\]"):
        InTAct(SITES, unheld=("w0",))
    with pytest.raises(ValueError, match="share must"):
        activation_intervals(apply, params, batch, SITES, share=0.6)


# All of them


def kept(name, params):
    keys = jax.random.split(jax.random.key(0), 2)
    if name == "intact":
        return activation_intervals(apply, params, rows(4), SITES)
    if name == "ogd":
        return stored_gradients(apply, params, rows(4), rank=4, samples=4, key=keys[0])
    estimator = (kfac if name == "ewc" else diagonal)(apply, Categorical())
    return anchored(estimator, params, rows(4), key=keys[1])


SGD = optax.sgd(0.05, momentum=0.9)
MADE = {
    "ewc": TrainingMethod(with_retain(LearnNLL(), EWC(), weight=3.0), SGD),
    "ogd": ogd(LearnNLL(), SGD),
    "intact": TrainingMethod(with_retain(LearnNLL(), InTAct(SITES)), SGD),
    "refresh": refresh_learning(LearnNLL(), SGD, rate=1e-4),
}


@pytest.mark.parametrize("name", MADE)
def test_a_learner_keeps_the_promises_of_all_methods(name):
    """Traced once for all tasks, in bfloat16 too; what does not count may hold anything."""
    num_traces = 0

    def counting(params, inputs):
        nonlocal num_traces
        num_traces += 1
        return apply(params, inputs)

    def run(params, reference, batch):
        start = LoopState(0, params, None, reference)
        given = {"steps": 3, "key": jax.random.key(2)}
        return unlearn(MADE[name], counting, start, batch, **given)[0]

    params, batch = model(0), rows(3)
    first = run(params, kept(name, params), batch)
    traced = num_traces
    assert not np.array_equal(first["w1"], params["w1"])
    run(model(1), kept(name, model(1)), rows(5))
    assert num_traces == traced, "it was traced again for another task"
    garbage = jnp.where(batch.mask[:, None] > 0, batch.inputs, 77.0)
    targets = jnp.where(batch.mask > 0, batch.targets, -100)
    other = run(params, kept(name, params), batch._replace(inputs=garbage, targets=targets))
    jax.tree.map(np.testing.assert_array_equal, first, other)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    small = rows(3, dtype=jnp.bfloat16)
    after = run(narrow, jax.tree.map(jnp.asarray, kept(name, narrow)), small)
    assert all(after[k].dtype == jnp.bfloat16 for k in after)
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in after.values())
    assert isinstance(kept(name, params), Anchor | Stored | Intervals)


def test_rows_of_zeros_in_a_store_change_nothing(tolerance):
    stored = stored_gradients(apply, model(0), rows(3), rank=9, samples=2, key=jax.random.key(0))
    tolerance.check(
        project_out(stored.basis, model(1), scope="global"),
        project_out(jax.tree.map(lambda x: x[:2], stored.basis), model(1), scope="global"),
    )

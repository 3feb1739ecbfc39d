"""K-FADE against refits, against plain ascent, and against its own promises."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from jedit.core.batch import Batch
from jedit.curvature import estimate, estimate_in_groups, kfac, quadratic_form, solve
from jedit.curvature.likelihoods import Categorical, Gaussian
from jedit.edits import apply_edit
from jedit.methods import Ascent, kfade
from jedit.objectives import GA


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


@pytest.fixture
def regression(key):
    """Least squares with two outputs, solved on all rows; the first 5 are to be forgotten."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 2))
    homogeneous = np.concatenate([x, np.ones((40, 1))], axis=1)
    whole = np.linalg.lstsq(homogeneous, y, rcond=None)[0]
    refit = np.linalg.lstsq(homogeneous[5:], y[5:], rcond=None)[0]
    params = {"w": jnp.asarray(whole[:3]), "b": jnp.asarray(whole[3])}
    forget = Batch(jnp.asarray(x[:5]), jnp.asarray(y[:5]))
    retain = Batch(jnp.asarray(x[5:]), jnp.asarray(y[5:]))
    estimator = kfac(linear, Gaussian(), fisher="exact")
    curvature = estimate(estimator, params, [retain], key=key)
    return params, forget, retain, curvature, refit


@pytest.fixture
def classifier(key):
    rng = np.random.default_rng(1)
    params = {"w": _normal(rng, 4, 6), "b": _normal(rng, 6), "v": _normal(rng, 6, 3)}
    forget = Batch(_normal(rng, 8, 4), jnp.asarray(rng.integers(0, 3, 8)))
    retain = Batch(_normal(rng, 64, 4), jnp.asarray(rng.integers(0, 3, 64)))
    estimator = kfac(network, Categorical(), fisher="exact")
    return params, forget, retain, estimate(estimator, params, [retain], key=key)


def test_one_newton_step_on_least_squares_is_the_refit_without_the_rows(regression, tolerance):
    params, forget, retain, curvature, refit = regression
    edit, _ = kfade(
        linear,
        params,
        curvature,
        forget,
        retain,
        damping=0.0,
        ascent=Ascent(1, step_size=5 / 35, objective=_gaussian_ga, likelihood=Gaussian()),
    )
    edited = apply_edit(params, edit)
    tolerance.check(edited, {"w": refit[:3], "b": refit[3]}, "factorization")


def _gaussian_ga(apply, params, forget, retain, reference):
    del retain, reference
    loss = jnp.mean(Gaussian().nll(apply(params, forget.inputs), forget.targets))
    return -loss, {}


def test_where_the_outputs_are_linear_the_predicted_kl_is_the_true_one(regression):
    params, forget, retain, curvature, _ = regression
    ascent = Ascent(3, objective=_gaussian_ga, likelihood=Gaussian())
    _, info = kfade(linear, params, curvature, forget, retain, budget=0.3, ascent=ascent)
    np.testing.assert_allclose(info.predicted_kl, info.true_kl, rtol=1e-6)
    np.testing.assert_allclose(info.curvature_kl, info.true_kl, rtol=1e-6)


def test_the_budget_is_kept_in_truth_and_is_used_up(classifier):
    params, forget, retain, curvature = classifier
    edit, info = kfade(network, params, curvature, forget, retain, budget=0.05, ascent=Ascent(3))
    logits = [network(p, retain.inputs) for p in (params, apply_edit(params, edit))]
    true = float(jnp.mean(Categorical().kl(*logits)))
    np.testing.assert_allclose(info.true_kl[-1], true, rtol=1e-6)
    np.testing.assert_allclose(info.true_kl, 0.05 * np.array([1, 4, 9]) / 9, rtol=0.012)
    assert info.within_budget.all()
    assert (info.true_kl <= 0.05 * np.array([1, 4, 9]) / 9).all()


def test_the_first_step_is_the_largest_within_the_budget(classifier):
    params, forget, retain, curvature = classifier
    _, info = kfade(network, params, curvature, forget, retain, budget=0.05, ascent=Ascent(1))
    gradient = jax.grad(lambda p: GA()(network, p, forget)[0])(params)
    move = solve(curvature, gradient, damping=1e-2)
    base = network(params, retain.inputs)

    def excess(alpha):
        moved = jax.tree.map(lambda p, d: p - alpha * d, params, move)
        return float(jnp.mean(Categorical().kl(base, network(moved, retain.inputs)))) - 0.05

    root = brentq(excess, 1e-6, 100.0)
    np.testing.assert_allclose(info.step_size[0], root, rtol=0.01)


def test_large_damping_is_plain_ascent(classifier, tolerance):
    params, forget, retain, curvature = classifier
    edit, _ = kfade(
        network, params, curvature, forget, retain, damping=1e12, ascent=Ascent(1, step_size=1e10)
    )
    gradient = jax.grad(lambda p: -GA()(network, p, forget)[0])(params)
    for path in ("v", "w"):  # one block each: damping is relative to the block
        x, y = (np.asarray(t[path], np.float64) for t in (edit.blocks, gradient))
        tolerance.check(x / np.linalg.norm(x), y / np.linalg.norm(y), "factorization")


def test_an_edit_forgets_more_than_ascent_at_the_same_retain_kl(classifier):
    params, forget, retain, curvature = classifier
    reached = {}
    for name, damping in (("metric", 1e-2), ("ascent", 1e9)):
        options = {"budget": 0.02, "damping": damping}
        edit, _ = kfade(network, params, curvature, forget, retain, **options)
        logits = network(apply_edit(params, edit), forget.inputs)
        reached[name] = float(jnp.mean(Categorical().nll(logits, forget.targets)))
    assert reached["metric"] > reached["ascent"]


def test_only_covered_parameters_move(classifier, key):
    params, forget, retain, _ = classifier
    curvature = estimate(kfac(network, Categorical(), select="v"), params, [retain], key=key)
    edit, _ = kfade(network, params, curvature, forget, retain, budget=0.05)
    edited = apply_edit(params, edit)
    assert np.array_equal(edited["w"], params["w"])
    assert np.array_equal(edited["b"], params["b"])
    assert not np.array_equal(edited["v"], params["v"])


def test_info_reports_the_gradient_it_used(classifier):
    params, forget, retain, curvature = classifier
    _, info = kfade(network, params, curvature, forget, retain, ascent=Ascent(1, step_size=1e-3))
    gradient = jax.grad(lambda p: -GA()(network, p, forget)[0])(params)
    retained = jax.grad(lambda p: -GA()(network, p, retain)[0])(params)
    g, r = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (gradient, retained))
    np.testing.assert_allclose(info.gradient_norm[0], np.linalg.norm(g), rtol=1e-6)
    cosine = g @ r / np.linalg.norm(g) / np.linalg.norm(r)
    np.testing.assert_allclose(info.retain_cosine[0], cosine, rtol=1e-6)
    move = jax.tree.map(lambda x: 1e-3 * x, solve(curvature, gradient, damping=1e-2))
    expected = 0.5 * float(quadratic_form(curvature, move))
    np.testing.assert_allclose(info.curvature_kl[0], expected, rtol=1e-6)


@pytest.mark.float64  # the line search takes the same path only while rounding does not sway it
def test_batches_of_one_shape_are_as_one(classifier):
    params, forget, retain, curvature = classifier
    halves = [jax.tree.map(lambda x, s=s: x[s], retain) for s in (slice(0, 32), slice(32, 64))]
    parts = [jax.tree.map(lambda x, s=s: x[s], forget) for s in (slice(0, 4), slice(4, 8))]
    whole, _ = kfade(network, params, curvature, forget, retain, budget=0.05, ascent=Ascent(2))
    split, _ = kfade(network, params, curvature, parts, halves, budget=0.05, ascent=Ascent(2))
    for path, block in whole.blocks.items():
        np.testing.assert_allclose(split.blocks[path], block, rtol=1e-6)


def test_a_function_refits_the_curvature_before_each_step_but_the_first(classifier, key, tolerance):
    params, forget, retain, curvature = classifier
    estimator, seen = kfac(network, Categorical(), fisher="exact"), []

    def refit(current):
        seen.append(current)
        return estimate(estimator, current, [retain], key=key)

    given = (network, params, curvature, forget, retain)
    _, info = kfade(*given, budget=0.05, ascent=Ascent(3, refit=refit))
    assert len(seen) == 2
    for at in seen:  # on the way, by K-FADE's own steps, each from where the last has led
        assert not np.array_equal(at["v"], params["v"])
    assert not np.array_equal(seen[0]["v"], seen[1]["v"])
    assert info.within_budget.all()
    # The second step is the natural one in the metric fitted where the first has led.
    first, _ = kfade(*given, ascent=Ascent(1, step_size=1e-2))
    there = apply_edit(params, first)
    gradient = jax.grad(lambda p: GA()(network, p, forget)[0])(there)
    move = solve(refit(there), gradient, damping=1e-2)
    found, _ = kfade(*given, ascent=Ascent(2, step_size=1e-2, refit=refit))
    for path, block in found.blocks.items():
        expected = first.blocks[path] - 1e-2 * move[path]
        tolerance.check(block, expected, "factorization")


def test_an_edit_is_reapplied_to_a_model_trained_further(classifier):
    params, forget, retain, curvature = classifier
    edit, _ = kfade(network, params, curvature, forget, retain, budget=0.1)
    later = jax.tree.map(lambda p: p * 1.01, params)
    reapplied = apply_edit(later, edit)
    for path in params:
        expected = np.asarray(later[path]) + np.asarray(edit.blocks[path])
        np.testing.assert_allclose(reapplied[path], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of budget"),
        ({"budget": 0.1, "ascent": Ascent(step_size=1.0)}, "exactly one of budget"),
        ({"budget": -1.0}, "must be positive"),
    ],
)
def test_contradictory_arguments_are_named(classifier, options, message):
    params, forget, retain, curvature = classifier
    with pytest.raises(ValueError, match=message):
        kfade(network, params, curvature, forget, retain, **options)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Ascent(0)


def test_a_curvature_in_parts_is_the_whole_one_taken_apart(classifier, key):
    """The same edit, with no more than one part of the curvature there at a time."""
    params, forget, retain, whole = classifier
    estimator = kfac(network, Categorical(), fisher="exact")
    ascent = Ascent(1)
    edit, info = kfade(network, params, whole, forget, retain, budget=0.05, ascent=ascent)
    alive, most = [], 0

    def parts():
        nonlocal most
        for part in estimate_in_groups(estimator, params, [retain], key=key, group_bytes=1):
            alive.append(weakref.ref(next(iter(part.factors.values())).matrix))
            most = max(most, sum(reference() is not None for reference in alive))
            yield part
            del part

    given = (network, params, parts(), forget, retain)
    found, told = kfade(*given, budget=0.05, ascent=ascent)
    assert len(alive) == 2
    assert most == 1
    assert list(found.blocks) == list(edit.blocks)
    for path, delta in edit.blocks.items():
        np.testing.assert_allclose(found.blocks[path], delta, rtol=2e-2, atol=1e-8)
        cosine = jnp.vdot(found.blocks[path], delta) ** 2
        assert cosine == pytest.approx(jnp.vdot(delta, delta) * jnp.vdot(*[found.blocks[path]] * 2))
    assert told.true_kl == pytest.approx(0.05, rel=0.011)
    for field in ("objective", "gradient_norm"):
        np.testing.assert_allclose(getattr(told, field), getattr(info, field), rtol=1e-6)
    for field in ("curvature_kl", "predicted_kl"):
        np.testing.assert_allclose(getattr(told, field), getattr(info, field), rtol=2e-2)
    with pytest.raises(ValueError, match="one step, but the ascent has 4"):
        kfade(network, params, [whole], forget, retain, budget=0.05)
    with pytest.raises(ValueError, match="two parts of the curvature cover b"):
        kfade(network, params, [whole, whole], forget, retain, budget=0.05, ascent=ascent)

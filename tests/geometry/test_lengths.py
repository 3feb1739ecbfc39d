"""What squares gradients, steps or states in float32 gives the same at any length of theirs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import diagonal, estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, cast_report, edit_norms
from jedit.geometry import null_space, scale_to_kl_budget
from jedit.metrics import gradient_norm_scores
from jedit.objectives import RepresentationDeviation
from jedit.transforms import clip_by_curvature_norm, retain_neutral_surrogate

LENGTHS = [1e-24, 1e-19, 1e19, 1e24]


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Python's numbers meet float32 here, as in users' programs."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def linear(params, x):
    return x @ params["w"]


def weak(factor, params, x):
    return jnp.float32(factor) * linear(params, x)


def step_of(factor):
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(4, 3)) * factor, jnp.float32)}


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    rows = Batch(jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray([0, 1, 2, 0, 1, 2]))
    estimator = diagonal(linear, Categorical())
    return params, rows, estimate(estimator, params, [rows], key=jax.random.key(0))


@pytest.mark.parametrize("length", LENGTHS)
def test_an_update_is_clipped_to_its_kl(scene, length):
    params, _, curvature = scene
    transform = clip_by_curvature_norm(curvature, 1e-3)
    updates, _ = transform.update(step_of(length), transform.init(params))
    if length < 1:
        np.testing.assert_array_equal(updates["w"], step_of(length)["w"])
        return
    assert 0.5 * float(quadratic_form(curvature, updates)) == pytest.approx(1e-3, rel=1e-4)
    found, expected = (np.asarray(x["w"]) / np.max(np.abs(x["w"])) for x in (updates, step_of(1)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_is_scaled_to_its_kl(scene, length):
    params, rows, _ = scene
    step = step_of(length)
    scaled, info = scale_to_kl_budget(
        linear, params, step, rows, budget=0.01, likelihood=Categorical()
    )
    assert info.true_kl == pytest.approx(0.01, rel=0.02)
    np.testing.assert_allclose(scaled["w"], info.scale * np.asarray(step["w"], float), rtol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_surrogate_pushes_by_its_gradients_length(scene, length):
    params, _, _ = scene
    transform = retain_neutral_surrogate(0.1, outer="push")

    def pushed(factor):
        def gradient(params):
            return jax.tree.map(lambda p: jnp.cos(p) * jnp.float32(factor), params)

        retain = jax.tree.map(jnp.sin, params)
        extras = {"forget_grads": step_of(1), "grad_fn": gradient}
        found, _ = transform.update(retain, transform.init(params), params, **extras)
        return np.asarray(found["w"], np.float64)

    np.testing.assert_allclose(pushed(length) / length, pushed(1), atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_norms_of_edits_are_numbers(scene, length):
    params, _, _ = scene
    edit = Edit(step_of(length))
    expected = np.linalg.norm(np.asarray(edit.blocks["w"], np.float64))
    assert float(edit_norms(edit)["w"]) == pytest.approx(expected, rel=1e-5)
    assert 0 <= float(cast_report(params, edit)["w"].rounded_away) <= 1 + 1e-5


def test_scores_and_cosines_of_weak_models(scene):
    params, rows, _ = scene
    scores = [gradient_norm_scores(partial(weak, f), params, rows) for f in (1e-3, 1e-22)]
    np.testing.assert_allclose(scores[1] * 1e19, scores[0], rtol=2e-2)

    def cosine(factor):
        objective = RepresentationDeviation(lambda _, p, x: weak(factor, p, x), tilt=0.0)
        reference = jax.tree.map(jnp.cos, params)
        return float(objective(linear, params, rows, None, reference)[0])

    assert cosine(1e-22) == pytest.approx(cosine(1.0), abs=1e-5)


def test_the_leakage_of_weak_inputs(scene):
    params, rows, _ = scene
    found = []
    for factor in (1, 1e-12):
        weaker = rows._replace(inputs=rows.inputs * jnp.float32(factor))
        curvature = estimate(kfac(linear, Categorical()), params, [weaker], key=jax.random.key(0))
        found.append(float(null_space(curvature, threshold=0.3).report()["w"].leakage[0]))
    assert found[1] == pytest.approx(found[0], abs=1e-4)

"""Curvature transforms against `solve` and `quadratic_form`, alone and in a training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, quadratic_form, solve
from jedit.curvature.likelihoods import Categorical
from jedit.transforms import clip_by_curvature_norm, refresh_curvature, scale_by_curvature


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's own Adam mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"] + params["c"][None]


@pytest.fixture
def scene(key):
    rng = np.random.default_rng(2)
    shapes = {"w": (4, 6), "b": (6,), "v": (6, 3), "c": (3,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(32, 4)))
    curvature = estimate(kfac(network, Categorical(), select="w|b"), params, [Batch(x)], key=key)
    updates = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    return params, updates, curvature, x


def _loss(params, x):
    return -jnp.mean(jax.nn.log_softmax(network(params, x))[:, 0])


@pytest.mark.parametrize(("damping", "absolute"), [(0.3, False), (0.02, True)])
@pytest.mark.parametrize("uncovered", ["zero", "identity"])
def test_scaling_is_a_solve(scene, damping, absolute, uncovered, tolerance):
    params, updates, curvature, _ = scene
    options = {"damping": damping, "absolute": absolute, "uncovered": uncovered}
    transform = scale_by_curvature(curvature, **options)
    scaled, _ = jax.jit(transform.update)(updates, transform.init(params), params)
    expected = solve(curvature, updates, **options)
    tolerance.check(scaled, expected, "factorization")


def test_a_schedule_of_the_damping_is_followed(scene, tolerance):
    params, updates, curvature, _ = scene
    dampings = jnp.asarray([1.0, 0.1, 0.01])
    scheduled = optax.inject_hyperparams(scale_by_curvature)
    transform = scheduled(curvature, damping=lambda step: dampings[step])
    state = transform.init(params)
    for damping in dampings:
        scaled, state = jax.jit(transform.update)(updates, state, params)
        tolerance.check(scaled, solve(curvature, updates, damping=damping), "factorization")


def test_uncovered_parameters_stay_frozen_to_the_bit(scene):
    params, _, curvature, x = scene
    optimizer = optax.chain(scale_by_curvature(curvature), optax.sgd(1e-2, momentum=0.9))
    state, moved = optimizer.init(params), params
    step = jax.jit(lambda p, s: optimizer.update(jax.grad(_loss)(p, x), s, p))
    for _ in range(100):
        updates, state = step(moved, state)
        moved = optax.apply_updates(moved, updates)
    assert np.array_equal(moved["v"], params["v"])
    assert np.array_equal(moved["c"], params["c"])
    assert _loss(moved, x) < _loss(params, x)


@pytest.mark.parametrize("predicted_kl", [1e-3, 1e6])
def test_clipping_bounds_the_predicted_kl_of_the_realised_change(scene, predicted_kl, tolerance):
    params, _, curvature, x = scene
    optimizer = optax.chain(
        optax.adamw(0.3, weight_decay=0.1), clip_by_curvature_norm(curvature, predicted_kl)
    )
    state, moved = optimizer.init(params), params
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(jax.grad(_loss)(moved, x), state, moved)
        after = optax.apply_updates(moved, updates)
        change = jax.tree.map(jnp.subtract, after, moved)
        spent = 0.5 * float(quadratic_form(curvature, change))
        assert spent <= predicted_kl * (1 + tolerance.contraction)
        before = float(state[1].predicted_kl)
        np.testing.assert_allclose(spent, min(before, predicted_kl), rtol=tolerance.contraction)
        moved = after


def test_refreshing_replaces_the_curvature_wherever_it_stands(scene, key):
    params, updates, curvature, x = scene
    optimizer = optax.chain(scale_by_curvature(curvature), clip_by_curvature_norm(curvature, 1.0))
    state = optimizer.init(params)
    other = estimate(kfac(network, Categorical(4.0), select="w|b"), params, [Batch(x)], key=key)
    fresh = refresh_curvature(state, other)
    expected, _ = scale_by_curvature(other).update(updates, fresh[0], params)
    scaled, _ = optax.chain(scale_by_curvature(curvature)).update(updates, fresh[:1], params)
    jax.tree.map(np.testing.assert_array_equal, scaled, expected)
    assert jax.tree.structure(fresh) == jax.tree.structure(state)


def test_updates_of_another_shape_are_named(scene):
    params, updates, curvature, _ = scene
    transform = scale_by_curvature(curvature)
    wrong = dict(updates, w=updates["w"].T)
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(6, 4\)"):
        transform.update(wrong, transform.init(params))
    with pytest.raises(ValueError, match="no leaf 'b'"):
        transform.update({"w": updates["w"]}, transform.init(params))

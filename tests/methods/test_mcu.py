"""MCU: its directions are those of the outputs themselves, and nothing is moved along them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.methods import mcu
from jedit.methods.trained.mcu import dominant_directions
from jedit.objectives import RMU, MinorPart, RepresentationDeviation, RetainNLL
from jedit.tracing import Leaving
from jedit.training import unlearn

D_IN, WIDTH, CLASSES, ROWS = 6, 8, 3, 50


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's optimizers mix, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(params, x):
    bias = params["b"][None] if "b" in params else 0.0
    return jnp.tanh(x @ params["w"] + bias) @ params["v"]


def scene(*, with_bias):
    rng = np.random.default_rng(5)
    shapes = {"w": (D_IN, WIDTH), "v": (WIDTH, CLASSES)} | ({"b": (WIDTH,)} if with_bias else {})
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = rng.normal(size=(ROWS, D_IN)) * np.geomspace(3.0, 0.3, D_IN) + 2.0
    rows = Batch(jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, ROWS)))
    estimator = kfac(network, Categorical(), select="w|b")
    return params, rows, estimate(estimator, params, [rows], key=jax.random.key(1))


def span(q):
    return q @ q.T


@pytest.mark.parametrize("rank", [1, 3])
def test_the_directions_are_the_outputs_mean_and_top_components(rank, tolerance):
    """By the singular vectors of the centred outputs themselves."""
    params, rows, moments = scene(with_bias=True)
    method = mcu(params, moments, optax.sgd(0.1), site="w", rank=rank)
    found = method.objective.objective.hidden.directions
    h = np.asarray(rows.inputs, np.float64) @ np.asarray(params["w"], np.float64)
    _, _, vt = np.linalg.svd(h - h.mean(axis=0))
    expected, _ = np.linalg.qr(np.stack([*vt[:rank], h.mean(axis=0)], axis=1))
    assert found.shape == (WIDTH, rank + 1)
    tolerance.check(span(np.asarray(found, np.float64)), span(expected), "factorization")


def test_without_a_bias_they_are_those_of_the_second_moment(tolerance):
    params, rows, moments = scene(with_bias=False)
    method = mcu(params, moments, optax.sgd(0.1), site="w", rank=2)
    h = np.asarray(rows.inputs, np.float64) @ np.asarray(params["w"], np.float64)
    expected = np.linalg.svd(h)[2][:3].T
    found = np.asarray(method.objective.objective.hidden.directions, np.float64)
    tolerance.check(span(found), span(expected), "factorization")


def test_a_mean_among_the_components_adds_none():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(4, 7))
    x = rng.normal(size=(40, 4))
    A = np.pad(x.T @ x / 40, ((0, 1), (0, 1)))
    A[4, 4] = 1.0  # E[a] = 0
    assert dominant_directions(jnp.asarray(A), jnp.asarray(W), 3).shape == (7, 3)


@pytest.mark.parametrize("objective", [RMU, RepresentationDeviation])
def test_no_gradient_flows_along_them(objective, tolerance):
    """Of the first layer's outputs the loss moves the rest alone; RMU's own value by hand."""
    params, rows, moments = scene(with_bias=True)
    method = mcu(params, moments, optax.sgd(0.1), site="w", rank=3, objective=objective)
    minor = method.objective.objective.hidden
    q = np.asarray(minor.directions, np.float64)
    loss = objective(minor)
    value = lambda p: loss(network, p, rows, None, params)[0]  # noqa: E731
    gradient = np.asarray(jax.grad(value)(params)["w"], np.float64)
    assert np.linalg.norm(gradient) > 1e-3
    assert np.abs(gradient @ q).max() < 1e-5 * np.abs(gradient).max()
    plain = jax.grad(lambda p: objective(Leaving("w"))(network, p, rows, None, params)[0])(params)
    assert np.abs(np.asarray(plain["w"], np.float64) @ q).max() > 1e-2 * np.abs(gradient).max()
    if objective is RMU:
        h = np.asarray(rows.inputs, np.float64) @ np.asarray(params["w"], np.float64)
        z = h - h @ q @ q.T
        u = np.asarray(jax.random.uniform(jax.random.key(0), (WIDTH,)), np.float64)
        expected = np.mean((z - 2 * u / np.linalg.norm(u)) ** 2)
        tolerance.check(value(params), expected, "factorization")


def test_training_moves_the_minor_part_of_the_outputs(key):
    """Without the retain term, from the first matrix alone: no output moves along Q."""
    params, rows, moments = scene(with_bias=True)
    made = mcu(params, moments, optax.sgd(0.3), site="w", rank=3)
    alone = made._replace(objective=made.objective.objective, trainable="^w$")
    moved, history = unlearn(alone, network, params, rows, rows, steps=20, key=key)
    change = np.asarray(rows.inputs @ (moved["w"] - params["w"]), np.float64)
    q = np.asarray(made.objective.objective.hidden.directions, np.float64)
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert np.linalg.norm(change @ q) < 1e-4 * np.linalg.norm(change)
    assert made.objective.held == RetainNLL()


def test_minor_parts_are_equal_by_value_and_compile_once():
    params, rows, _ = scene(with_bias=True)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, 2)))[0]
    traced = []

    @jax.jit(static_argnums=0)
    def run(hidden, params):
        traced.append(1)
        return hidden(network, params, rows.inputs)

    for directions in (q, q.copy(), q[:, ::-1]):
        run(MinorPart(Leaving("w"), directions), params)
    assert len(traced) == 2
    with pytest.raises(ValueError, match="directions must be orthonormal columns"):
        MinorPart(Leaving("w"), 2 * q)
    with pytest.raises(ValueError, match="the states are 8 wide, the directions 7"):
        MinorPart(Leaving("w"), np.eye(7)[:, :2])(network, params, rows.inputs)


def test_a_dominant_mean_is_taken_out_of_narrow_states():
    """A mean of a thousand times the rest: a Q rounded to bfloat16 would leave four."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(WIDTH, 1)))[0]
    h = jnp.asarray(1000 * q.T + 0.1 * rng.normal(size=(5, WIDTH)), jnp.bfloat16)
    minor = MinorPart(lambda apply, params, inputs: inputs, q)(network, {}, h)  # noqa: ARG005
    exact = np.asarray(h, np.float64)
    np.testing.assert_allclose(minor, exact - exact @ q @ q.T, atol=2e-3)


def test_mistakes_get_a_sentence():
    params, rows, moments = scene(with_bias=True)
    estimator = kfac(network, Categorical(), select="w|b", centred=True)
    centred = estimate(estimator, params, [rows], key=jax.random.key(1))
    with pytest.raises(ValueError, match="the moment of 'w' is centred"):
        mcu(params, centred, optax.sgd(0.1), site="w", rank=2)
    blocks = {n: dataclasses.replace(b, is_merged=True) for n, b in moments.blocks.items()}
    with pytest.raises(ValueError, match="'w' is used at several sites"):
        mcu(params, dataclasses.replace(moments, blocks=blocks), optax.sgd(0.1), site="w")
    with pytest.raises(ValueError, match="'v' has no moment of inputs"):
        mcu(params, moments, optax.sgd(0.1), site="v")
    with pytest.raises(ValueError, match="at most 6 of 8; got 7"):
        mcu(params, moments, optax.sgd(0.1), site="w", rank=7)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        mcu(params, moments, optax.sgd(0.1), site="w", rank=0)

"""Relearning: the attack is plain training, seen at the steps asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.attacks import relearn
from jedit.core.batch import Batch

D, CLASSES, N = 5, 3, 6


def apply(params, x):
    return x @ params["w"]


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(D, CLASSES)))}
    rows = Batch(rng.normal(size=(N, D)), rng.integers(0, CLASSES, N).astype(np.int32))
    return params, rows


def test_whole_batches_are_gradient_descent(scene, key):
    params, rows = scene
    found = relearn(
        apply,
        params,
        rows,
        optimizer=optax.sgd(0.3),
        looks=(2, 6),
        measure=lambda p: np.asarray(p["w"]),
        key=key,
        batch_size=N,
    )
    assert found.steps == (0, 2, 6)
    w = np.asarray(params["w"], np.float64)
    expected = {0: w}
    for step in range(1, 7):
        logits = rows.inputs @ w
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        w = w - 0.3 * rows.inputs.T @ (p - np.eye(CLASSES)[rows.targets]) / N
        expected[step] = w
    tolerance = 1e-12 if jax.config.jax_enable_x64 else 1e-5
    for step, value in zip(found.steps, found.values, strict=True):
        np.testing.assert_allclose(value, expected[step], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found.params["w"], found.values[-1])
    np.testing.assert_array_equal(params["w"], found.values[0])


@pytest.mark.reuses_keys
def test_rows_that_do_not_count_teach_nothing(scene, key):
    params, rows = scene
    masked = rows._replace(mask=np.array([1, 1, 0, 1, 0, 0], np.float32))
    run = dict(optimizer=optax.sgd(0.3), looks=(3,), measure=lambda _: None, key=key, batch_size=N)
    first = relearn(apply, params, masked, **run).params
    targets = np.where(masked.mask > 0, rows.targets, (rows.targets + 1) % CLASSES)
    other = relearn(apply, params, masked._replace(targets=targets.astype(np.int32)), **run).params
    np.testing.assert_array_equal(first["w"], other["w"])


@pytest.mark.parametrize("looks", [(), (0, 1), (2, 2), (3, 1)])
def test_looks_rise(scene, key, looks):
    params, rows = scene
    with pytest.raises(ValueError, match="looks must be (rising numbers|at least 1)"):
        relearn(
            apply,
            params,
            rows,
            optimizer=optax.sgd(0.1),
            looks=looks,
            measure=lambda _: None,
            key=key,
        )

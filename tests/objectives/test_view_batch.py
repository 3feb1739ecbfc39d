"""Objectives over rows in several views: rows taken apart, and the KL between views in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.objectives import LearnNLL, ViewBatch, stack_views, with_retain
from jedit.training import TrainingMethod, unlearn

ROWS, NUM_VIEWS = 5, 3


def classify(params, x):
    return x @ params["w"]


@pytest.fixture
def scene(key):
    keys = jax.random.split(jax.random.clone(key), 3)
    x = jax.random.normal(keys[0], (NUM_VIEWS, ROWS, 4))
    y = jax.random.randint(keys[1], ROWS, 0, 3)
    mask = jnp.array([1, 1, 0, 1, 1])
    params = {"w": jax.random.normal(keys[2], (4, 3))}
    return params, [Batch(x[v], y, mask) for v in range(NUM_VIEWS)]


def numpy_nll(params, views):
    found = []
    for view in views:
        logits = np.asarray(view.inputs, np.float64) @ np.asarray(params["w"], np.float64)
        log_p = scipy.special.log_softmax(logits, axis=-1)
        found += [-log_p[i, view.targets[i]] for i in range(ROWS) if view.mask[i]]
    return np.mean(found)


def numpy_kl(params, views):
    w = np.asarray(params["w"], np.float64)
    p = [scipy.special.softmax(np.asarray(v.inputs, np.float64) @ w, axis=-1) for v in views]
    kept = [i for i in range(ROWS) if views[0].mask[i]]
    return np.mean([np.sum(p[0][i] * np.log(p[0][i] / q[i])) for i in kept for q in p[1:]])


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_loss_is_that_of_all_views_and_their_distance(scene, weight, tolerance):
    params, views = scene
    stacked = stack_views(views)
    assert stacked.rows.inputs.shape == (ROWS, NUM_VIEWS, 4)
    loss, aux = ViewBatch(LearnNLL(), weight)(classify, params, stacked)
    expected = numpy_nll(params, views)
    tolerance.check(loss, expected + weight * numpy_kl(params, views))
    assert ("view_kl" in aux) == bool(weight)


def test_replayed_views_beside_plain_rows(scene, tolerance):
    params, views = scene
    objective = ViewBatch(with_retain(LearnNLL(), weight=0.5), weight=0.2)
    loss, _ = objective(classify, params, views[1], stack_views(views))
    plain = numpy_nll(params, views[1:2]) + 0.5 * numpy_nll(params, views)
    tolerance.check(loss, plain + 0.2 * numpy_kl(params, views))


def test_the_first_view_is_a_constant_of_the_others(scene):
    """The gradient of the KL alone is that of a cross-entropy to fixed distributions."""
    params, views = scene
    kl = lambda p, w: ViewBatch(LearnNLL(), w)(classify, p, stack_views(views))[0]  # noqa: E731
    found = jax.grad(kl)(params, 1.0)["w"] - jax.grad(kl)(params, 0.0)["w"]
    w = np.asarray(params["w"], np.float64)
    expected, kept = np.zeros_like(w), [i for i in range(ROWS) if views[0].mask[i]]
    x = [np.asarray(v.inputs, np.float64) for v in views]
    p = [scipy.special.softmax(a @ w, axis=-1) for a in x]
    for i in kept:
        for v in range(1, NUM_VIEWS):
            expected += np.outer(x[v][i], p[v][i] - p[0][i])
    expected /= len(kept) * (NUM_VIEWS - 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_loop_sees_a_row_in_all_of_its_views_at_once(scene, key):
    """In the ordinary loop, at batches of B / V: the history tells which rows a step saw."""
    params, views = scene
    marked = [v._replace(inputs=v.inputs.at[:, 0].set(2.0 ** np.arange(ROWS))) for v in views]

    def sees(apply, params, forget, retain=None, reference=None):
        del apply, retain, reference
        marks = forget.inputs[:, 0]
        return jnp.sum(params["w"]) * 0, {"mark": jnp.sum(marks), "rows": jnp.float32(len(marks))}

    method = TrainingMethod(ViewBatch(sees), optax.sgd(0.1), batch_size=1)
    with jax.numpy_dtype_promotion("standard"):
        _, history = unlearn(
            method, classify, params, stack_views(marked), steps=10, key=jax.random.clone(key)
        )
    assert set(np.asarray(history["rows"]).tolist()) == {NUM_VIEWS}
    rows = np.log2(np.asarray(history["mark"]) / NUM_VIEWS)
    assert sorted(rows[:5].tolist()) == sorted(rows[5:].tolist()) == [0, 1, 2, 3, 4]


def test_what_cannot_be_gets_a_sentence(scene):
    params, views = scene
    with pytest.raises(ValueError, match="there are no views to stack"):
        stack_views([])
    with pytest.raises(ValueError, match="all views are of the same rows"):
        stack_views([views[0], jax.tree.map(lambda x: x[:3], views[1])])
    with pytest.raises(ValueError, match="no set is `Views`"):
        ViewBatch(LearnNLL(), 1.0)(classify, params, views[0])
    language = lambda p, x: jnp.stack([x @ p["w"]] * 2, axis=1)  # noqa: E731
    double = [v._replace(targets=jnp.stack([v.targets] * 2, 1), mask=None) for v in views]
    with pytest.raises(ValueError, match="of a classifier's outputs"):
        ViewBatch(LearnNLL(), 1.0)(language, params, stack_views(double))

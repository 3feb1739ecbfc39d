"""The scaled step's price: a KL computed by hand, and the quadratic where that holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical, Gaussian
from jedit.geometry import scale_to_kl_budget


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.fixture
def scene():
    rng = np.random.default_rng(4)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {"w": normal(4, 6), "v": normal(6, 3)}
    step = {"w": normal(4, 6), "v": normal(6, 3)}
    mask = jnp.asarray(np.arange(20) % 3 > 0, jnp.float32)
    return params, step, [Batch(normal(20, 4), mask=mask), Batch(normal(7, 4))]


def kl_by_hand(params, moved, batches):
    total, count = 0.0, 0
    for batch in batches:
        p, q = (log_softmax(np.asarray(network(t, batch.inputs)), axis=1) for t in (params, moved))
        counted = np.ones(len(p)) if batch.mask is None else np.asarray(batch.mask)
        total += ((np.exp(p) * (p - q)).sum(axis=1) * counted).sum()
        count += counted.sum()
    return total / count


@pytest.mark.parametrize("budget", [1e-4, 0.3])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("has_curvature", [True, False])
def test_the_true_kl_is_the_budget(scene, key, budget, length, has_curvature):
    params, step, retain = scene
    step = jax.tree.map(lambda d: length * d, step)
    curvature = None
    if has_curvature:
        curvature = estimate(kfac(network, Categorical()), params, retain, key=key)
    scaled, info = scale_to_kl_budget(
        network, params, step, retain, budget=budget, curvature=curvature, likelihood=Categorical()
    )
    true = kl_by_hand(params, jax.tree.map(jnp.add, params, scaled), retain)
    assert 0.98 * budget < true <= budget * (1 + 1e-3)
    assert info.true_kl == pytest.approx(true, rel=1e-2)
    np.testing.assert_allclose(scaled["w"], info.scale * np.asarray(step["w"]), rtol=1e-5)
    if budget < 1e-3:
        assert info.predicted_kl == pytest.approx(true, rel=0.05)


def test_for_a_linear_model_of_normal_outputs_the_prediction_is_the_truth(tolerance):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 2)))}
    step = {"w": jnp.asarray(rng.normal(size=(4, 2)))}
    x = rng.normal(size=(30, 4))
    linear = lambda p, x: x @ p["w"]  # noqa: E731
    scaled, info = scale_to_kl_budget(
        linear, params, step, Batch(jnp.asarray(x)), budget=0.7, likelihood=Gaussian()
    )
    assert info.predicted_kl == pytest.approx(info.true_kl, rel=100 * tolerance.contraction)
    by_hand = 0.5 * np.mean(np.sum((x @ np.asarray(scaled["w"])) ** 2, axis=1))
    assert info.true_kl == pytest.approx(by_hand, rel=10 * tolerance.contraction)


def test_a_step_that_costs_nothing_stays_finite(scene):
    params, step, retain = scene
    blind = jax.tree.map(jnp.zeros_like, step)
    scaled, info = scale_to_kl_budget(
        network, params, blind, retain, budget=0.1, likelihood=Categorical()
    )
    assert info.true_kl == 0
    assert info.scale == 1e6
    assert not np.any(scaled["w"])


def test_a_budget_must_be_positive(scene):
    params, step, retain = scene
    with pytest.raises(ValueError, match="budget must be positive"):
        scale_to_kl_budget(network, params, step, retain, budget=0.0, likelihood=Categorical())
    blind = [batch._replace(mask=jnp.zeros(len(batch.inputs))) for batch in retain]
    with pytest.raises(ValueError, match="2 retain batches count no output"):
        scale_to_kl_budget(network, params, step, blind, budget=0.1, likelihood=Categorical())


def test_a_bfloat16_model_is_judged_as_it_will_be(scene):
    params, step, retain = scene
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    step = jax.tree.map(lambda d: d.astype(jnp.float32), step)
    retain = [b._replace(inputs=b.inputs.astype(jnp.bfloat16)) for b in retain]
    scaled, info = scale_to_kl_budget(
        network, half, step, retain, budget=0.1, likelihood=Categorical()
    )
    after = jax.tree.map(
        lambda p, d: (p.astype(jnp.float32) + d).astype(jnp.bfloat16), half, scaled
    )
    assert 0.05 < kl_by_hand(half, after, retain) < 0.105
    assert {d.dtype for d in jax.tree.leaves(scaled)} == {jnp.dtype(jnp.float32)}
    assert info.true_kl <= 0.1

"""ROSU, UAM and GU in the training loop, against the same steps written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.methods import gu, rosu, uam
from jedit.objectives import GA, RetainNLL
from jedit.training import TrainingMethod, unlearn


def apply(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def nll_gradient(params, batch):
    loss = lambda p: RetainNLL()(apply, p, None, batch)[0]  # noqa: E731
    return jax.grad(loss)(params)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def like(vector, tree):
    leaves, treedef = jax.tree.flatten(tree)
    cuts = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(np.asarray(vector), cuts)
    return treedef.unflatten(
        [jnp.asarray(v.reshape(x.shape), x.dtype) for v, x in zip(parts, leaves, strict=True)]
    )


@pytest.mark.parametrize("constrained", [True, False])
def test_three_steps_are_the_ones_by_hand(scene, key, constrained, tolerance):
    params, forget, retain = scene
    make = rosu if constrained else uam
    method = make(optax.sgd(0.1, momentum=0.9), radius=0.3)
    actual, history = unlearn(method, apply, params, forget, retain, steps=3, key=key)
    theta, momentum = flat(params), 0.0
    for _ in range(3):
        here = like(theta, params)
        f, r = flat(nll_gradient(here, forget)), flat(nll_gradient(here, retain))
        q = f - (f @ r) / (r @ r) * r if constrained else f
        there = like(theta + 0.3 * q / np.linalg.norm(q), params)
        momentum = 0.9 * momentum + flat(nll_gradient(there, retain))
        theta = theta - 0.1 * momentum
    np.testing.assert_allclose(flat(actual), theta, atol=100 * tolerance.contraction)
    assert history["retain_nll"].shape == (3,)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_gu_does_not_move_the_retain_loss_to_first_order(scene, key, scope):
    """A tenth of the step, a hundredth of the change; without GU, a tenth."""
    params, forget, retain = scene
    plain = optax.scale_by_rms(decay=0.999, bias_correction=True)
    changes = []
    for rate in (1e-2, 1e-3):
        method = gu(GA(), learning_rate=rate, scope=scope)
        bare = optax.chain(plain, optax.scale_by_learning_rate(rate))
        methods = {"gu": method, "plain": TrainingMethod(GA(), bare)}
        change = {}
        for name, one in methods.items():
            sets = (params, forget, retain)
            moved, _ = unlearn(one, apply, *sets, steps=1, key=jax.random.clone(key))
            after, before = (RetainNLL()(apply, p, None, retain)[0] for p in (moved, params))
            change[name] = abs(float(after - before))
            grown = GA()(apply, params, forget)[0]
            assert GA()(apply, moved, forget)[0] < grown, name
        changes.append(change)
    large, small = changes
    assert large["plain"] / small["plain"] == pytest.approx(10, rel=0.5)
    assert large["gu"] / small["gu"] > 40


def test_a_step_of_gu_is_adams_off_the_retain_gradient(scene, key, tolerance):
    """In the first step Adam's sqrt(v̂) is the gradient's magnitude."""
    params, forget, retain = scene
    method = gu(GA(), learning_rate=0.02, scope="global")
    moved, _ = unlearn(method, apply, params, forget, retain, steps=1, key=key)
    g, r = -flat(nll_gradient(params, forget)), flat(nll_gradient(params, retain))
    h = np.abs(g) + 1e-8
    z, z_r = g / np.sqrt(h), r / np.sqrt(h)
    expected = -0.02 * (z - (z @ z_r) / (z_r @ z_r) * z_r) / np.sqrt(h)
    step = flat(moved) - flat(params)
    np.testing.assert_allclose(step, expected, atol=100 * tolerance.factorization * 0.02)


def test_mistakes_get_a_sentence(scene):
    del scene
    with pytest.raises(ValueError, match="outer must be one of"):
        rosu(optax.sgd(0.1), radius=0.1, outer="pull")
    with pytest.raises(ValueError, match="radius must be positive"):
        uam(optax.sgd(0.1), radius=-1.0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        gu(GA(), learning_rate=0.1, rank=0)

"""SalUn and l1-sparse in the training loop: the same steps by hand, and what must not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jedit.methods import l1_sparse, salun
from jedit.objectives import RandomLabel, RetainNLL, relabel, with_retain
from jedit.training import TrainingMethod, unlearn
from jedit.transforms import add_l1_gradient, mask_to_salient


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Optax's own Adam mixes an int32 step count with Python floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def apply(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def numpy_gradient(params, batch):
    """Of the mean loss, by the chain rule in NumPy."""
    w, v, x = (np.asarray(a, np.float64) for a in (params["w"], params["v"], batch.inputs))
    hidden = np.tanh(x @ w)
    p = np.exp(hidden @ v)
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(3)[np.asarray(batch.targets)]) / len(x)
    return {"w": x.T @ ((error @ v.T) * (1 - hidden**2)), "v": hidden.T @ error}


def train(method, params, forget, retain, key, steps):
    return unlearn(method, apply, params, forget, retain, steps=steps, key=key)


@pytest.mark.parametrize("fraction", [0.5, 0.2])
def test_salun_moves_the_salient_parameters_alone(scene, key, fraction):
    """Bit by bit, after a hundred steps of AdamW with a weight decay that moves everything."""
    params, forget, retain = scene
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    method = salun(apply, params, forget, optimizer, fraction=fraction)
    relabelled = relabel(forget, 3, key=jax.random.fold_in(key, 1))
    moved, history = train(method, params, relabelled, retain, key, 100)
    sizes = {name: np.abs(g) for name, g in numpy_gradient(params, forget).items()}
    # 35 parameters: 17.5 is rounded to 18, half to even.
    count = round(fraction * 35)
    limit = np.sort(np.concatenate([s.ravel() for s in sizes.values()]))[-count]
    for name, before in params.items():
        np.testing.assert_array_equal(np.asarray(moved[name] != before), sizes[name] >= limit)
    assert history["relabelled_nll"][-1] < 0.8 * history["relabelled_nll"][0]
    # Ahead of Adam a mask holds nothing still.
    wrong = optax.chain(mask_to_salient(numpy_gradient(params, forget), fraction), optimizer)
    method = method._replace(optimizer=wrong)
    loose, _ = train(method, params, relabelled, retain, jax.random.clone(key), 2)
    assert all(np.all(np.asarray(loose[name] != params[name])) for name in params)


def test_three_steps_of_salun_are_the_ones_by_hand(scene, key, tolerance):
    params, forget, retain = scene
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 3], forget) for i in (0, 3)]
    objective = with_retain(RandomLabel(), weight=1.3, forget_weight=0.7)
    optimizer = optax.sgd(0.1, momentum=0.9)
    method = salun(apply, params, halves, optimizer, objective=objective)
    relabelled = relabel(forget, 3, key=jax.random.fold_in(key, 1))
    actual, _ = train(method, params, relabelled, retain, key, 3)
    sizes = {name: np.abs(g) for name, g in numpy_gradient(params, forget).items()}
    median = np.median(np.concatenate([s.ravel() for s in sizes.values()]))
    theta = {name: np.asarray(p, np.float64) for name, p in params.items()}
    momentum = dict.fromkeys(params, 0.0)
    for _ in range(3):
        f, r = numpy_gradient(theta, relabelled), numpy_gradient(theta, retain)
        for name in params:
            momentum[name] = 0.9 * momentum[name] + 0.7 * f[name] + 1.3 * r[name]
        theta = {
            name: theta[name] - 0.1 * momentum[name] * (sizes[name] >= median) for name in params
        }
    tolerance.check(actual, theta)


def test_three_steps_of_l1_sparse_are_the_ones_by_hand(scene, key, tolerance):
    params, forget, retain = scene
    params = {**params, "v": params["v"].at[0, 1].set(0)}
    method = l1_sparse(optax.sgd(0.1, momentum=0.9), strength=0.375, steps=2)
    actual, history = train(method, params, forget, retain, key, 3)
    theta = {name: np.asarray(p, np.float64) for name, p in params.items()}
    momentum = dict.fromkeys(params, 0.0)
    for gamma in (0.375, 0.1875, 0.0):
        gradient = numpy_gradient(theta, retain)
        for name in params:
            penalised = gradient[name] + gamma * np.sign(theta[name])
            momentum[name] = 0.9 * momentum[name] + penalised
            theta[name] = theta[name] - 0.1 * momentum[name]
    tolerance.check(actual, theta)
    held = RetainNLL()(apply, params, None, retain)[0]
    np.testing.assert_allclose(history["loss"][0], held, rtol=1e-6)


def test_the_l1_gradient_is_that_of_the_penalty(scene, tolerance):
    params, _, _ = scene
    transform = add_l1_gradient(0.2)
    zero = jax.tree.map(jnp.zeros_like, params)
    added, _ = transform.update(zero, transform.init(params), params)
    penalty = lambda p: 0.2 * sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))  # noqa: E731
    tolerance.check(added, jax.grad(penalty)(params))


def test_a_mask_knows_what_is_not_trained(scene, key):
    """The share is of the trained parameters."""
    params, forget, retain = scene
    optimizer = optax.chain(optax.sgd(0.1), mask_to_salient(params, 0.4))
    method = TrainingMethod(RetainNLL(), optimizer, trainable="^v$")
    moved, _ = train(method, params, forget, retain, key, 2)
    np.testing.assert_array_equal(moved["w"], params["w"])
    assert np.sum(np.asarray(moved["v"] != params["v"])) == 6


def test_equal_saliency_is_cut_to_the_number():
    params = {"a": jnp.ones(3), "b": jnp.ones(5)}
    mask = mask_to_salient(params, 0.5).init(params).mask
    np.testing.assert_array_equal(mask["a"], [True] * 3)
    np.testing.assert_array_equal(mask["b"], [True] + [False] * 4)


def test_mistakes_get_a_sentence(scene):
    params, forget, _ = scene
    with pytest.raises(ValueError, match="fraction must be from 0 to 1, got 1.5"):
        salun(apply, params, forget, optax.sgd(0.1), fraction=1.5)
    with pytest.raises(ValueError, match=r"targets has shape None"):
        salun(apply, params, forget._replace(targets=None), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"gradient has shape \(4, 5\) for params of \(5, 4\)"):
        mask_to_salient(params).init({"w": params["w"].T, "v": params["v"]})
    with pytest.raises(ValueError, match="strength must not be negative"):
        l1_sparse(optax.sgd(0.1), strength=-1.0, steps=3)
    with pytest.raises(ValueError, match="add_l1_gradient needs params"):
        add_l1_gradient(0.1).update(params, add_l1_gradient(0.1).init(params))


def test_masking_the_update_is_the_released_salun(tolerance):
    """Which masks gradients, and puts masked parameters and their momentum back after each step."""
    rng = np.random.default_rng(5)
    start, saliency = rng.normal(size=(2, 7))
    gradients = rng.normal(size=(5, 7))
    mask = np.abs(saliency) >= np.sort(np.abs(saliency))[3]
    chain = optax.chain(
        optax.add_decayed_weights(0.1),
        optax.sgd(0.2, momentum=0.9),
        mask_to_salient(jnp.asarray(saliency), 4 / 7),
    )
    ours, theirs, momentum = jnp.asarray(start), start.copy(), np.zeros(7)
    state = chain.init(ours)
    for gradient in gradients:
        updates, state = chain.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        momentum = 0.9 * momentum + (mask * gradient + 0.1 * theirs)
        theirs = theirs - 0.2 * momentum
        theirs, momentum = np.where(mask, theirs, start), mask * momentum
    tolerance.check(ours, theirs)

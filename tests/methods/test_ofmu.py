"""OFMU: its directions from dense Hessians, and its steps in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jedit.core.batch import Batch
from jedit.methods import CATALOGUE, ofmu
from jedit.methods.trained.ofmu import EPSILON, ascent, descent
from jedit.objectives import NPO, RetainNLL
from jedit.training import unlearn


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's optimizers mix, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def rows(seed, n=6):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n)))


def start(seed=1):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(4, 5))), "v": jnp.asarray(rng.normal(size=(5, 3)))}


FORGET, RETAIN, REFERENCE = rows(2), rows(3), start()


def forget_loss(params):
    return -NPO()(model, params, FORGET, RETAIN, REFERENCE)[0]


def retain_loss(params):
    return RetainNLL()(model, params, FORGET, RETAIN)[0]


def dense(params, beta):
    """Φ of one vector, by the definition, and where it is."""
    theta, put = ravel_pytree(params)

    def phi(x):
        g_f, g_r = (jax.grad(lambda x, f=f: f(put(x)))(x) for f in (forget_loss, retain_loss))
        norms = (g_f @ g_f + EPSILON**2) * (g_r @ g_r + EPSILON**2)
        return forget_loss(put(x)) - beta * (g_f @ g_r) / norms**0.5

    return phi, theta, put


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_the_directions_are_those_of_dense_hessians(beta, tolerance):
    here, rho = start(7), 0.3
    phi, theta, put = dense(here, beta)

    @jax.jit
    def expected(theta):
        gradient = jax.grad(phi)(theta)
        # By the matrix itself, and, of F as it stands, by one more gradient.
        by_matrix = jax.grad(lambda x: retain_loss(put(x)))(theta)
        by_matrix += 2 * rho * jax.hessian(phi)(theta) @ gradient
        whole = jax.grad(lambda x: retain_loss(put(x)) + rho * jnp.sum(jax.grad(phi)(x) ** 2))(
            theta
        )
        return gradient, by_matrix, whole

    gradient, by_matrix, whole = expected(theta)
    losses = (forget_loss, retain_loss)
    tolerance.check(by_matrix, whole, "factorization")
    up = jax.jit(lambda p: ascent(*losses, p, beta))(here)
    tolerance.check(up, put(gradient), "factorization")
    down = jax.jit(lambda p: descent(*losses, p, beta, jnp.asarray(rho)))(here)
    tolerance.check(down, put(by_matrix), "factorization")


def test_a_step_is_a_round_with_momenta_of_each_kind(key, tolerance):
    """Up, up, down at ρ; up, up, down at 2ρ: two steps, each of which ends with a repair."""
    rate, beta, penalty = 0.02, 0.4, 0.3
    method = ofmu(optax.sgd(rate, momentum=0.9), beta=beta, inner_steps=2, penalty=penalty)
    moved, history = unlearn(method, model, start(), FORGET, RETAIN, steps=2, key=key)
    here, losses = start(), []
    momenta = [jax.tree.map(jnp.zeros_like, here) for _ in range(2)]
    for t in range(6):
        if t % 3 == 0:
            losses.append(float(retain_loss(here) - forget_loss(here)))
        phi, theta, put = dense(here, beta)
        if t % 3 < 2:
            u = -jax.grad(phi)(theta)
        else:
            rho = penalty * (1 + t // 3)
            u = jax.grad(lambda x: retain_loss(put(x)) + rho * jnp.sum(jax.grad(phi)(x) ** 2))(  # noqa: B023
                theta
            )
        kind = int(t % 3 == 2)
        momenta[kind] = jax.tree.map(lambda m, g: 0.9 * m + g, momenta[kind], put(u))
        here = jax.tree.map(lambda p, m: p - rate * m, here, momenta[kind])
    tolerance.check(moved, here, "factorization")
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)


def test_of_what_is_not_trained_nothing_enters_the_cosine(key, tolerance):
    params = start()
    method = ofmu(optax.sgd(0.05), beta=0.4, inner_steps=1)._replace(trainable="^v$")
    moved, _ = unlearn(method, model, params, FORGET, RETAIN, steps=1, key=key)
    np.testing.assert_array_equal(moved["w"], params["w"])
    losses = [lambda v, f=f: f({"w": params["w"], "v": v}) for f in (forget_loss, retain_loss)]
    there = params["v"] + 0.05 * ascent(*losses, params["v"], 0.4)
    expected = there - 0.05 * descent(*losses, there, 0.4, jnp.asarray(0.1))
    tolerance.check(moved["v"], expected, "factorization")


def test_small_steps_add_up_beside_narrow_parameters():
    """In bfloat16 the sum of 600 ascents would stop growing on the way."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    loss = lambda p: jnp.sum(p["w"])  # noqa: E731
    none = lambda p: 0 * jnp.sum(p["w"])  # noqa: E731
    transform = ofmu(optax.sgd(1e-3), beta=0.0, penalty=0.0, inner_steps=600).optimizer
    given = {"forget_loss_fn": loss, "retain_loss_fn": none}
    moved, _ = transform.update(params, transform.init(params), params, **given)
    assert moved["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(moved["w"], float), 0.6, rtol=0.01)


def test_a_gradient_that_is_gone_gives_no_direction(tolerance):
    flat = lambda params: 0.0 * jnp.sum(params["v"])  # noqa: E731
    found = ascent(flat, retain_loss, start(), 0.5)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    tolerance.check(found, jax.tree.map(jnp.zeros_like, found))


def test_the_row_and_mistakes():
    assert CATALOGUE["OFMU"].settings == {"beta": 0.1, "inner_steps": 5, "penalty": 0.1}
    with pytest.raises(ValueError, match="beta must not be negative"):
        ofmu(optax.sgd(0.1), beta=-1.0)
    with pytest.raises(ValueError, match="inner_steps must be at least 1"):
        ofmu(optax.sgd(0.1), inner_steps=0)
    method, params = ofmu(optax.sgd(0.1)), start()
    with pytest.raises(ValueError, match="forget_loss_fn and retain_loss_fn"):
        method.optimizer.update(params, method.optimizer.init(params), params)

"""Natural steps against dense linear algebra, and the problem that they are said to solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import jedit
from jedit.curvature.likelihoods import Categorical
from jedit.methods import natural
from jedit.objectives import NPO, with_retain
from jedit.training import LoopState, unlearn
from jedit.transforms import falling, natural_steps


def apply(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def dense():
    """A small network, its curvature, and the curvature as one matrix per parameter."""
    rng = np.random.default_rng(0)
    dtype = jnp.zeros(()).dtype
    params = {
        "w": jnp.asarray(rng.normal(size=(4, 6)), dtype),
        "v": jnp.asarray(rng.normal(size=(6, 3)), dtype),
    }
    rows = jedit.Batch(
        jnp.asarray(rng.normal(size=(20, 4)), dtype), jnp.asarray(rng.integers(0, 3, 20), jnp.int32)
    )
    forget, retain = (jax.tree.map(lambda x, i=i: x[i], rows) for i in (slice(6), slice(6, None)))
    curvature = jedit.estimate(
        jedit.kfac(apply, Categorical()), params, [retain], key=jax.random.key(1)
    )
    matrices = {}
    for path in params:
        inputs, outputs = (np.asarray(x, np.float64) for x in jedit.factors(curvature, path))
        matrices[path] = np.kron(inputs, outputs)  # of the weight's entries, row by row
    return params, forget, retain, curvature, matrices


def flat(tree, path):
    return np.asarray(tree[path], np.float64).ravel()


@pytest.mark.parametrize("damping", [0.003, 0.3])
@pytest.mark.parametrize("predicted_kl", [1e-5, 1e-2])
def test_three_steps_are_the_ones_of_dense_matrices(dense, key, tolerance, damping, predicted_kl):
    params, forget, retain, curvature, matrices = dense
    objective = with_retain(NPO(beta=0.3))
    reference = jax.tree.map(lambda p: 0.9 * p, params)
    method = natural(objective, curvature, damping=damping, predicted_kl=predicted_kl)
    start = LoopState(0, params, None, reference)
    moved, _ = unlearn(method, apply, start, forget, retain._replace(
        inputs=retain.inputs[:16], targets=retain.targets[:16]), steps=3, key=key)  # fmt: skip
    rows = jax.tree.map(lambda x: x[:16], retain)
    at = params
    for _ in range(3):
        gradient = jax.grad(lambda p: objective(apply, p, forget, rows, reference)[0])(at)
        d, cost = {}, 0.0
        for path, f in matrices.items():
            damped = f + damping * np.trace(f) / len(f) * np.eye(len(f))
            d[path] = np.linalg.solve(damped, flat(gradient, path))
            cost += 0.5 * d[path] @ f @ d[path]
        alpha = min(1.0, np.sqrt(predicted_kl / cost))
        assert alpha < 1
        at = {n: at[n] - (alpha * d[n]).reshape(at[n].shape).astype(at[n].dtype) for n in at}
    tolerance.check(moved, at, "factorization")


def test_a_step_lowers_the_linear_model_most_within_its_price(dense):
    params, forget, retain, curvature, matrices = dense
    gradient = jax.grad(lambda p: NPO()(apply, p, forget, retain, params)[0])(params)
    price = 1e-4
    steps = natural_steps(curvature, damping=1e-6, predicted_kl=price)
    update, _ = steps.update(gradient, steps.init(params), params)
    g = np.concatenate([flat(gradient, path) for path in matrices])
    f = np.zeros((len(g), len(g)))
    first = 0
    for matrix in matrices.values():
        f[first : first + len(matrix), first : first + len(matrix)] = matrix
        first += len(matrix)
    # The unknown is x with Δ = √(2ε) F^(-1/2) x in the range of F, where logits' gradients lie: the
    # price is a unit ball.
    values, vectors = np.linalg.eigh(f)
    in_range = values > 1e-6 * values[-1]
    scale = np.sqrt(2 * price) * (vectors / np.sqrt(np.where(in_range, values, np.inf))).T
    found = optimize.minimize(
        lambda x: (scale @ g) @ x,
        np.full(len(g), 1e-3),
        jac=lambda _: scale @ g,
        constraints={"type": "ineq", "fun": lambda x: 1 - x @ x, "jac": lambda x: -2 * x},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-10},
    )
    assert found.success
    ours = np.concatenate([flat(update, path) for path in matrices])
    np.testing.assert_allclose(g @ ours, found.fun, rtol=1e-3)


def test_a_natural_gradient_below_its_price_is_taken_whole(dense, tolerance):
    params, _, _, curvature, _ = dense
    gradient = jax.tree.map(lambda p: 1e-6 * p, params)
    steps = natural_steps(curvature, damping=0.1, predicted_kl=1.0)
    update, _ = steps.update(gradient, steps.init(params), params)
    tolerance.check(
        update, jax.tree.map(jnp.negative, jedit.solve(curvature, gradient, damping=0.1))
    )


def test_published_settings_and_refusals(dense):
    curvature = dense[3]
    method = natural(NPO(), curvature)
    assert method.batch_size == 16
    assert isinstance(method.optimizer, optax.GradientTransformation)
    gradient = jax.tree.map(jnp.ones_like, dense[0])
    by_default, given = (
        steps.update(gradient, steps.init(dense[0]), dense[0])[0]
        for steps in (method.optimizer, natural_steps(curvature, damping=0.01, predicted_kl=1e-4))
    )
    jax.tree.map(np.testing.assert_array_equal, by_default, given)
    with pytest.raises(ValueError, match="predicted_kl must be positive"):
        natural(NPO(), curvature, predicted_kl=0.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        natural(NPO(), curvature, batch_size=0)


@pytest.mark.usefixtures("standard_promotion")  # optax's schedules are in float32
def test_the_price_of_a_step_falls_as_the_schedule_says(dense):
    params, _, _, curvature, _ = dense
    steps = natural_steps(curvature, predicted_kl=falling(1e-3, 4))
    gradient = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    state, prices = steps.init(params), []
    for _ in range(4):
        update, state = steps.update(gradient, state, params)
        prices.append(0.5 * float(jedit.quadratic_form(curvature, update)))
    np.testing.assert_allclose(prices, 1e-3 * (1 - np.arange(4) / 4) ** 2, rtol=1e-4)

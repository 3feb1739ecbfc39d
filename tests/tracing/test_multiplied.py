"""Gains and biases that an array multiplies before they meet the activations, as in batch norm."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jedit.tracing import capture
from tests.tracing.oracle import as_users_write, assert_close, check_capture, normal, user_rules

X = normal(2, 3, 4)
MEAN, VARIANCE = normal(4, seed=1), normal(4, seed=2) ** 2
PARAMS = {"g": normal(4), "b": normal(4, seed=3), "w": normal(4, 4)}


def plain(p, x):
    return (x - MEAN) * (p["g"] * lax.rsqrt(VARIANCE + 1e-3)) + p["b"]


def divided(p, x):
    return x * (p["g"] / jnp.sqrt(VARIANCE + 1e-3)) + p["b"]


def laid_out(p, x):
    inverse = lax.rsqrt(jnp.asarray(VARIANCE) + 1e-3).reshape(2, 2)
    gain = (2 * (p["g"].reshape(2, 2) * inverse) - 1).T
    y = jnp.moveaxis(x, -1, 0).reshape(2, 2, 2, 3).swapaxes(0, 1)
    return jnp.moveaxis((y * gain[:, :, None, None]).reshape(4, 2, 3), 0, -1) + p["b"]


def twice(p, x):
    return (p["g"] * MEAN / VARIANCE) * x + p["b"].astype(x.dtype) * VARIANCE


def narrow(p, x):
    inverse = 1 / VARIANCE
    return x.mean(-1, keepdims=True) * (p["g"] * inverse) + jnp.vdot(x, x) * (p["b"] * inverse)


def by_leaf(p, x):
    return x * (p["g"] * lax.rsqrt(jnp.exp(p["variance"]))) + p["b"]


def in_a_scan(p, x):
    def step(h, sliced):
        g, variance = sliced
        return jnp.tanh(h * (g * lax.rsqrt(variance)) + p["b"]), None

    gains = p["g"].reshape(1, 4)
    return lax.scan(jax.checkpoint(step), x, (gains, jnp.asarray(VARIANCE).reshape(1, 4)))[0]


@pytest.mark.parametrize("norm", [plain, divided, laid_out, twice, narrow, by_leaf, in_a_scan])
def test_gains_in_eval_mode(norm):
    def apply(params, x):
        return jnp.tanh(norm(params, x @ params["w"])) @ params["w"]

    params, uncovered = PARAMS, ()
    if norm is by_leaf:
        params, uncovered = {**PARAMS, "variance": VARIANCE}, ("variance",)
    kinds = {
        "g": {"scale"},
        "b": {"scale" if norm in (twice, narrow) else "bias"},
    }
    check_capture(apply, params, X, kinds=kinds, uncovered=uncovered)


def test_what_is_captured_is_the_activation_times_the_array():
    x = jnp.asarray(X)
    _, activations, _ = capture(as_users_write(plain), {"g": PARAMS["g"], "b": PARAMS["b"]}, x)
    expected = (X - MEAN) / np.sqrt(VARIANCE + 1e-3)
    assert_close(activations["g"], expected, 1e-5)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (2, 2))(x))
        return nn.BatchNorm(use_running_average=True, axis=1)(nn.relu(x))


def test_flax_in_eval_mode():
    x = normal(2, 3, 3, 2)
    module = Normalised()
    with user_rules():
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    drawn = jax.tree.map(lambda s: normal(*s.shape, seed=5) ** 2 + 0.1, shapes)
    stats = drawn["batch_stats"]

    def apply(params, x):
        return module.apply({"params": params, "batch_stats": stats}, x)

    kinds = {"BatchNorm_0/scale": {"scale"}, "BatchNorm_1/bias": {"bias"}}
    check_capture(apply, drawn["params"], x, kinds=kinds)
    # Statistics as leaves of params: not selected, they are arrays like others.
    check_capture(module.apply, drawn, x, kinds={"params/BatchNorm_0/scale": {"scale"}},
                  select="^params/")  # fmt: skip


def test_haiku_in_eval_mode():
    def network(x, is_training):
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), is_training)

    transformed = hk.without_apply_rng(hk.transform_with_state(network))
    with user_rules():
        params, state = jax.eval_shape(lambda x: transformed.init(jax.random.key(0), x, True), X)
    params, state = jax.tree.map(lambda s: normal(*s.shape, seed=5) ** 2 + 0.1, (params, state))
    state = jax.tree.map(lambda x: x if x.ndim else np.asarray(3), state)
    check_capture(lambda p, x: transformed.apply(p, state, x, False)[0], params, X)


@pytest.mark.parametrize(
    "use",
    [
        lambda p, x: x @ (p["w"] * np.triu(np.ones((4, 4)))),
        lambda p, x: jax.jit(jnp.multiply)(p["w"][0] * MEAN, x),
        lambda p, x: x * jax.jit(lambda w: w[0] * MEAN)(p["w"]),
        lambda p, x: x * jnp.split(p["w"] * MEAN, 4)[0],
        lambda p, x: x * jnp.concatenate([p["w"][0, :2] * MEAN[:2], MEAN[2:]]),
    ],
    ids=["weight", "into a call", "out of a call", "split", "joined"],
)
def test_an_array_that_cannot_be_followed(use):
    sites = check_capture(use, {"w": PARAMS["w"]}, X, uncovered=("w",))
    reason = "is multiplied by an array that does not depend on the inputs (test_multiplied.py:"
    assert reason in sites.uncovered["w"]

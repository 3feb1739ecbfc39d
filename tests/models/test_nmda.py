"""The NMDA-inspired activation: against its other form, and in the models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.models import NMDA, cached_decode, gpt, gpt_stepper, greedy_decode, mlp


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.1, 0.7), (10.0, 2.5)])
def test_it_is_the_gate_of_the_paper(alpha, beta):
    x = np.linspace(-5, 5, 41)
    expected = x / (1 + alpha * np.exp(-beta * x))
    np.testing.assert_allclose(NMDA(alpha, beta)(jnp.asarray(x)), expected, atol=1e-6)


def test_a_shut_gate_has_a_finite_gradient_and_silu_is_one_of_them():
    x = jnp.asarray([-1e4, -90.0, 0.0, 1e4])
    assert np.all(np.isfinite(jax.vmap(jax.grad(NMDA(10.0)))(x)))
    np.testing.assert_allclose(NMDA()(x), jax.nn.silu(x), rtol=1e-6)
    assert NMDA(10.0)(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert NMDA(10.0) == NMDA(10.0)
    assert hash(NMDA(10.0)) == hash(NMDA(10.0))


def test_the_models_take_it():
    """The perceptron by hand; the GPT by what its own stepper says, and unlike GELU's."""
    gate = NMDA(4.0, 1.5)
    apply, params = mlp(key=jax.random.key(0), sizes=(3, 5, 2), activation=gate)
    x = jnp.asarray([[0.3, -2.0, 1.1]], jnp.float32)
    first, second = params["layers"]["0"], params["layers"]["1"]
    hidden = x @ first["kernel"] + first["bias"][None]
    expected = hidden / (1 + 4 * jnp.exp(-1.5 * hidden)) @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(apply(params, x), expected, atol=1e-5)
    sizes = {"num_layers": 2, "num_heads": 2}
    made = {"vocab": 11, "width": 8, "max_len": 12, **sizes}
    apply, params = gpt(key=jax.random.key(1), **made, mlp=gate)
    params = jax.tree.map(lambda p: 8 * p, params)
    prompt = jnp.asarray([[3, 1, 4, 1]])
    plain = gpt(key=jax.random.key(1), **made)[0]
    assert not np.allclose(plain(params, prompt), apply(params, prompt))
    stepper = gpt_stepper(**sizes, mlp=gate)
    cached = cached_decode(stepper, params, prompt, 6)
    np.testing.assert_array_equal(cached, greedy_decode(apply, params, prompt, 6))

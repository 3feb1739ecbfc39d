"""What enters a site, or leaves it, as a value: against the states computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import Entering, Leaving


def twice(params, x):
    """The second matrix is used at two sites."""
    hidden = jnp.tanh(x @ params["w"])
    return jnp.tanh(hidden @ params["v"]) @ params["v"]


@pytest.fixture
def case(key):
    k_w, k_v, k_x = jax.random.split(key, 3)
    params = {"w": jax.random.normal(k_w, (3, 4)), "v": jax.random.normal(k_v, (4, 4))}
    return params, jax.random.normal(k_x, (5, 3))


def test_the_states_are_those_by_hand(case, tolerance):
    params, x = case
    hidden = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64))
    second = np.tanh(hidden @ np.asarray(params["v"], np.float64))
    for site, expected in (("w", np.asarray(x)), ("v", hidden), ("v#1", second)):
        tolerance.check(Entering(site)(twice, params, x), expected)


def test_the_outputs_are_those_by_hand_without_the_bias(case, tolerance):
    params, x = case
    biased = params | {"b": jax.numpy.full(4, 0.7)}
    apply = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]  # noqa: E731
    found = [Leaving(site)(apply, biased, x) for site in ("w", "v")]
    first = np.asarray(x, np.float64) @ np.asarray(params["w"], np.float64)
    tolerance.check(found, [first, np.tanh(first + 0.7) @ np.asarray(params["v"], np.float64)])
    with pytest.raises(ValueError, match="'v#3' is no site"):
        Leaving("v#3")(apply, biased, x)


def test_a_gradient_flows_through_them(case, tolerance):
    params, x = case
    found = jax.grad(lambda p: jnp.sum(Entering("v")(twice, p, x) ** 2))(params)
    expected = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["w"]) ** 2))(params)
    tolerance.check(found, expected)


def test_equal_ones_are_one_argument_of_the_compiler(case):
    params, x = case
    traced = []

    @jax.jit(static_argnums=0)
    def run(hidden, params):
        traced.append(1)
        return hidden(twice, params, x)

    for site in ("v", "v", "w"):
        run(Entering(site), params)
    assert len(traced) == 2
    assert Entering("v") == Entering("v") != Entering("w")


def test_an_unknown_site_gets_a_sentence(case):
    params, x = case
    with pytest.raises(ValueError, match=r"'v#3' is no site; .* \['v', 'v#1'\]"):
        Entering("v#3")(twice, params, x)
    with pytest.raises(ValueError, match="nope"):
        Entering("nope")(twice, params, x)

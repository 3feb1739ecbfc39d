"""Representation deviation in NumPy float64: values, where it has no gradient and where it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import objectives
from tests.objectives.references import (
    WIDTH,
    apply,
    make_problem,
    numpy_counted,
    numpy_kl,
    numpy_mean_nll,
)


def hidden(params, inputs):
    return jnp.tanh(params["embed"][inputs])


@pytest.fixture
def problem():
    return make_problem()


def numpy_states(params, batch):
    return np.tanh(np.asarray(params["embed"], np.float64)[np.asarray(batch.inputs)])


def numpy_cosine(x, y):
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


@pytest.mark.parametrize(("tilt", "gamma"), [(0.3, 1.0), (2.0, 0.7), (None, 0.7)])
def test_the_cosine_of_the_counted_positions(problem, tilt, gamma, tolerance):
    params, reference, forget, _ = problem
    target, options = numpy_states(reference, forget), {}
    if tilt is not None:
        u = objectives.random_direction(WIDTH, key=jax.random.key(1))
        options = {"direction": u, "tilt": tilt}
        norms = np.linalg.norm(target, axis=-1, keepdims=True)
        target = target + tilt * norms * np.asarray(u, np.float64)
    cosine = numpy_cosine(numpy_states(params, forget), target)
    expected = cosine[numpy_counted(forget)].mean()
    fixed = {"apply": apply, "hidden": hidden, "reference_params": reference, "gamma": gamma}
    loss, aux = objectives.representation_deviation(params, forget, **fixed, **options)
    tolerance.check(loss, gamma * expected)
    tolerance.check(aux, {"forget_cosine": expected})


def test_the_retain_term(problem, tolerance):
    params, reference, forget, retain = problem
    fixed = {"apply": apply, "hidden": hidden, "reference_params": reference, "alpha": 0.6}
    bare, _ = objectives.representation_deviation(params, forget, **fixed)
    whole, aux = objectives.representation_deviation(params, forget, retain, **fixed)
    tolerance.check(whole, float(bare) + 0.6 * numpy_mean_nll(params, retain))
    assert set(aux) == {"forget_cosine", "retain_nll"}
    whole, _ = objectives.representation_deviation(
        params, forget, retain, **fixed, retain_objective=objectives.retain_kl
    )
    tolerance.check(whole, float(bare) + 0.6 * numpy_kl(reference, params, retain))


def test_without_a_direction_the_reference_is_a_maximum_and_with_one_it_is_not(problem, tolerance):
    params, _, forget, _ = problem
    fixed = {"apply": apply, "hidden": hidden, "reference_params": params}
    gradient = jax.grad(
        lambda p, **more: objectives.representation_deviation(p, forget, **fixed, **more)[0]
    )
    still = gradient(params)["embed"]
    np.testing.assert_allclose(still, 0, atol=tolerance.contraction)
    u = objectives.random_direction(WIDTH, key=jax.random.key(1))
    assert np.abs(gradient(params, direction=u)["embed"]).max() > 1e-3


def test_the_reference_is_a_constant(problem, tolerance):
    """The gradient is that of targets frozen beforehand, also at the reference itself."""
    params, _, forget, _ = problem
    u = objectives.random_direction(WIDTH, key=jax.random.key(2))
    states = hidden(params, forget.inputs)
    size = jnp.linalg.norm(states, axis=-1, keepdims=True)
    target = states + 0.5 * size * u.astype(states.dtype)[None, None]
    counted = jnp.asarray(numpy_counted(forget))

    def frozen(p):
        x = hidden(p, forget.inputs)
        cosine = jnp.sum(x * target, axis=-1)
        cosine = cosine / jnp.linalg.norm(x, axis=-1) / jnp.linalg.norm(target, axis=-1)
        return jnp.sum(jnp.where(counted, cosine, 0)) / jnp.sum(counted).astype(x.dtype)

    def deviation(p):
        fixed = {"apply": apply, "hidden": hidden, "reference_params": p}
        return objectives.representation_deviation(p, forget, **fixed, direction=u, tilt=0.5)[0]

    tolerance.check(jax.grad(deviation)(params), jax.grad(frozen)(params))


def test_a_state_of_zero_has_no_direction(problem):
    params, reference, forget, _ = problem
    dead = {**params, "embed": jnp.zeros_like(params["embed"])}

    def loss(p):
        fixed = {"apply": apply, "hidden": hidden, "reference_params": reference}
        return objectives.representation_deviation(p, forget, **fixed)[0]

    assert float(loss(dead)) == 0
    assert np.all(np.isfinite(jax.grad(loss)(dead)["embed"]))

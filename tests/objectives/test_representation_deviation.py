"""Representation deviation in NumPy float64: values, where it has no gradient and where it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.objectives import RepresentationDeviation, RetainKL, random_direction, with_retain
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


def states(apply, params, inputs):
    del apply
    return hidden(params, inputs)


@pytest.fixture
def problem():
    return make_problem()


def numpy_states(params, batch):
    return np.tanh(np.asarray(params["embed"], np.float64)[np.asarray(batch.inputs)])


def numpy_cosine(x, y):
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


@pytest.mark.parametrize("tilt", [0.3, 2.0, 0.0])
def test_the_cosine_of_the_counted_positions(problem, tilt, tolerance):
    params, reference, forget, _ = problem
    target = numpy_states(reference, forget)
    if tilt:
        u = random_direction(WIDTH, key=jax.random.key(1))
        norms = np.linalg.norm(target, axis=-1, keepdims=True)
        target = target + tilt * norms * np.asarray(u, np.float64)
    cosine = numpy_cosine(numpy_states(params, forget), target)
    expected = cosine[numpy_counted(forget)].mean()
    objective = RepresentationDeviation(states, seed=1, tilt=tilt)
    loss, aux = objective(apply, params, forget, None, reference)
    tolerance.check(loss, expected)
    tolerance.check(aux, {"forget_cosine": expected})


def test_the_retain_term(problem, tolerance):
    params, reference, forget, retain = problem
    given = (apply, params, forget, retain, reference)
    objective = RepresentationDeviation(states)
    bare, _ = objective(*given)
    whole, aux = with_retain(objective, weight=0.6)(*given)
    tolerance.check(whole, float(bare) + 0.6 * numpy_mean_nll(params, retain))
    assert set(aux) == {"forget_cosine", "retain_nll"}
    whole, _ = with_retain(objective, RetainKL(), weight=0.6)(*given)
    tolerance.check(whole, float(bare) + 0.6 * numpy_kl(reference, params, retain))


def test_without_a_tilt_the_reference_is_a_maximum_and_with_one_it_is_not(problem, tolerance):
    params, _, forget, _ = problem

    def gradient(tilt):
        objective = RepresentationDeviation(states, tilt=tilt)
        return jax.grad(lambda p: objective(apply, p, forget, None, params)[0])(params)["embed"]

    np.testing.assert_allclose(gradient(0.0), 0, atol=tolerance.contraction)
    assert np.abs(gradient(0.1)).max() > 1e-3


def test_the_reference_is_a_constant(problem, tolerance):
    """The gradient is that of targets frozen beforehand, also at the reference itself."""
    params, _, forget, _ = problem
    u = random_direction(WIDTH, key=jax.random.key(2))
    before = hidden(params, forget.inputs)
    size = jnp.linalg.norm(before, axis=-1, keepdims=True)
    target = before + 0.5 * size * u.astype(before.dtype)[None, None]
    counted = jnp.asarray(numpy_counted(forget))

    def frozen(p):
        x = hidden(p, forget.inputs)
        cosine = jnp.sum(x * target, axis=-1)
        cosine = cosine / jnp.linalg.norm(x, axis=-1) / jnp.linalg.norm(target, axis=-1)
        return jnp.sum(jnp.where(counted, cosine, 0)) / jnp.sum(counted).astype(x.dtype)

    def deviation(p):
        return RepresentationDeviation(states, seed=2, tilt=0.5)(apply, p, forget, None, p)[0]

    tolerance.check(jax.grad(deviation)(params), jax.grad(frozen)(params))


def test_a_state_of_zero_has_no_direction(problem):
    params, reference, forget, _ = problem
    dead = {**params, "embed": jnp.zeros_like(params["embed"])}

    def loss(p):
        return RepresentationDeviation(states)(apply, p, forget, None, reference)[0]

    assert float(loss(dead)) == 0
    assert np.all(np.isfinite(jax.grad(loss)(dead)["embed"]))

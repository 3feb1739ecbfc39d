"""Confidence and hidden variance of a task, against NumPy and against K-FAC's moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jedit
from jedit.core.batch import Batch
from jedit.curvature import factors
from jedit.metrics import task_predictors

SEQ, WIDTH, CLASSES = 3, 5, 4


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["head"] + params["bias"].reshape(1, 1, -1)


@dataclasses.dataclass(frozen=True)
class Hidden:
    def __call__(self, apply, params, x):
        del apply
        return jnp.tanh(x @ params["up"])


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    shapes = {"up": (2, WIDTH), "head": (WIDTH, CLASSES), "bias": (CLASSES,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = rng.normal(size=(11, SEQ, 2))
    mask = (rng.random((11, SEQ)) < 0.6).astype(np.float32)
    mask[0] = 0  # a row that fills up a batch
    return params, Batch(jnp.asarray(x), mask=jnp.asarray(mask))


def take(rows, part):
    return jax.tree.map(lambda a: a[part], rows)


def by_numpy(params, rows):
    up, head, bias = (np.asarray(params[k], np.float64) for k in ("up", "head", "bias"))
    h = np.tanh(np.asarray(rows.inputs, np.float64) @ up)[np.asarray(rows.mask) > 0]
    logits = h @ head + bias
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.array([p.max(axis=1).mean(), np.trace(np.cov(h.T, bias=True))])


def test_they_are_those_of_the_outputs_that_count(case, tolerance):
    params, rows = case
    expected = by_numpy(params, rows)
    tolerance.check(np.array(task_predictors(apply, params, rows, hidden=Hidden())), expected)
    # In other batches, one of which counts nothing, and with garbage where nothing counts.
    parts = [take(rows, slice(0, 1)), take(rows, slice(1, 4)), take(rows, slice(4, None))]
    garbage = jnp.where(rows.mask[..., None] > 0, rows.inputs, jnp.nan)
    for given in (parts, rows._replace(inputs=garbage)):
        found = task_predictors(apply, params, given, hidden=Hidden())
        tolerance.check(np.array(found), expected)


def test_a_large_mean_costs_no_digits(case):
    params, rows = case
    far = lambda apply, p, x: Hidden()(apply, p, x) + 1e4  # noqa: E731
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (params, rows))
    found = task_predictors(apply, *single, hidden=far)
    # A square of a mean of 1e4 has no digit after the point left in float32.
    assert found.hidden_variance == pytest.approx(by_numpy(params, rows)[1], rel=1e-2)


def test_the_variance_is_in_the_moment_of_a_site_with_a_bias(case, tolerance):
    params, rows = case
    rows = rows._replace(valid=rows.mask)
    estimator = jedit.kfac(apply, jedit.likelihoods.Categorical(), select="head|bias")
    curvature = jedit.estimate(estimator, params, [rows], key=jax.random.key(0))
    moment = np.asarray(factors(curvature, "head")[0], np.float64)
    mean = moment[-1, :-1]
    found = task_predictors(apply, params, rows, hidden=jedit.tracing.Entering("head"))
    tolerance.check(found.hidden_variance, np.trace(moment[:-1, :-1]) - mean @ mean)


def test_mistakes_are_refused(case):
    params, rows = case
    nothing = rows._replace(mask=jnp.zeros_like(rows.mask))
    with pytest.raises(ValueError, match="no output counts"):
        task_predictors(apply, params, nothing, hidden=Hidden())
    narrow = lambda *given: given[2][:, 0]  # noqa: E731
    with pytest.raises(ValueError, match="hidden states of shape"):
        task_predictors(apply, params, rows, hidden=narrow)
    broken = {**params, "head": params["head"] * jnp.nan}
    with pytest.raises(FloatingPointError, match="not finite"):
        task_predictors(apply, broken, rows, hidden=Hidden())

"""Ssiuu: its steps from a closed form in NumPy, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jedit.core.batch import Batch
from jedit.methods import CATALOGUE, ssiuu
from jedit.objectives import GA, with_retain
from jedit.training import TrainingMethod, unlearn


@pytest.fixture(autouse=True)
def _standard_promotion():
    """What optax's optimizers mix, strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(params, inputs):
    return inputs @ params["w"]


def rows(seed, n=5):
    rng = np.random.default_rng(seed)
    return Batch(jnp.asarray(rng.normal(size=(n, 4))), jnp.asarray(rng.integers(0, 3, n)))


def start(seed=1):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)))}


def numpy_attribution(w, x, y, score):
    """W_ij P x_i (1[j = y] - p_j), or without P."""
    p = scipy.special.softmax(x @ w)
    return w * np.outer(x, np.eye(3)[y] - p) * (p[y] if score == "probability" else 1)


def numpy_penalty_gradient(before, w, batch, score):
    """Central differences, entry by entry; the mask and A(θ_{t-1}) do not move."""
    x, y = np.asarray(batch.inputs, np.float64), np.asarray(batch.targets)
    fixed = [numpy_attribution(before, x[n], y[n], score) for n in range(len(y))]
    masks = [numpy_attribution(w, x[n], y[n], score) < 0 for n in range(len(y))]

    def value(w):
        now = [numpy_attribution(w, x[n], y[n], score) for n in range(len(y))]
        terms = [np.abs(b - a)[m].sum() for a, b, m in zip(now, fixed, masks, strict=True)]
        return np.mean(terms)

    gradient = np.zeros_like(w)
    for place in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[place] = 1e-6
        gradient[place] = (value(w + step) - value(w - step)) / 2e-6
    return gradient


def numpy_gradient(w, batch):
    x, y = np.asarray(batch.inputs, np.float64), np.asarray(batch.targets)
    return x.T @ (scipy.special.softmax(x @ w, axis=1) - np.eye(3)[y]) / len(y)


def steps_by_hand(forget, retain, rate, strength, score):
    """Three steps by plain SGD, and how many weights turned."""
    w = np.asarray(start()["w"], np.float64)
    before, turned = w, []
    for t in range(3):
        u = -numpy_gradient(w, forget) + numpy_gradient(w, retain)
        if t > 0:
            u = u + strength * numpy_penalty_gradient(before, w, forget, score)
        before, w = w, w - rate * u
        turned.append(np.sum((before < 0) != (w < 0)))
    return w, turned


@pytest.mark.parametrize("score", ["probability", "log_probability"])
def test_three_steps_are_the_ones_by_hand(score, key, tolerance):
    forget, retain, rate, strength = rows(2), rows(3), 0.4, 0.7
    method = ssiuu(optax.sgd(rate), strength=strength, score=score)
    # A row that counts nothing has no share in any mean.
    more = Batch(*(jnp.concatenate([x, x[:1]]) for x in forget[:2]), mask=jnp.arange(6) < 5)
    moved, history = unlearn(method, model, start(), more, retain, steps=3, key=key)
    w, turned = steps_by_hand(forget, retain, rate, strength, score)
    assert sum(turned[:2]) >= 2  # which units hold an answer down is asked anew at each step
    tolerance.check(moved["w"], w, "factorization")
    assert history["loss"].shape == (3,)


def test_units_are_what_is_trained_and_whole_numbers_may_stand_beside(key, tolerance):
    """A frozen matrix before the trained one is as good as other inputs."""
    frozen = np.random.default_rng(4).normal(size=(4, 4))

    def two(params, inputs):
        return inputs[:, params["order"]] @ params["a"] @ params["b"]

    params = {"a": jnp.asarray(frozen), "b": start()["w"], "order": jnp.array([2, 0, 1, 3])}
    forget, retain = rows(2), rows(3)
    seen = [x._replace(inputs=x.inputs[:, params["order"]] @ frozen) for x in (forget, retain)]
    method = ssiuu(optax.sgd(0.05), strength=0.3)._replace(trainable="^b$")
    moved, _ = unlearn(method, two, params, forget, retain, steps=3, key=key)
    for name in ("a", "order"):
        np.testing.assert_array_equal(moved[name], params[name])
    tolerance.check(moved["b"], steps_by_hand(*seen, 0.05, 0.3, "probability")[0], "factorization")


def test_of_no_strength_it_is_its_objective(key):
    given = (model, start(), rows(2), rows(3))
    plain = TrainingMethod(with_retain(GA()), optax.sgd(0.1))
    methods = (ssiuu(optax.sgd(0.1), strength=0.0), plain)
    first, second = (unlearn(m, *given, steps=3, key=jax.random.clone(key))[0] for m in methods)
    np.testing.assert_allclose(first["w"], second["w"], rtol=1e-6)


def test_of_narrow_parameters_the_sum_is_wide():
    """In bfloat16 the 257th of a row's gradients would be lost."""
    params = {"w": jnp.ones((1, 2), jnp.bfloat16)}
    transform = ssiuu(optax.identity(), strength=1.0).optimizer
    state = transform.init(params)
    _, state = transform.update(params, state, params, row_score_fn=score_of, rows=many(1))
    given = {"row_score_fn": score_of}
    moved = {"w": 2 * params["w"]}
    zero = jax.tree.map(jnp.zeros_like, params)
    one, _ = transform.update(zero, state, moved, rows=many(1), **given)
    all_of_them, _ = transform.update(zero, state, moved, rows=many(600), **given)
    assert np.any(np.asarray(one["w"], float))
    np.testing.assert_array_equal(all_of_them["w"], one["w"])


def many(n):
    return Batch(jnp.ones((n, 1)), jnp.zeros(n, int))


def score_of(params, row):
    return -jnp.sum((params["w"] * row.inputs[None].astype(params["w"].dtype)) ** 2)


def test_mistakes_get_a_sentence():
    params = start()
    method = ssiuu(optax.adam(0.01))
    assert CATALOGUE["Ssiuu"].settings == {"strength": 0.01, "score": "probability"}
    with pytest.raises(ValueError, match="strength must not be negative"):
        ssiuu(optax.sgd(0.1), strength=-1.0)
    with pytest.raises(ValueError, match="score must be 'probability'"):
        ssiuu(optax.sgd(0.1), score="odds")
    state = method.optimizer.init(params)
    with pytest.raises(ValueError, match="row_score_fn and rows"):
        method.optimizer.update(params, state, params)

"""Retain-orthogonal directions against dense algebra and against a search that knows no formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.geometry import retain_neutral_perturbation, retain_orthogonal

SHAPES = {"a": (3, 4), "b": (5,)}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in tree.values()])


@pytest.fixture
def gradients():
    rng = np.random.default_rng(11)
    shared = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}

    def mixed(share):
        return {
            name: jnp.asarray(share * shared[name] + rng.normal(size=shape))
            for name, shape in SHAPES.items()
        }

    return mixed(1.5), mixed(1.2)


def test_the_direction_is_the_projection(gradients, tolerance):
    forget, retain = gradients
    q, info = retain_orthogonal(forget, retain)
    f, r = flat(forget), flat(retain)
    expected = f - (f @ r) / (r @ r) * r
    np.testing.assert_allclose(flat(q), expected, atol=10 * tolerance.rounding)
    cos = f @ r / np.linalg.norm(f) / np.linalg.norm(r)
    assert 0.3 < cos < 0.95
    assert float(info.cos) == pytest.approx(cos, abs=tolerance.contraction)
    assert float(info.sin) == pytest.approx(np.sqrt(1 - cos**2), abs=tolerance.contraction)
    assert float(info.forget_gain) == pytest.approx(f @ expected, rel=tolerance.contraction)
    assert abs(float(info.retain_change)) < tolerance.contraction
    assert not info.is_parallel


@pytest.mark.parametrize("radius", [0.3, 7.0])
def test_the_gain_is_radius_times_norm_times_sine(gradients, radius, tolerance):
    forget, retain = gradients
    delta, info = retain_neutral_perturbation(forget, retain, radius=radius)
    f, r, d = flat(forget), flat(retain), flat(delta)
    assert np.linalg.norm(d) == pytest.approx(radius, rel=tolerance.contraction)
    assert abs(r @ d) < 10 * tolerance.contraction * radius
    sine = np.sqrt(1 - (f @ r / np.linalg.norm(f) / np.linalg.norm(r)) ** 2)
    gain = radius * np.linalg.norm(f) * sine
    assert f @ d == pytest.approx(gain, rel=tolerance.contraction)
    assert float(info.forget_gain) == pytest.approx(gain, rel=tolerance.contraction)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_a_search_finds_no_better_perturbation(gradients, scope):
    """Projected gradient ascent, by alternating projections, from many starts."""
    forget, retain = gradients
    radius = 0.8
    delta, info = retain_neutral_perturbation(forget, retain, radius=radius, scope=scope)
    f = flat(forget)
    rows = [flat(retain)]
    if scope == "leaf":
        zero = jax.tree.map(jnp.zeros_like, retain)
        rows = [flat({**zero, name: retain[name]}) for name in retain]
    rng = np.random.default_rng(0)
    best = -np.inf
    for _ in range(20):
        d = rng.normal(size=f.shape)
        for _ in range(300):
            d = d + 0.1 * f
            for r in rows:
                d = d - (r @ d) / (r @ r) * r
            d = d * min(1, radius / np.linalg.norm(d))
        best = max(best, f @ d)
    assert float(info.forget_gain) == pytest.approx(best, rel=1e-4)
    assert f @ flat(delta) == pytest.approx(best, rel=1e-4)


def test_in_a_metric_it_solves_the_problem_of_that_metric(gradients, tolerance):
    forget, retain = gradients
    rng = np.random.default_rng(2)
    root = rng.normal(size=(17, 17)) + 6 * np.eye(17)
    m = root @ root.T / 17
    inverse = jnp.asarray(np.linalg.inv(m))

    def metric(tree):
        out = inverse @ jnp.concatenate([leaf.ravel() for leaf in tree.values()])
        return {"a": out[:12].reshape(3, 4), "b": out[12:]}

    delta, _ = retain_neutral_perturbation(forget, retain, radius=0.7, metric=metric)
    # The same problem in y = Lᵀδ, m = L Lᵀ, where the metric is the identity.
    factor = np.linalg.cholesky(m)
    f, r = (np.linalg.solve(factor, flat(g)) for g in (forget, retain))
    q = f - (f @ r) / (r @ r) * r
    expected = np.linalg.solve(factor.T, 0.7 * q / np.linalg.norm(q))
    np.testing.assert_allclose(flat(delta), expected, atol=100 * tolerance.contraction)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e-12])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_parallel_gradients_give_zero_and_a_flag(gradients, factor, scope):
    forget, _ = gradients
    retain = jax.tree.map(lambda g: factor * g, forget)
    delta, info = retain_neutral_perturbation(forget, retain, radius=0.5, scope=scope)
    assert info.is_parallel
    assert not np.any(flat(delta))
    assert float(info.sin) == 0
    assert float(info.forget_gain) == 0


def test_nearly_parallel_gradients_keep_what_differs():
    forget = {"a": jnp.asarray([1.0, 1e-4])}
    q, info = retain_orthogonal(forget, {"a": jnp.asarray([2.0, 0.0])})
    np.testing.assert_allclose(q["a"], [0, 1e-4], rtol=1e-5, atol=1e-12)
    assert not info.is_parallel
    assert float(info.sin) == pytest.approx(1e-4, rel=1e-4)


def test_a_vanishing_gradient_is_no_constraint_and_no_number_is_lost(gradients, tolerance):
    forget, _ = gradients
    nothing = jax.tree.map(jnp.zeros_like, forget)
    q, info = retain_orthogonal(forget, nothing)
    tolerance.check(q, forget, "rounding")
    assert float(info.cos) == 0
    assert float(info.sin) == pytest.approx(1, abs=tolerance.contraction)
    q, info = retain_orthogonal(nothing, forget)
    assert not np.any(flat(q))
    assert info.is_parallel


def test_it_jits_vmaps_and_keeps_dtypes(gradients, tolerance):
    forget, retain = gradients
    run = partial(retain_neutral_perturbation, radius=0.5, scope="leaf")
    expected = run(forget, retain)
    tolerance.check(jax.jit(run)(forget, retain)[0], expected[0])
    stack = jax.tree.map(lambda x: jnp.stack([2 * x, x]), forget)
    many, _ = jax.vmap(lambda f: run(f, retain))(stack)
    tolerance.check(jax.tree.map(lambda x: x[1], many), expected[0])
    half, info = run(*jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert info.cos.dtype == jnp.float32


def test_mistakes_get_a_sentence(gradients):
    forget, retain = gradients
    with pytest.raises(ValueError, match="scope must be one of global, leaf"):
        retain_orthogonal(forget, retain, scope="layer")
    with pytest.raises(ValueError, match="differ in structure"):
        retain_orthogonal(forget, {"a": retain["a"]})


def doubled(tree):
    """An inverse metric that is not the identity."""
    return {"a": 2 * tree["a"], "b": 1e-3 * tree["b"]}


@pytest.mark.parametrize("metric", [None, doubled])
@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize(
    ("forget_length", "retain_length"),
    [(1e-19, 1e-19), (1e-20, 1e-20), (1e20, 1e20), (1e25, 1e-25)],
)
def test_gradients_may_be_of_any_length_in_float32(
    gradients, scope, metric, forget_length, retain_length
):
    lengths = (forget_length, retain_length)
    whole = [
        jax.tree.map(lambda x, s=s: np.asarray(x, np.float64) * s, tree)
        for tree, s in zip(gradients, lengths, strict=True)
    ]
    narrow = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in whole]
    f, r = whole
    up_f, up_r = (doubled(x) if metric else x for x in whole)
    expected = {}
    for name in SHAPES:
        inside = [name] if scope == "leaf" else SHAPES
        product, norm = (sum(np.sum(x[n] * up_r[n]) for n in inside) for x in (f, r))
        expected[name] = up_f[name] - product / norm * up_r[name]
    q, info = jax.jit(partial(retain_orthogonal, scope=scope, metric=metric))(*narrow)
    size = np.linalg.norm(flat(expected))
    assert not info.is_parallel
    np.testing.assert_allclose(flat(q), flat(expected), atol=1e-5 * size)
    assert abs(flat(r) @ flat(q)) < 1e-6 * np.linalg.norm(flat(r)) * size
    delta, info = retain_neutral_perturbation(*narrow, radius=0.5, scope=scope, metric=metric)
    length = np.sqrt(flat(f) @ flat(expected))
    np.testing.assert_allclose(flat(delta), 0.5 / length * flat(expected), rtol=0, atol=1e-5)
    assert float(info.forget_gain) == pytest.approx(0.5 * length, rel=1e-4)
    cosine = flat(f) @ flat(up_r) / np.sqrt(flat(f) @ flat(up_f)) / np.sqrt(flat(r) @ flat(up_r))
    assert float(info.cos) == pytest.approx(cosine, abs=1e-5)


def test_a_leaf_has_a_constraint_of_its_own_however_small_it_is(gradients):
    forget, retain = (jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in gradients)
    short = retain | {"b": retain["b"] * 1e-25}
    q, _ = retain_orthogonal(forget, retain, scope="leaf")
    found, _ = retain_orthogonal(forget, short, scope="leaf")
    np.testing.assert_allclose(flat(found), flat(q), atol=1e-5)

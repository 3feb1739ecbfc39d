"""The streaming basis against NumPy's QR, and the joint rule against its own formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac, quadratic_form
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import (
    adam_whitening,
    curvature_whitening,
    joint_direction,
    project_out,
    retain_subspace,
)

SHAPES = {"a": (3, 4), "b": (6,)}


def tree_of(rng):
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in tree.values()])


def parts(tree, scope):
    """The vectors that have a basis of their own."""
    if scope == "global":
        return [flat(tree)]
    return [np.ravel(np.asarray(leaf, np.float64)) for leaf in tree.values()]


@pytest.fixture
def gradients():
    rng = np.random.default_rng(5)
    return [tree_of(rng) for _ in range(5)], tree_of(rng), tree_of(rng)


def run(subspace, stream):
    state = subspace.init(stream[0])
    for gradient in stream:
        state = subspace.update(state, gradient)
    return state


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("number", [2, 5])
def test_what_is_left_is_orthogonal_to_the_last_gradients(gradients, scope, number, tolerance):
    stream, forget, _ = gradients
    subspace = retain_subspace(3, scope=scope)
    basis = subspace.value(run(subspace, stream[:number]))
    left = project_out(basis, forget, scope=scope)
    kept = stream[:number][-3:]
    columns = zip(*(parts(g, scope) for g in kept), strict=True)
    expected = []
    for vector, rows in zip(parts(forget, scope), columns, strict=True):
        q, _ = np.linalg.qr(np.stack(rows).T)
        expected.append(vector - q @ (q.T @ vector))
    np.testing.assert_allclose(
        flat(left), np.concatenate(expected), atol=100 * tolerance.contraction
    )


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_repeated_and_vanishing_gradients_take_no_direction(gradients, scope, tolerance):
    stream, forget, _ = gradients
    subspace = retain_subspace(4, scope=scope)
    nothing = jax.tree.map(jnp.zeros_like, forget)
    doubled = jax.tree.map(lambda g: 2.5 * g, stream[0])
    basis = subspace.value(run(subspace, [stream[0], doubled, nothing, stream[1]]))
    rows = np.stack([flat(jax.tree.map(lambda q, i=i: q[i], basis)) for i in range(4)])
    count = 1 if scope == "global" else 2
    norms = np.sum(rows**2, axis=1)
    np.testing.assert_allclose(norms, [count, 0, 0, count], atol=100 * tolerance.contraction)
    assert np.isfinite(flat(project_out(basis, forget, scope=scope))).all()


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_frequent_directions_keep_the_covariance_within_their_bound(scope, tolerance):
    rng = np.random.default_rng(1)
    loud = [tree_of(rng) for _ in range(2)]
    stream = [
        jax.tree.map(
            lambda u, v, w: float(rng.normal()) * 3 * u + float(rng.normal()) * 3 * v + 0.1 * w,
            *loud,
            tree_of(rng),
        )
        for _ in range(30)
    ]
    rank = 4
    subspace = retain_subspace(rank, scope=scope, sketch="frequent_directions")
    state = run(subspace, stream)
    assert int(state.count) == 30
    columns = list(zip(*(parts(g, scope) for g in stream), strict=True))
    sketches = zip(
        *(parts(jax.tree.map(lambda r, i=i: r[i], state.rows), scope) for i in range(rank)),
        strict=True,
    )
    for rows, sketch in zip(columns, sketches, strict=True):
        rows, sketch = np.stack(rows), np.stack(sketch)
        missing = np.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
        total = np.sum(rows**2)
        slack = 100 * tolerance.contraction * total
        assert missing.min() > -slack
        assert missing.max() <= total / rank + slack
        # The two loud directions are in it.
        q, _ = np.linalg.qr(np.linalg.svd(sketch)[2][:2].T)
        top = np.linalg.svd(rows)[2][:2]
        np.testing.assert_allclose(np.linalg.norm(q.T @ top.T, axis=0), 1, atol=0.02)


def test_adams_metric_whitens_and_comes_back(gradients, tolerance):
    stream, forget, _ = gradients
    rng = np.random.default_rng(3)
    second = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 9, x.shape)), forget)
    eps = 0.01
    whitening = adam_whitening(second, eps)
    subspace = retain_subspace(3, scope="global")
    basis = subspace.value(run(subspace, stream[:3]), whitening)
    left = whitening.unwhiten(project_out(basis, whitening.whiten(forget), scope="global"))
    h = np.sqrt(flat(second)) + eps
    z = np.stack([flat(g) for g in stream[:3]]) / np.sqrt(h)
    q, _ = np.linalg.qr(z.T)
    z_f = flat(forget) / np.sqrt(h)
    expected = (z_f - q @ (q.T @ z_f)) * np.sqrt(h)
    np.testing.assert_allclose(flat(left), expected, atol=100 * tolerance.contraction)
    # What GU is about: Adam's step h⁻¹ g leaves every retain loss alone, to first order.
    for g in stream[:3]:
        assert abs(flat(g) @ (flat(left) / h)) < 1e3 * tolerance.contraction


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize(
    ("threshold", "ratio", "pull"), [(0.0, 1.0, 0.0), (0.01, 0.2, 0.3), (2.0, 1.0, 0.7)]
)
def test_the_joint_rule_is_its_formula(gradients, scope, threshold, ratio, pull, tolerance):
    stream, forget, retain = gradients
    subspace = retain_subspace(4, scope=scope)
    basis = subspace.value(run(subspace, stream))
    options = {"threshold": threshold, "ratio": ratio, "pull": pull}
    found = joint_direction(basis, forget, retain, scope=scope, **options)
    rows = [
        np.stack(r)
        for r in zip(
            *(parts(jax.tree.map(lambda q, i=i: q[i], basis), scope) for i in range(4)), strict=True
        )
    ]
    expected = []
    for q, z_f, z_r in zip(rows, parts(forget, scope), parts(retain, scope), strict=True):
        a, b = q @ z_f, q @ z_r
        off = z_f - q.T @ a
        inside = q.T @ np.where(a * b > threshold * np.linalg.norm(z_f) * np.linalg.norm(z_r), a, 0)
        size = np.linalg.norm(inside)
        scale = min(1, ratio * np.linalg.norm(off) / size) if size else 1
        expected.append(off + scale * inside + pull * q.T @ b)
    np.testing.assert_allclose(
        flat(found), np.concatenate(expected), atol=1e3 * tolerance.contraction
    )


def test_rounding_does_not_decide_which_directions_agree(gradients):
    stream, forget, _ = gradients
    stream = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in stream[:4]]
    subspace = retain_subspace(4, scope="global")

    @partial(jax.jit, static_argnames="threshold")
    def direction(rows, threshold):
        basis = subspace.value(run(subspace, rows))
        return joint_direction(basis, forget, rows[0], scope="global", threshold=threshold)

    def answer(scale, threshold=None):
        rows = [jax.tree.map(lambda x: x * jnp.float32(scale), g) for g in stream]
        return flat(direction(rows, threshold))

    scales = 1 + 1e-6 * np.arange(1, 9)
    found = [answer(scale) for scale in scales]
    np.testing.assert_allclose(found, np.stack([answer(1.0)] * 8), atol=1e-4)
    decided = [answer(scale, threshold=0.0) for scale in scales]
    assert np.max(np.abs(decided - decided[0])) > 0.01  # as the docstring says
    np.testing.assert_allclose(answer(1e-22), answer(1.0), atol=1e-4)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("sketch", ["fifo", "frequent_directions"])
@pytest.mark.parametrize("length", [1e-22, 1e22])
def test_a_basis_does_not_depend_on_the_gradients_length(gradients, scope, sketch, length):
    stream, forget, _ = gradients
    narrow = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in stream[:3]]
    subspace = retain_subspace(2, scope=scope, sketch=sketch)

    def left(scale):
        rows = [jax.tree.map(lambda x: x * jnp.float32(scale), g) for g in narrow]
        return flat(project_out(subspace.value(run(subspace, rows)), forget, scope=scope))

    np.testing.assert_allclose(left(length), left(1.0), atol=1e-4)


def test_it_jits_and_vmaps_and_keeps_dtypes(gradients, tolerance):
    stream, forget, _ = gradients
    subspace = retain_subspace(2)
    state = run(subspace, stream[:2])
    update = jax.jit(subspace.update)
    jitted = update(update(subspace.init(forget), stream[0]), stream[1])
    tolerance.check(jitted.rows, state.rows)
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), forget)
    basis = subspace.value(state)
    many = jax.vmap(lambda g: project_out(basis, g))(stack)
    tolerance.check(jax.tree.map(lambda x: x[0], many), project_out(basis, forget))
    half = project_out(basis, jax.tree.map(lambda x: x.astype(jnp.bfloat16), forget))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_a_curvature_is_a_metric_too(key, tolerance):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    batch = Batch(jnp.asarray(rng.normal(size=(50, 4))))
    linear = lambda p, x: x @ p["w"]  # noqa: E731
    curvature = estimate(kfac(linear, Categorical()), params, [batch], key=key)
    options = {"damping": 0.1}
    whitening = curvature_whitening(curvature, damping=0.1)
    gradient = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    z = whitening.whiten(gradient)
    tolerance.check(whitening.unwhiten(z), gradient, "factorization")
    size = jnp.sqrt(quadratic_form(curvature, whitening.whiten(z), **options))
    assert float(size) == pytest.approx(np.linalg.norm(z["w"]), rel=10 * tolerance.factorization)


def test_mistakes_get_a_sentence():
    for mistake in ({"rank": 0}, {"rank": 2, "scope": "all"}, {"rank": 2, "sketch": "svd"}):
        with pytest.raises(
            ValueError, match="rank must be at least 1|(scope|sketch) must be one of"
        ):
            retain_subspace(**mistake)

"""Engrams against NumPy's pseudo-inverse, against their own objective, and added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.data import answers_only
from jedit.edits import apply_edit
from jedit.methods import engram
from jedit.methods.engrams.curvature_engram import joint_basis
from jedit.methods.engrams.engram import solve


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


@pytest.fixture
def scene():
    """Three parts of the data with inputs of their own, and their curvatures."""
    rng = np.random.default_rng(3)
    shapes = {"w": (6, 5), "b": (5,), "v": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    parts = [rng.normal(size=(n, 6)) * rng.uniform(0.2, 2, 6) for n in (30, 17, 24)]
    estimator = kfac(network, Categorical())
    curvatures = [
        estimate(estimator, params, [Batch(jnp.asarray(x))], key=jax.random.key(0)) for x in parts
    ]
    return params, parts, curvatures


def rows(x):
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def weights(tree):
    return np.concatenate([np.asarray(tree["w"]), np.asarray(tree["b"])[None]])


def test_an_engram_is_the_least_squares_solution(scene, tolerance):
    params, parts, curvatures = scene
    edit, info = engram(params, curvatures[0], curvatures[1:], strength="whole")
    target, rest = rows(parts[0]), rows(np.concatenate(parts[1:]))
    w = weights(params)
    # min ‖X₊(W₊ - W)‖² + ‖X₋W₊‖² as one least-squares problem, by NumPy's own solver.
    expected = np.linalg.lstsq(
        np.concatenate([target, rest]),
        np.concatenate([target @ w, np.zeros((len(rest), 5))]),
        rcond=None,
    )[0]
    found = -weights(edit.blocks)
    np.testing.assert_allclose(found, expected, atol=10 * tolerance.factorization)
    gradient = target.T @ target @ (found - w) + rest.T @ rest @ found
    assert np.abs(gradient).max() < 1e3 * tolerance.factorization
    ratio = np.linalg.norm(expected[:-1]) / np.linalg.norm(w[:-1])  # without the bias
    assert float(info.relative_norm["w"][0]) == pytest.approx(ratio, rel=tolerance.factorization)


def test_engrams_of_a_partition_add_up_to_the_weights(scene, tolerance):
    params, _, curvatures = scene
    total = 0.0
    for i in range(3):
        others = [c for k, c in enumerate(curvatures) if k != i]
        edit, _ = engram(params, curvatures[i], others, strength="whole")
        total = total + weights(edit.blocks)
    np.testing.assert_allclose(total, -weights(params), atol=10 * tolerance.factorization)


def test_erasing_in_any_order_or_at_once_is_one_thing(scene, tolerance):
    params, _, (a, b, rest) = scene
    edit_a, _ = engram(params, a, [b, rest], strength="whole", scale=0.7)
    edit_b, _ = engram(params, b, [a, rest], strength="whole", scale=0.7)
    both, _ = engram(params, [a, b], rest, strength="whole", scale=0.7)
    first = apply_edit(apply_edit(params, edit_a), edit_b)
    second = apply_edit(apply_edit(params, edit_b), edit_a)
    at_once = apply_edit(params, both)
    tolerance.check(first, second, "rounding")
    tolerance.check(first, at_once, "factorization")


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_whole_is_the_papers_mean_moments_times_the_count_ratio(scene, scale, tolerance):
    """The paper's P = C⁺ C₊ W, of mean moments, times n/N: that ratio is in W₊ already."""
    params, parts, (a, b, rest) = scene
    target, whole = rows(np.concatenate(parts[:2])), rows(np.concatenate(parts))
    mean = lambda x: x.T @ x / len(x)  # noqa: E731
    p = np.linalg.pinv(mean(whole)) @ mean(target) @ weights(params)
    edit, info = engram(params, [a, b], rest, strength="whole", scale=scale)
    expected = -scale * len(target) / len(whole) * p
    np.testing.assert_allclose(weights(edit.blocks), expected, atol=10 * tolerance.factorization)
    assert float(info.strength["v"][0]) == 1


def test_adaptive_goes_by_norms_without_the_bias(scene, tolerance):
    params, _, (a, b, rest) = scene
    params = params | {"b": 30 * params["b"]}
    whole, _ = engram(params, [a, b], rest, strength="whole")
    adaptive, info = engram(params, [a, b], rest, strength="adaptive", scale=0.7)
    norm = lambda tree, name: np.linalg.norm(np.asarray(tree[name]))  # noqa: E731
    relative = {name: norm(whole.blocks, name) / norm(params, name) for name in ("w", "v")}
    for name, bias in (("w", "b"), ("v", None)):
        f = relative[name] / max(relative.values())
        assert float(info.strength[name][0]) == pytest.approx(f, rel=1e-5)
        for path in (name, bias) if bias else (name,):
            tolerance.check(adaptive.blocks[path], 0.7 * f * whole.blocks[path], "contraction")


def test_an_eigenvalue_of_rounding_is_cut_in_any_dtype(tolerance):
    """A direction of 1e-13 of the energy, of which the target holds what no sum of both does."""
    rng = np.random.default_rng(4)
    basis, w = np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.normal(size=(4, 3))
    whole = basis * np.array([1e-13, 0.3, 0.7, 2.0]) @ basis.T
    target = basis * np.array([1e-8, 0.1, 0.2, 1.0]) @ basis.T  # as a float32 sum may round it
    found = np.asarray(solve(*(jnp.asarray(m) for m in (target, whole, w))))
    rtol = 4 * np.finfo(np.float32).eps
    expected = np.linalg.pinv(whole, rtol=rtol, hermitian=True) @ target @ w
    np.testing.assert_allclose(found, expected, atol=10 * tolerance.factorization)
    assert np.linalg.norm(found) < np.linalg.norm(w)
    x = joint_basis(jnp.asarray(target), jnp.asarray(whole - target))
    assert int((np.linalg.norm(np.asarray(x.basis), axis=0) > 0).sum()) == 3


def test_answers_only_takes_the_answers_tokens_alone(tolerance):
    """A mask says where the loss counts; moments of inputs go over all that is valid."""
    apply = lambda p, tokens: jnp.tanh(p["table"][tokens]) @ p["head"]  # noqa: E731
    rng = np.random.default_rng(6)
    params = {
        "table": jnp.asarray(rng.normal(size=(7, 4))),
        "head": jnp.asarray(rng.normal(size=(4, 7))),
    }
    estimator = kfac(apply, Categorical(), select="head")
    x, inputs, fitted = np.tanh(np.asarray(params["table"])), [], []
    for length in (3, 2):
        tokens = rng.integers(0, 7, size=(6, 5))
        mask = np.arange(5)[None] >= np.full((6, 1), length)
        batch = Batch(*map(jnp.asarray, (tokens, tokens, mask, np.ones((6, 5), bool))))
        key = jax.random.key(0)
        fitted.append(estimate(estimator, params, [answers_only(batch)], key=key))
        inputs.append(x[tokens[mask]])
    edit, _ = engram(params, *fitted, strength="whole")
    s, other = (m.T @ m for m in inputs)
    expected = -np.linalg.solve(s + other, s @ np.asarray(params["head"]))
    np.testing.assert_allclose(edit.blocks["head"], expected, atol=100 * tolerance.factorization)
    with pytest.raises(ValueError, match="says which outputs are answers; got None"):
        answers_only(Batch(x))


def test_a_table_is_shared_out_by_token_counts(tolerance):
    def apply(params, tokens):
        return params["table"][tokens] @ params["head"]

    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(4, 3))),
        "head": jnp.asarray(rng.normal(size=(3, 2))),
    }
    estimator = kfac(apply, Categorical(), select="table")
    target, rest = (
        estimate(estimator, params, [Batch(jnp.asarray(t))], key=jax.random.key(0))
        for t in ([[0, 1], [1, 1]], [[1, 2], [2, 2], [2, 1]])
    )
    edit, _ = engram(params, target, rest, strength="whole")
    share = np.array([1, 3 / 5, 0, 0])
    expected = -share[:, None] * np.asarray(params["table"])
    np.testing.assert_allclose(edit.blocks["table"], expected, atol=tolerance.contraction)


def test_unused_directions_stay(tolerance):
    """Where no data has been, W₊ is zero and the weight is left as it is."""
    linear = lambda p, x: x @ p["w"]  # noqa: E731
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(5, 2)))}
    x = rng.normal(size=(20, 5)) * np.array([1, 1, 1, 0, 0])
    estimator = kfac(linear, Categorical())
    halves = [
        estimate(estimator, params, [Batch(jnp.asarray(h))], key=jax.random.key(0))
        for h in (x[:9], x[9:])
    ]
    edit, _ = engram(params, *halves, strength="whole")
    np.testing.assert_allclose(edit.blocks["w"][3:], 0, atol=tolerance.rounding)
    assert np.abs(edit.blocks["w"][:3]).min() > 1e-3


def test_mistakes_get_a_sentence(scene):
    params, parts, curvatures = scene
    with pytest.raises(ValueError, match="strength must be one of adaptive, whole, got 'count'"):
        engram(params, curvatures[0], curvatures[1], strength="count")
    other = estimate(
        kfac(network, Categorical(), select="v"),
        params,
        [Batch(jnp.asarray(parts[0]))],
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match="curvatures of the same sites"):
        engram(params, curvatures[0], other)
    with pytest.raises(ValueError, match="one is empty"):
        engram(params, curvatures[0], [])


def test_a_parameter_of_several_sites_is_refused():
    """A curvature merges their moments with weights of their own: their sum is no S."""
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731
    params = {"w": jnp.eye(3)}
    batch = Batch(jnp.asarray(np.random.default_rng(0).normal(size=(9, 3))))
    curvature = estimate(kfac(tied, Categorical()), params, [batch], key=jax.random.key(0))
    with pytest.raises(ValueError, match="used at several sites"):
        engram(params, curvature, curvature)

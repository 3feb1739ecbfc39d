"""Engrams in the metric of the output KL against dense algebra, and against `engram`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import apply_edit
from jedit.methods import curvature_engram, engram
from jedit.methods.engrams.curvature_engram import joint_basis, solve


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


@pytest.fixture
def scene():
    """Three parts of the data with inputs of their own, and their curvatures."""
    rng = np.random.default_rng(3)
    shapes = {"w": (6, 5), "b": (5,), "v": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    parts = [rng.normal(size=(n, 6)) * rng.uniform(0.2, 2, 6) for n in (30, 17, 24)]
    estimator = kfac(network, Categorical(), fisher="exact")
    curvatures = [
        estimate(estimator, params, [Batch(jnp.asarray(x))], key=jax.random.key(0)) for x in parts
    ]
    return params, curvatures


def weights(tree):
    return np.concatenate([np.asarray(tree["w"], np.float64), np.asarray(tree["b"])[None]])


def moment(rng, d, rank=None):
    x = rng.normal(size=(rank or 3 * d, d)) * rng.uniform(0.3, 2, d)
    return x.T @ x


def as_arrays(*matrices):
    return tuple(jnp.asarray(m) for m in matrices)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_an_engram_minimises_the_predicted_kl(scene, damping, tolerance):
    """The stated quadratic, written out with Kronecker products over the flat weight."""
    params, curvatures = scene
    edit, info = curvature_engram(
        params, curvatures[0], curvatures[1], damping=damping, strength="whole", scale=0.7
    )
    metrics = []
    for curvature, number in zip(curvatures, (30, 17), strict=False):
        a, g = (np.asarray(m, np.float64) for m in factors(curvature, "w"))
        g = g + damping * np.trace(g) / 5 * np.eye(5)
        metrics.append(np.kron(number * a, g))
    w, v = weights(params).ravel(), -weights(edit.blocks).ravel() / 0.7

    def objective(v):
        return (v - w) @ metrics[0] @ (v - w) + v @ metrics[1] @ v

    gradient = 2 * (metrics[0] @ (v - w) + metrics[1] @ v)
    scale = np.abs(metrics[0] @ w).max()
    assert np.abs(gradient).max() < 100 * tolerance.factorization * scale
    rng = np.random.default_rng(0)
    for _ in range(3):
        assert objective(v + 0.1 * rng.normal(size=v.shape)) > objective(v)
    ratio = np.linalg.norm(v[:-5]) / np.linalg.norm(w[:-5])  # without the bias
    assert float(info.relative_norm["w"][0]) == pytest.approx(ratio, rel=tolerance.factorization)


def test_the_solution_is_the_dense_one(tolerance):
    rng = np.random.default_rng(0)
    s, g, s_rest, g_rest = (moment(rng, d) for d in (6, 4, 6, 4))
    g = 1e-3 * g  # the scale of a set counts
    w = rng.normal(size=(6, 4))
    plus, minus = np.kron(s, g), np.kron(s_rest, g_rest)
    expected = np.linalg.solve(plus + minus, plus @ w.ravel()).reshape(6, 4)
    found = solve(as_arrays(s, g), as_arrays(s_rest, g_rest), jnp.asarray(w))
    tolerance.check(found, expected, "factorization")


def test_a_joint_basis_makes_both_diagonal(tolerance):
    rng = np.random.default_rng(1)
    plus, minus = moment(rng, 5, rank=2), moment(rng, 5, rank=2)  # four of five dimensions
    x = joint_basis(*as_arrays(plus, minus))
    found = (np.asarray(x.basis.T @ m @ x.basis) / np.trace(m) for m in (plus, minus))
    is_kept = np.linalg.norm(x.basis, axis=0) > 0
    share = np.where(is_kept, x.share, 0)
    shares = (share, np.where(is_kept, 1 - share, 0))
    for matrix, expected in zip(found, shares, strict=True):
        np.testing.assert_allclose(matrix, np.diag(expected), atol=10 * tolerance.factorization)
    assert is_kept.sum() == 4
    both = np.asarray(x.basis @ x.inverse)
    np.testing.assert_allclose(both @ (plus + minus), plus + minus, atol=tolerance.factorization)


def test_singular_factors_leave_alone_what_no_output_sees(tolerance):
    """Inputs in two of four dimensions, outputs in two of three: the rest of W stays."""
    rng = np.random.default_rng(2)
    pad = lambda m, d: np.pad(m, ((0, d - len(m)),) * 2)  # noqa: E731
    s, s_rest = (pad(moment(rng, 2), 4) for _ in range(2))
    g, g_rest = (pad(moment(rng, 2), 3) for _ in range(2))
    w = rng.normal(size=(4, 3))
    found = np.asarray(solve(as_arrays(s, g), as_arrays(s_rest, g_rest), jnp.asarray(w)))
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found[2:], 0, atol=tolerance.rounding)
    np.testing.assert_allclose(found[:, 2], 0, atol=tolerance.rounding)
    residual = s @ found @ g + s_rest @ found @ g_rest - s @ w @ g
    assert np.abs(residual).max() < tolerance.factorization * np.abs(s @ w @ g).max()
    nothing = solve(as_arrays(0 * s, 0 * g), as_arrays(0 * s, 0 * g), jnp.asarray(w), 0.1)
    np.testing.assert_array_equal(nothing, 0)


def with_output_factor(curvature, make):
    changed = dict(curvature.factors)
    for block in curvature.blocks.values():
        old = changed[block.output]
        matrix = make(old.matrix.shape[-1]).astype(old.matrix.dtype)
        changed[block.output] = dataclasses.replace(old, matrix=matrix[None])
    return dataclasses.replace(curvature, factors=changed)


@pytest.mark.parametrize("strength", ["adaptive", "whole"])
def test_of_one_output_metric_it_is_the_engram_of_the_inputs(scene, strength, tolerance):
    params, curvatures = scene
    options = {"strength": strength, "scale": 0.7}
    expected, info = engram(params, curvatures[0], curvatures[1:], **options)
    matrices = {d: jnp.asarray(moment(np.random.default_rng(d), d)) for d in (3, 5)}
    equal = [with_output_factor(c, matrices.__getitem__) for c in curvatures]
    found, found_info = curvature_engram(params, equal[0], equal[1:], damping=0.2, **options)
    tolerance.check(found, expected, "factorization")
    tolerance.check(found_info, info, "factorization")


def test_of_large_damping_it_is_the_engram_of_the_inputs_weighted_by_g(scene, tolerance):
    params, curvatures = scene
    found, _ = curvature_engram(params, *curvatures[:2], damping=1e9, strength="whole")
    mean_g = [np.trace(factors(c, "w")[1]) / 5 for c in curvatures]
    s, s_rest = (
        n * m * np.asarray(factors(c, "w")[0], np.float64)
        for n, m, c in zip((30, 17), mean_g, curvatures, strict=False)
    )
    expected = np.linalg.solve(s + s_rest, s @ weights(params))
    np.testing.assert_allclose(-weights(found.blocks), expected, atol=100 * tolerance.factorization)


def test_two_parts_add_up_to_the_weight_and_three_do_not(scene, tolerance):
    params, (a, b, rest) = scene
    take = lambda target, others: curvature_engram(  # noqa: E731
        params, target, others, strength="whole"
    )[0]
    both = take([a, b], rest) + take(rest, [a, b])
    tolerance.check(apply_edit(params, both), jax.tree.map(jnp.zeros_like, params), "factorization")
    apart, merged = take(a, [b, rest]) + take(b, [a, rest]), take([a, b], rest)
    gap = np.abs(weights((apart - merged).blocks)).max()
    assert gap > 1e-3 * np.abs(weights(merged.blocks)).max()


def test_parts_are_merged_as_one_curvature_of_their_union(scene, tolerance):
    params, curvatures = scene
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(40, 6)))
    estimator = kfac(network, Categorical(), fisher="exact")
    fit = lambda x: estimate(estimator, params, [Batch(x)], key=jax.random.key(0))  # noqa: E731
    expected, _ = curvature_engram(params, fit(x), curvatures[1])
    found, _ = curvature_engram(params, [fit(x[:13]), fit(x[13:])], curvatures[1])
    tolerance.check(found, expected, "factorization")


def test_tables_and_long_outputs_have_diagonal_factors(tolerance):
    def apply(params, tokens):
        return params["table"][tokens] @ params["head"]

    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(4, 3))),
        "head": jnp.asarray(rng.normal(size=(3, 5))),
    }
    estimator = kfac(apply, Categorical(), fisher="exact", factorize=Factorize(max_dim=4))
    target, rest = (
        estimate(estimator, params, [Batch(jnp.asarray(t))], key=jax.random.key(0))
        for t in ([[0, 1], [1, 1]], [[1, 2], [2, 2], [2, 1]])
    )
    edit, _ = curvature_engram(params, target, rest, damping=0.3, strength="whole")
    for name, shape in (("table", (4, 3)), ("head", (3, 5))):
        metrics = []
        for curvature, number in ((target, 4), (rest, 6)):
            a, g = (np.asarray(m, np.float64) for m in factors(curvature, name))
            a, g = (np.diag(m) if m.ndim == 1 else m for m in (a, g))
            g = g + 0.3 * np.trace(g) / len(g) * np.eye(len(g))
            metrics.append(np.kron(number * a, g))
        served = metrics[0] @ np.asarray(params[name], np.float64).ravel()
        expected = np.linalg.lstsq(metrics[0] + metrics[1], served, rcond=None)[0].reshape(shape)
        np.testing.assert_allclose(
            -np.asarray(edit.blocks[name]), expected, atol=100 * tolerance.factorization
        )
    assert np.all(edit.blocks["table"][3] == 0), "a token that neither set holds"


def test_mistakes_get_a_sentence(scene):
    params, curvatures = scene
    with pytest.raises(ValueError, match="strength must be one of adaptive, whole"):
        curvature_engram(params, *curvatures[:2], strength="full")
    with pytest.raises(ValueError, match=r"damping must not be negative, got -0.1"):
        curvature_engram(params, *curvatures[:2], damping=-0.1)

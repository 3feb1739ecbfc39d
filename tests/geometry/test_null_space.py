"""Null-space projectors against dense algebra, and what they promise about retained inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Factorize, estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import null_space, project

D_IN, D_HIDDEN, RANK = 9, 5, 4


def network(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return (hidden * params["gain"][None]) @ params["v"]


def make_scene(x, key, how="eigh"):
    rng = np.random.default_rng(7)
    shapes = {
        "w": (D_IN, D_HIDDEN),
        "b": (D_HIDDEN,),
        "gain": (D_HIDDEN,),
        "v": (D_HIDDEN, 3),
    }
    params, tree = (
        {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(2)
    )
    estimator = kfac(network, Categorical(), factorize=how)
    curvature = estimate(estimator, params, [Batch(jnp.asarray(x))], key=key)
    return params, curvature, x, tree


@pytest.fixture
def scene(key):
    """Inputs in four of nine dimensions, so that the moment has a true null space."""
    rng = np.random.default_rng(1)
    return make_scene(rng.normal(size=(60, RANK)) @ rng.normal(size=(RANK, D_IN)), key)


@pytest.fixture
def full_scene(key):
    """Inputs in all dimensions, no two eigenvalues alike."""
    rng = np.random.default_rng(2)
    return make_scene(rng.normal(size=(60, D_IN)) * np.linspace(0.2, 2, D_IN), key)


def moment(x):
    homogeneous = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return homogeneous.T @ homogeneous / len(x)


def stacked(tree):
    return np.concatenate([np.asarray(tree["w"]), np.asarray(tree["b"])[None]])


def test_retained_inputs_see_nothing_of_a_projected_change(scene, tolerance):
    params, curvature, x, tree = scene
    projector = null_space(curvature, threshold=1e-6)
    change = project(projector, tree)
    moved = jax.tree.map(jnp.add, params, change)
    before = x @ np.asarray(params["w"]) + np.asarray(params["b"])
    after = x @ np.asarray(moved["w"]) + np.asarray(moved["b"])
    np.testing.assert_allclose(after, before, atol=10 * tolerance.contraction)
    assert np.linalg.norm(change["w"]) > 0.1 * np.linalg.norm(tree["w"])
    again = project(projector, change)
    tolerance.check(again, change, "factorization")
    assert not np.any(change["gain"]), "what has no moment of inputs stays"
    passed = project(projector, tree, uncovered="identity")
    np.testing.assert_array_equal(passed["gain"], tree["gain"])


@pytest.mark.parametrize(
    ("by", "threshold", "free"),
    [("rank", 3, 3), ("rank", 0, 0), ("eigenvalue", 0.5, None), ("energy", 0.05, None)],
)
def test_a_projector_is_the_one_from_numpy(full_scene, by, threshold, free, tolerance):
    _, curvature, x, tree = full_scene
    values, vectors = np.linalg.eigh(moment(x))
    values = np.maximum(values, 0)
    if free is None:
        ends = np.cumsum(values) <= threshold * values.sum()
        free = int((values <= threshold).sum() if by == "eigenvalue" else ends.sum())
        assert 0 < free < len(values)
    dense = vectors[:, :free] @ vectors[:, :free].T
    projector = null_space(curvature, threshold=threshold, by=by)
    change = project(projector, tree)
    np.testing.assert_allclose(
        stacked(change), dense @ stacked(tree), atol=10 * tolerance.factorization
    )
    line = projector.report()["w"]
    a = moment(x)
    assert line.dimension == D_IN + 1
    assert float(line.rank[0]) == free
    assert float(line.leakage[0]) == pytest.approx(
        np.linalg.norm(a @ dense) / np.linalg.norm(a), abs=tolerance.factorization
    )
    assert float(line.energy[0]) == pytest.approx(
        np.trace(a @ dense) / np.trace(a), abs=tolerance.factorization
    )


LEADING = 3  # of ten directions


@pytest.fixture
def leading_scene(key):
    """The full scene, of which the leading eigenvectors alone are kept."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, D_IN)) * np.linspace(0.2, 2, D_IN)
    return make_scene(x, key, Factorize(rank=LEADING))


@pytest.mark.parametrize("relaxation", [0.0, 2.0])
@pytest.mark.parametrize(
    ("by", "threshold", "free"),
    [("rank", 8, 8), ("rank", 0, 0), ("energy", 0.5, None), ("eigenvalue", 3.0, None)],
)
def test_leading_eigenvectors_are_what_is_used(
    leading_scene, by, threshold, free, relaxation, tolerance
):
    """Of the dense moment with its lesser eigenvalues at their mean, by NumPy."""
    _, curvature, x, tree = leading_scene
    values, vectors = np.linalg.eigh(moment(x))
    number = D_IN + 1 - LEADING
    values[:number] = values[:number].mean()
    if free is None:
        ends = np.cumsum(values) <= threshold * values.sum()
        free = int((values <= threshold).sum() if by == "eigenvalue" else ends.sum())
        assert number <= free < len(values)
    weights = np.where(np.arange(len(values)) < free, 1.0, 0.0)
    if relaxation:
        cut = values[free - 1] if free else 0
        weights[free:] = (cut / values[free:]) ** (1 / relaxation)
    dense = (vectors * weights) @ vectors.T
    projector = null_space(curvature, threshold=threshold, by=by, relaxation=relaxation)
    assert projector.bases[projector.blocks[0][2]].shape == (1, D_IN + 1, LEADING)
    change = project(projector, tree)
    np.testing.assert_allclose(
        stacked(change), dense @ stacked(tree), atol=10 * tolerance.factorization
    )
    line = projector.report()["w"]
    atol = 10 * tolerance.factorization
    assert float(line.rank[0]) == pytest.approx(weights.sum(), abs=atol)
    leakage = np.linalg.norm(values * weights) / np.linalg.norm(values)
    assert float(line.leakage[0]) == pytest.approx(leakage, abs=atol)
    assert float(line.energy[0]) == pytest.approx((values * weights).sum() / values.sum(), abs=atol)


def test_an_overrated_rest_enlarges_no_leading_direction(leading_scene, tolerance):
    _, curvature, _, tree = leading_scene
    factors = {
        # A sketch's mean of the rest may be above what it found of the leading ones.
        n: dataclasses.replace(f, eigenvalues=f.eigenvalues.at[:, 0].set(2 * f.eigenvalues.max()))
        if f.form == "leading"
        else f
        for n, f in curvature.factors.items()
    }
    curvature = dataclasses.replace(curvature, factors=factors)
    rest = D_IN + 1 - LEADING
    projector = null_space(curvature, threshold=rest, by="rank", relaxation=1.0)
    tolerance.check(stacked(project(projector, tree)), stacked(tree), "factorization")


@pytest.mark.parametrize(("by", "threshold"), [("rank", 3), ("energy", 1e-3), ("eigenvalue", 0.1)])
def test_a_threshold_among_directions_without_eigenvector_is_refused(leading_scene, by, threshold):
    curvature = leading_scene[1]
    with pytest.raises(ValueError, match=f"by {by} falls among the 7 directions of 'w' .* or none"):
        null_space(curvature, threshold=threshold, by=by)


@pytest.mark.parametrize("relaxation", [0.5, 2.0])
def test_relaxed_weights_decay_as_a_power_of_the_eigenvalue(full_scene, relaxation, tolerance):
    _, curvature, x, tree = full_scene
    values, vectors = np.linalg.eigh(moment(x))
    free = D_IN + 1 - 3
    cut = values[free - 1]
    weights = np.where(np.arange(len(values)) < free, 1, (cut / values) ** (1 / relaxation))
    assert weights[-1] < weights[free] < 1
    projector = null_space(curvature, threshold=free, by="rank", relaxation=relaxation)
    expected = (vectors * weights) @ vectors.T @ stacked(tree)
    actual = stacked(project(projector, tree))
    np.testing.assert_allclose(actual, expected, atol=30 * tolerance.factorization)
    hard = null_space(curvature, threshold=free, by="rank")
    assert projector.report()["w"].rank[0] > hard.report()["w"].rank[0]


def test_a_table_is_projected_token_by_token(key):
    """An embedding's moment is diagonal: what occurs often stays, what never occurs is free."""

    def apply(params, tokens):
        return params["table"][tokens] @ params["head"]

    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(5, 3))),
        "head": jnp.asarray(rng.normal(size=(3, 2))),
    }
    tokens = jnp.asarray([[3, 1], [3, 3], [1, 3]])
    curvature = estimate(
        kfac(apply, Categorical(), select="table"), params, [Batch(tokens)], key=key
    )
    projector = null_space(curvature, threshold=0.4)
    change = project(projector, params)
    is_free = np.array([True, True, True, False, True])  # token 1 is a third of the energy
    expected = np.where(is_free[:, None], params["table"], 0)
    np.testing.assert_array_equal(change["table"], expected)


def test_what_of_a_leaf_is_not_covered_passes_by_identity(key):
    """A matrix that is the first rows of its leaf."""

    def apply(params, x):
        return x @ params["w"][:2]

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    x = jnp.asarray(rng.normal(size=(9, 2)))
    curvature = estimate(kfac(apply, Categorical()), params, [Batch(x)], key=key)
    nothing = null_space(curvature, threshold=0, by="rank")
    passed = project(nothing, params, uncovered="identity")["w"]
    np.testing.assert_allclose(passed[:2], 0, atol=1e-6)
    np.testing.assert_array_equal(passed[2:], params["w"][2:])
    assert not np.any(project(nothing, params)["w"][2:])


def test_a_projector_passes_through_jit_and_prints_its_ranks(scene, tolerance):
    _, curvature, _, tree = scene
    projector = null_space(curvature, threshold=1e-6)
    tolerance.check(jax.jit(project)(projector, tree), project(projector, tree))
    text = str(projector)
    assert "5 of 10" in text or "6 of 10" in text
    assert "leakage" in text


def test_mistakes_get_a_sentence(scene):
    _, curvature, _, tree = scene
    with pytest.raises(ValueError, match="by must be one of energy, rank, eigenvalue"):
        null_space(curvature, threshold=0.1, by="size")
    for mistake in (
        {"threshold": -1.0},
        {"threshold": 2.0},
        {"threshold": 0.1, "relaxation": -1.0},
    ):
        with pytest.raises(ValueError, match="must (not be negative|be from 0 to 1), got"):
            null_space(curvature, **mistake)
    projector = null_space(curvature, threshold=0.1)
    with pytest.raises(ValueError, match=r"the tree has no leaf 'b', which the projector covers"):
        project(projector, {"w": tree["w"], "v": tree["v"]})
    with pytest.raises(ValueError, match="uncovered must be"):
        project(projector, tree, uncovered="ones")

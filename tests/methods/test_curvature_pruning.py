"""Curvature pruning against the dense projector of the Kronecker product, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import Diagonal, eigenvalues, ekfac, estimate, factors, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.edits import Edit, apply_edit
from jedit.geometry import RetainKl
from jedit.methods import CATALOGUE, Material, curvature_pruning
from jedit.methods._within_budget import strongest_within
from jedit.methods.curvature.curvature_pruning import least_kept

D_IN, WIDTH, CLASSES = 6, 5, 3


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"]


ESTIMATOR = kfac(network, Categorical(), fisher="exact")


@pytest.fixture
def scene():
    rng = np.random.default_rng(4)
    shapes = {"w": (D_IN, WIDTH), "b": (WIDTH,), "v": (WIDTH, CLASSES)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    rows = Batch(jnp.asarray(rng.normal(size=(40, D_IN)) * np.geomspace(2.0, 0.2, D_IN)))
    return params, rows, estimate(ESTIMATOR, params, [rows], key=jax.random.key(0))


def flat(tree, name):
    parts = [tree[name]] if name == "v" else [tree[name], tree["b"][None]]
    return np.concatenate([np.asarray(p, np.float64) for p in parts]).ravel()


def top(values, mass):
    """How many of the largest hold the share of the sum, counted one after the other."""
    total, k = 0.0, 0
    for value in sorted(values, reverse=True):
        if total >= mass * sum(values):
            break
        total, k = total + value, k + 1
    return k


def projector(a, g, mass, keep):
    """The dense P on the flat weight: of eigenvectors of A ⊗ G, or of A and of G."""
    if keep == "product":
        values, vectors = np.linalg.eigh(np.kron(a, g))
        kept = vectors[:, -top(values, mass) :]
        return kept @ kept.T
    projectors = []
    for m in (a, g):
        values, vectors = np.linalg.eigh(m)
        kept = vectors[:, -top(values, mass) :]
        projectors.append(kept @ kept.T)
    return np.kron(*projectors)


@pytest.mark.parametrize("keep", ["product", "factors"])
@pytest.mark.parametrize("mass", [0.55, 0.93])
def test_it_is_the_dense_projector_bias_included(scene, keep, mass, tolerance):
    params, _, curvature = scene
    edit, info = curvature_pruning(params, curvature, mass=mass, keep=keep)
    edited = apply_edit(params, edit)
    for name in ("w", "v"):
        a, g = (np.asarray(m, np.float64) for m in factors(curvature, name))
        p = projector(a, g, mass, keep)
        weight = flat(params, name)
        tolerance.check(flat(edited, name), p @ weight, "factorization")
        kept, whole = np.trace(p), np.kron(a, g)
        assert float(info.kept[name][0]) == pytest.approx(kept / len(weight), rel=1e-5)
        assert 0 < kept < len(weight)
        held = np.trace(p @ whole) / np.trace(whole)
        assert float(info.mass[name][0]) == pytest.approx(held, rel=1e-4)
        assert held >= (mass if keep == "product" else mass**2) - 1e-6
        gone = np.linalg.norm(weight - p @ weight) / np.linalg.norm(weight)
        assert float(info.relative_norm[name][0]) == pytest.approx(gone, rel=1e-4)


def test_corrected_eigenvalues_choose_where_there_are_some(scene, tolerance):
    params, rows, curvature = scene
    corrected = estimate(
        ekfac(network, Categorical(), curvature), params, [rows], key=jax.random.key(1)
    )
    edit, _ = curvature_pruning(params, corrected, mass=0.7)
    values = np.asarray(eigenvalues(corrected, "v")[0], np.float64)
    block = corrected.blocks["v"]
    q_a, q_g = (
        np.asarray(corrected.factors[f].basis[0], np.float64) for f in (block.input, block.output)
    )
    order = np.sort(values.ravel())[::-1]
    mask = values >= order[top(values.ravel(), 0.7) - 1]
    plain = np.asarray(eigenvalues(curvature, "v")[0])
    assert np.any(mask != (plain >= np.sort(plain.ravel())[::-1][top(plain.ravel(), 0.7) - 1]))
    expected = q_a @ (mask * (q_a.T @ np.asarray(params["v"]) @ q_g)) @ q_g.T
    tolerance.check(apply_edit(params, edit)["v"], expected, "factorization")
    with pytest.raises(ValueError, match="would not look at the corrected eigenvalues"):
        curvature_pruning(params, corrected, keep="factors")


def test_to_prune_twice_is_to_prune_once_and_mass_one_takes_nothing(scene, tolerance):
    params, _, curvature = scene
    once = apply_edit(params, curvature_pruning(params, curvature, mass=0.6)[0])
    twice = apply_edit(once, curvature_pruning(once, curvature, mass=0.6)[0])
    tolerance.check(twice, once, "factorization")
    edit, info = curvature_pruning(params, curvature, mass=1.0)
    jax.tree.map(np.testing.assert_array_equal, apply_edit(params, edit), params)
    assert all(float(kept[0]) == 1 for kept in info.kept.values())


def test_what_the_curvature_selects_is_pruned_alone(scene):
    params, rows, whole = scene
    part = estimate(
        kfac(network, Categorical(), fisher="exact", select="^v$"),
        params,
        [rows],
        key=jax.random.key(0),
    )
    edit, _ = curvature_pruning(params, part, mass=0.6)
    assert set(edit.blocks) == {"v"}
    expected = curvature_pruning(params, whole, mass=0.6)[0].blocks["v"]
    np.testing.assert_allclose(edit.blocks["v"], expected, rtol=1e-4, atol=1e-6)


def test_every_layer_of_a_stack_is_cut_by_its_own_eigenvalues(tolerance):
    """A scanned stack is one block with a leading axis; a layer that nothing reached stays."""

    def scanned(params, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, params["stack"])[0]

    rng = np.random.default_rng(1)
    params = {"stack": jnp.asarray(rng.normal(size=(3, 4, 4)))}
    rows = Batch(jnp.asarray(rng.normal(size=(30, 4))))
    estimator = kfac(scanned, Categorical(), fisher="exact")
    curvature = estimate(estimator, params, [rows], key=jax.random.key(0))
    edit, info = curvature_pruning(params, curvature, mass=0.6)
    edited = apply_edit(params, edit)["stack"]
    a, g = (np.asarray(m, np.float64) for m in factors(curvature, "stack"))
    for layer in range(3):
        p = projector(a[layer], g[layer], 0.6, "product")
        weight = np.asarray(params["stack"][layer], np.float64).ravel()
        tolerance.check(edited[layer].ravel(), p @ weight, "factorization")
    assert info.kept["stack"].shape == (3,)
    dead = jax.tree.map(lambda x: x if x.ndim == 0 else x.at[1].set(0), curvature)
    kept = apply_edit(params, curvature_pruning(params, dead, mass=0.6)[0])["stack"]
    np.testing.assert_array_equal(kept[1], params["stack"][1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_least_value_kept_is_that_of_a_sorted_sum(dtype):
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(2, 7, 9)) ** 3 * np.array([1.0, 1e-12])[:, None, None]
    values[0, 0] = 0
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    values = np.asarray(values, dtype)
    for mass in (0.05, 0.5, 0.999):
        found = np.asarray(least_kept(jnp.asarray(values), mass))
        for layer, least in zip(values, found, strict=True):
            order = np.sort(layer.ravel())[::-1]
            assert least.item() == order[top(order.astype(np.float64), mass) - 1]
    assert np.all(np.asarray(least_kept(jnp.zeros((1, 4), dtype), 0.5)) == 0)


def test_the_rows_strength_is_the_price_it_keeps_to(scene):
    """The least mass within the budget: by the KL itself, of it and of a little less mass."""
    params, rows, curvature = scene
    row = CATALOGUE["curvature pruning"]
    method = row.of(Material(network, params, rows, curvature=curvature))

    def kl_of(edit):
        p, q = (
            np.asarray(jax.nn.log_softmax(network(x, rows.inputs)), np.float64)
            for x in (params, apply_edit(params, edit))
        )
        return np.mean(np.sum(np.exp(p) * (p - q), axis=1))

    sizes = []
    for budget in (0.003, 0.05, 0.3):
        edit, found = method(network, params, forget=rows, retain=rows, budget=budget)
        assert kl_of(edit) <= budget * 1.001
        assert float(found.true_kl[-1]) == pytest.approx(kl_of(edit), rel=1e-3, abs=1e-7)
        same, info = curvature_pruning(params, curvature, mass=1 - found.strength)
        jax.tree.map(np.testing.assert_array_equal, same, edit)
        harsher = curvature_pruning(params, curvature, mass=1 - 1.01 * found.strength)[0]
        assert kl_of(harsher) > 0.999 * kl_of(edit)
        sizes.append(sum(float(x[0]) for x in info.relative_norm.values()))
    assert sizes == sorted(sizes)
    nothing, found = method(network, params, forget=rows, retain=rows, budget=1e-12)
    assert kl_of(nothing) < 1e-9  # what no output needs may go
    assert float(found.true_kl[-1]) <= 1e-12
    with pytest.raises(ValueError, match="budget must be positive"):
        method(network, params, forget=rows, retain=rows, budget=0.0)


def test_the_search_ends_at_the_strongest_that_is_within():
    """Of one number that is set to its strength, at a known cost, which is NaN beyond a half."""

    class Price(RetainKl):
        def __init__(self):
            pass

        def predicted(self, change):
            return float(change["w"][0]) ** 2

        def __call__(self, move, alpha=1.0, *, start=None):
            assert start is None
            at = alpha * float(move["w"][0])
            return at**2 if at < 0.5 else np.nan

    made = lambda strength: (Edit({"w": jnp.asarray([strength])}), None)  # noqa: E731
    for budget, expected in ((0.01, 0.1), (1.0, 0.5), (1e-14, 0.0)):
        given = {"budget": budget, "least": 1e-6, "most": 0.99}
        edit, found = strongest_within(made, Price(), **given)
        assert found.strength == pytest.approx(expected, rel=0.01)
        assert found.strength <= expected
        assert set(edit.blocks) == ({"w"} if expected else set())


def test_mistakes_get_a_sentence(scene):
    params, _, curvature = scene
    with pytest.raises(ValueError, match="mass must be above 0 and at most 1, got 0"):
        curvature_pruning(params, curvature, mass=0.0)
    with pytest.raises(ValueError, match="keep must be one of product, factors"):
        curvature_pruning(params, curvature, keep="pairs")
    blocks = {n: Diagonal(b.weight, jnp.ones((1, 1, 1))) for n, b in curvature.blocks.items()}
    bare = dataclasses.replace(curvature, blocks=blocks, factors={})
    with pytest.raises(ValueError, match="no Kronecker block"):
        curvature_pruning(params, bare)

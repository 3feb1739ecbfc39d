"""What the inverses of undecomposed factors hold, on the device and on the host."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.core.devices import is_on_host
from jedit.curvature import estimate, factored, inverted, kfac, solve, to_host
from jedit.curvature.inverted import inverse_names
from jedit.curvature.likelihoods import Categorical
from jedit.methods import Ascent, kfade
from jedit.methods.curvature import kfade as kfade_module
from jedit.transforms import natural_steps

BY = pytest.mark.parametrize("by", ["cholesky", "inverse"])
SHAPES = {"t": (7, 6), "w": (6, 5), "u": (5, 3), "v": (5, 3)}


def apply(params, x):
    hidden = jnp.tanh(jnp.tanh(x @ params["t"]) @ params["w"])
    # Two matrices that read one input share its factor.
    return hidden @ params["u"] + jnp.tanh(hidden @ params["v"])


@pytest.fixture(scope="module")
def scene():
    """Params, a tree like them, rows, and `fit(params, by)`, the curvature without eigenvectors."""
    rng = np.random.default_rng(1)
    params, tree = (
        {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    rows = Batch(jnp.asarray(rng.normal(size=(12, 7)), float), jnp.arange(12) % 3)

    def fit(params, by):
        estimator = kfac(apply, Categorical(), fisher="exact", factorize=by)
        return estimate(estimator, params, rows, key=jax.random.key(0))

    return params, tree, rows, fit


@pytest.fixture
def made(monkeypatch):
    """References to the inverses made by now, and how many were alive when each was begun."""
    references, alive = [], []

    def invert(*given, inverse=factored.inverse):
        alive.append(sum(reference() is not None for reference in references))
        side = inverse(*given)
        references.append(weakref.ref(side.values))
        return side

    monkeypatch.setattr(factored, "inverse", invert)
    return references, alive


def matrices_on_device():
    """How many square matrices in layers are alive on the device."""
    gc.collect()  # of what other tests left in circles
    live = [x for x in jax.live_arrays() if x.ndim == 3 and x.shape[1] == x.shape[2]]
    return sum(not is_on_host(x) for x in live)


def close(found, expected, rtol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol, rtol * np.abs(np.asarray(y)).max()),
        found,
        expected,
    )


@BY
@pytest.mark.parametrize("absolute", [False, True])
def test_a_solve_holds_the_inverses_of_one_block(scene, made, by, absolute):
    """Of the seven, or eight, never more than one beside the one that is being made."""
    params, tree, _, fit = scene
    curvature, (references, alive) = fit(params, by), made
    how = {"damping": 0.2, "absolute": absolute, "uncovered": "identity"}
    found = solve(curvature, tree, **how)
    assert len(alive) == len(references) == (8 if absolute else 7)
    assert max(alive) == 1
    assert not any(reference() is not None for reference in references)
    assert len({key for keys in inverse_names(curvature, absolute).values() for key in keys}) == (
        len(alive)
    )
    close(found, inverted(curvature, **how)(tree))
    assert max(alive) == len(alive) // 2 - 1  # which holds them all


@BY
def test_inverses_of_an_offloaded_curvature_are_offloaded(scene, made, by):
    params, tree, _, fit = scene
    curvature, (_, alive) = fit(params, by), made
    expected = solve(curvature, tree, damping=0.2)
    there = to_host(curvature)
    del curvature, alive[:]
    before = matrices_on_device()
    inverse = inverted(there, damping=0.2)
    assert max(alive) <= 1
    assert all(is_on_host(side.values) for side in inverse.inverses.values())
    for found in (
        inverse(tree),
        jax.jit(lambda inverse, tree: inverse(tree))(inverse, tree),
        solve(there, tree, damping=0.2),
        jax.jit(lambda c, t: solve(c, t, damping=0.2))(there, tree),
    ):
        close(found, expected, 1e-4)
        assert {x.sharding.memory_kind for x in found.values()} == {"device"}
    assert matrices_on_device() == before
    again = inverse.again(there)
    assert all(is_on_host(side.values) for side in again.inverses.values())


@BY
def test_kfade_of_an_offloaded_curvature_keeps_its_inverses_there(scene, by, monkeypatch):
    params, _, rows, fit = scene
    curvature = fit(params, by)
    how = {"damping": 0.2, "ascent": Ascent(2, step_size=1e-3)}
    expected, _ = kfade(apply, params, curvature, rows, rows, **how)
    there, seen = to_host(curvature), []
    del curvature
    before = matrices_on_device()

    def look(inverse, gradient, solved=kfade_module._block_by_block):
        seen.append(matrices_on_device() - before)
        assert all(is_on_host(side.values) for side in inverse.inverses.values())
        return solved(inverse, gradient)

    monkeypatch.setattr(kfade_module, "_block_by_block", look)
    found, _ = kfade(apply, params, there, rows, rows, **how)
    assert seen == [0, 0]
    close(found.blocks, expected.blocks, 1e-4)


@BY
def test_a_refit_finds_neither_inverses_nor_the_factors_before(scene, made, by):
    params, _, rows, fit = scene
    (references, _), seen, matrices = made, [], []

    def refit(current):
        seen.append([reference() is not None for reference in references])
        assert not any(matrix() is not None for matrix in matrices)
        curvature = fit(current, by)
        matrices[:] = [weakref.ref(f.matrix) for f in curvature.factors.values()]
        return curvature

    given = (apply, params, fit(params, by), rows, rows)
    kfade(*given, damping=0.2, ascent=Ascent(3, step_size=1e-3, refit=refit))
    assert [(len(alive), any(alive)) for alive in seen] == [(7, False), (14, False)]


@pytest.mark.parametrize("by", ["eigh", "cholesky"])
def test_natural_steps_of_an_offloaded_curvature_keep_their_state_on_the_device(scene, by):
    """Two copies of it, as `jedit plan` counts, where an update finds and leaves them."""
    params, tree, _, fit = scene
    curvature = fit(params, by)
    there = to_host(curvature)
    here, steps = (natural_steps(c, damping=0.2) for c in (curvature, there))
    state = steps.init(params)
    found, after = jax.jit(steps.update)(tree, state, params)
    for one in (state, after):
        assert not any(is_on_host(x) for x in jax.tree.leaves(one))
    close(found, here.update(tree, here.init(params), params)[0])
    held, whole = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state, curvature))
    assert held == pytest.approx(2 * whole, rel=0.15)


def test_readers_of_one_input_that_lie_differently_have_their_own_names(scene):
    params, _, _, fit = scene
    curvature = fit(params, "cholesky")
    names = inverse_names(curvature)
    assert names["u"][0] == names["v"][0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "data"))
    blocks = {**curvature.blocks, "v": dataclasses.replace(curvature.blocks["v"], sharding=place)}
    names = inverse_names(dataclasses.replace(curvature, blocks=blocks))
    assert names["u"][0] != names["v"][0]

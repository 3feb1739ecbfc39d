"""Inverses of damped factors: by Cholesky and by products, cut into blocks, made once for many."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jedit.core.batch import Batch
from jedit.curvature import (
    Curvature,
    Factor,
    Factorize,
    Inverted,
    estimate,
    factored,
    inverted,
    kfac,
    newton_schulz,
    power,
    solve,
)
from jedit.curvature.likelihoods import Categorical
from jedit.curvature.mesh import blocked
from jedit.edits import Edit, apply_edit
from jedit.geometry import curvature_whitening
from jedit.methods import Ascent, kfade
from jedit.requests import Solver, balanced, batch_unlearn, continual, interactions
from jedit.transforms import (
    natural_steps,
    orthogonalize_to_retain,
    refresh_curvature,
    scale_by_curvature,
    unlearn_first,
)

BY = pytest.mark.parametrize("by", ["cholesky", "inverse"])


def apply(params, x):
    hidden = jnp.tanh(x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 5)))
    # Two matrices that read one input share its factor.
    return hidden @ params["u"] + jnp.tanh(hidden @ params["v"])


@pytest.fixture(scope="module")
def scene():
    """Params, a tree like them, rows, and the curvature by all eigenvectors."""
    rng = np.random.default_rng(1)
    shapes = {"w": (6, 5), "b": (5,), "u": (5, 3), "v": (5, 3)}
    params, tree = (
        {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in shapes.items()}
        for _ in range(2)
    )
    rows = Batch(jnp.asarray(rng.normal(size=(12, 6)), float), jnp.arange(12) % 3)
    curvature = estimate(
        kfac(apply, Categorical(), fisher="exact"), params, rows, key=jax.random.key(0)
    )
    return params, tree, rows, curvature


def least():
    """The residual of an inverse by products, in the dtype that the run is in."""
    return newton_schulz.tolerance(jnp.zeros(()).dtype)


def kept_by(curvature, by):
    """The curvature without its eigenvectors."""
    factors = {n: Factor(f.matrix, None, None, by) for n, f in curvature.factors.items()}
    return dataclasses.replace(curvature, factors=factors)


def spectrum(d, exponent, level):
    """(a matrix with eigenvalues falling as a power, damped, and its inverse) in NumPy."""
    q, _ = np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))
    a = np.arange(1, d + 1) ** -float(exponent)
    a = a / a.mean() + level
    return (q * a) @ q.T, (q / a) @ q.T


def close(found, expected, rtol):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol, rtol * np.abs(np.asarray(y)).max()),
        found,
        expected,
    )


@pytest.mark.parametrize(("exponent", "level"), [(1, 0.3), (2, 0.1), (4, 0.1)])
def test_products_alone_invert_a_matrix(exponent, level):
    matrix, inverse = spectrum(48, exponent, level)
    A, one = jnp.asarray(matrix, float)[None], jnp.eye(48)[None]
    X, info = newton_schulz.solve(A, one, jnp.array([level], float), jnp.matmul)
    true = np.linalg.norm(np.eye(48) - matrix @ np.asarray(X[0], np.float64)) / 48**0.5
    assert true <= 1.1 * least()
    np.testing.assert_allclose(info.residual[0], true, rtol=0.2, atol=100 * jnp.finfo(float).eps)
    assert np.linalg.norm(X[0] - inverse) <= 3 * least() * np.linalg.norm(inverse)
    # The unscaled iteration doubles the smallest eigenvalue in a step: it takes log2 of the
    # condition number to begin with.
    assert int(info.steps) <= np.log2(np.linalg.cond(matrix)) / 2 + 7


def test_layers_of_unlike_conditions_are_inverted_side_by_side():
    cases = [(1, 1.0), (4, 0.05), (2, 0.3)]
    matrices, inverses = zip(*(spectrum(20, *case) for case in cases), strict=True)
    levels = jnp.array([level for _, level in cases], float)
    A = jnp.asarray(np.stack(matrices), float)
    X, info = newton_schulz.solve(A, jnp.eye(20)[None], levels, jnp.matmul)
    assert (np.asarray(info.residual) <= least()).all()
    for x, inverse in zip(X, inverses, strict=True):
        error = np.linalg.norm(x - inverse) / np.linalg.norm(inverse)
        assert error <= 3 * least()


@pytest.mark.parametrize(("d", "largest"), [(12, 4), (13, 4), (7, 512)])
def test_blocks_do_what_the_whole_matrix_does(d, largest, monkeypatch, tolerance):
    """On a mesh of one device; `tests/many_devices` has eight."""
    monkeypatch.setattr(blocked, "LARGEST_BLOCK", largest)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "data", None))
    matrix, inverse = spectrum(d, 2, 0.5)
    level = jnp.array([0.5, 0.5], float)
    plain = jnp.asarray(np.stack([matrix, matrix]) - 0.5 * np.eye(d), float)
    rows = blocked.cut(plain, level, place)
    assert rows.shape[1] * rows.shape[2] == rows.shape[3] == blocked.padded(d, place)
    assert rows.shape[2] <= largest
    close(blocked.joined(rows, d)[1], matrix, tolerance.contraction)
    x = np.random.default_rng(0).normal(size=(2, d, 3))
    wide = jnp.pad(jnp.asarray(x, float), [(0, 0), (0, rows.shape[3] - d), (0, 0)])
    factor = blocked.cholesky(rows, place)
    rtol = 100 * tolerance.contraction
    close(blocked.cho_solve(factor, wide, place)[:, :d], inverse @ x, rtol)
    close(blocked.times(rows, wide, place)[:, :d], matrix @ x, tolerance.contraction)
    close(blocked.joined(blocked.inverse(factor, place), d)[0], inverse, rtol)
    squared = blocked.product(rows, rows, place)
    close(blocked.joined(squared, d)[1], matrix @ matrix, tolerance.contraction)


@BY
@pytest.mark.parametrize("absolute", [True, False])
def test_an_inverse_is_made_once_for_many_trees(scene, by, absolute):
    _, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    how = {"damping": 0.2, "absolute": absolute, "uncovered": "identity"}
    inverse = inverted(kept, **how)
    # One for every factor; where the other factor of a block counts too, one for each of both.
    assert len(inverse.inverses) == (6 if absolute else 5)
    other = jax.tree.map(lambda x: x**2, tree)
    call = jax.jit(lambda inverse, tree: inverse(tree))
    for one in (tree, other):
        close(
            call(inverse, one),
            solve(kept, one, **how),
            1e-12 if jnp.zeros(()).dtype == float else 1e-5,
        )
    again = inverse.again(kept)
    assert jax.tree.structure(again) == jax.tree.structure(inverse)
    assert inverse.covered == curvature.covered


@BY
def test_factors_of_one_shape_are_inverted_by_one_program(scene, by):
    *_, curvature = scene
    factored._inverse.clear_cache()
    for damping in (0.1, 0.2):
        inverted(kept_by(curvature, by), damping=damping)
    sizes = {factor.dimension for factor in curvature.factors.values()}
    assert factored._inverse._cache_size() == len(sizes) < len(curvature.factors)


@BY
@pytest.mark.parametrize("split", ["u", "v"])
def test_readers_of_one_input_may_lie_differently(scene, by, split):
    """As keys and values do beside queries, where the devices outnumber their heads."""
    _, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, None, "data"))
    assert kept.blocks["u"].input == kept.blocks["v"].input
    blocks = {**kept.blocks, split: dataclasses.replace(kept.blocks[split], sharding=place)}
    inverse = inverted(dataclasses.replace(kept, blocks=blocks), damping=0.2)
    assert len(inverse.inverses) == 6
    close(inverse(tree), solve(kept, tree, damping=0.2), 10 * least())


@BY
def test_dampings_are_mapped_over_without_another_pass(scene, by):
    _, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    dampings = jnp.array([0.03, 0.3, 3.0])
    found = jax.jit(jax.vmap(lambda damping: solve(kept, tree, damping=damping)))(dampings)
    for i, damping in enumerate(dampings):
        one = solve(kept, tree, damping=damping)
        close(jax.tree.map(lambda x, i=i: x[i], found), one, 10 * least())


@BY
def test_solving_keeps_the_dtype_of_a_tree(scene, by):
    _, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    found = solve(kept, narrow, damping=0.1)
    wide = solve(kept, jax.tree.map(lambda x: x.astype(float), narrow), damping=0.1)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x.astype(float), y, 0.01, 1e-3), found, wide
    )


def test_what_products_cannot_invert_is_inverted_by_cholesky_with_a_sentence(scene):
    """Gradients of logits sum to zero: without damping the factor of "u" is singular."""
    _, tree, _, curvature = scene
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), curvature)
    how = {"damping": 1e-12}
    with pytest.warns(UserWarning, match=r"curvature of 'u' \(3 x 3\) was inverted by Cholesky"):
        found = inverted(kept_by(narrow, "inverse"), **how)
    # Under a trace the residual alone tells.
    traced = jax.jit(lambda c: inverted(c, **how))(kept_by(narrow, "inverse"))
    worst = max(float(jnp.max(side.residual)) for side in traced.inverses.values())
    assert worst > newton_schulz.tolerance(jnp.float32)
    close(found(tree), solve(kept_by(narrow, "cholesky"), tree, **how), 0.05)


@pytest.mark.skipif(
    os.environ.get("JEDIT_TEST_TYPECHECK") != "0", reason="checked functions have more frames"
)
def test_that_sentence_is_laid_at_the_callers_line(scene):
    """One of jedit's own lines would be shown once for all callers."""
    _, tree, _, curvature = scene
    narrow = kept_by(jax.tree.map(lambda x: x.astype(jnp.float32), curvature), "inverse")
    with pytest.warns(UserWarning, match="was inverted by Cholesky") as said:
        inverted(narrow, damping=1e-12)
    with pytest.warns(UserWarning, match="was inverted by Cholesky") as solved:
        solve(narrow, tree, damping=1e-12)
    assert {Path(one.filename) for one in [*said, *solved]} == {Path(__file__)}


@BY
def test_a_layer_of_zeros_is_left_at_zero_and_no_damping_is_refused(scene, by):
    _, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    end = kept.blocks["u"].output
    dead = Factor(jnp.zeros_like(kept.factors[end].matrix), None, None, by)
    dead = dataclasses.replace(kept, factors={**kept.factors, end: dead})
    found = solve(dead, tree, damping=0.1)
    assert not np.any(found["u"])
    close(found["v"], solve(kept, tree, damping=0.1)["v"], 1e-12)
    with pytest.raises(ValueError, match="curvature of 'w' was kept without eigenvectors"):
        solve(kept, tree, damping=0.0)


@BY
def test_what_rounding_made_indefinite_is_refused_by_name(scene, by):
    params, tree, rows, curvature = scene
    kept = kept_by(curvature, by)
    end = kept.blocks["u"].output
    # What is left of a singular matrix in few digits: its least eigenvalue is below zero.
    few = jnp.asarray([[[1, 1.001, 0], [1.001, 1, 0], [0, 0, 1]]], kept.factors[end].matrix.dtype)
    rounded = Factor(few, None, None, by)
    rounded = dataclasses.replace(kept, factors={**kept.factors, end: rounded})
    match = r"inverted curvature of 'u' is not finite: .* 3 x 3 .*damping=1e-08; give more damping"
    for absolute in (False, True):
        with pytest.raises(FloatingPointError, match=match):
            solve(rounded, tree, damping=1e-8, absolute=absolute)
    assert np.all(np.isfinite(solve(rounded, tree, damping=0.1)["u"]))
    # Many requests are refused no damping, as one is, before the model is run.
    never = lambda *_: pytest.fail("the model was run")  # noqa: E731
    with pytest.raises(ValueError, match="curvature of 'w' was kept without .*above zero"):
        batch_unlearn(never, params, kept, jax.tree.map(lambda x: x[None], rows), damping=0.0)


@BY
def test_transforms_hold_the_inverse_and_refresh_it(scene, by):
    params, tree, _, curvature = scene
    kept = kept_by(curvature, by)
    other = jax.tree.map(lambda x: 2 * x, kept)
    transform = natural_steps(kept, damping=0.2, predicted_kl=1e9)
    state = jax.jit(transform.init)(params)
    held = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Inverted))
        if isinstance(x, Inverted)
    ]
    assert len(held) == 1
    one, _ = jax.jit(transform.update)(tree, state, params)
    precision = 10 * least() if by == "inverse" else 1e-5
    close(one, jax.tree.map(jnp.negative, solve(kept, tree, damping=0.2)), precision)
    fresh = refresh_curvature(state, other)
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    two, _ = jax.jit(transform.update)(tree, fresh, params)
    close(
        two, jax.tree.map(lambda x: x / 4, one), precision
    )  # both factors are twice what they were


@BY
def test_kfade_steps_along_the_factored_direction(scene, by):
    params, _, rows, curvature = scene
    kept = kept_by(curvature, by)
    edit, info = kfade(
        apply, params, kept, rows, rows, damping=0.2, ascent=Ascent(1, step_size=1e-3)
    )

    def loss(params):
        return jnp.mean(Categorical().nll(apply(params, rows.inputs), rows.targets))

    step = solve(kept, jax.grad(loss)(params), damping=0.2)
    moved = jax.tree.map(jnp.subtract, apply_edit(params, edit), params)
    close(moved, jax.tree.map(lambda x: 1e-3 * x, step), 1e-4)
    assert info.true_kl[0] > 0
    # One step of each of the blocks, made of a curvature in parts, is the same.
    parts = [
        Curvature(
            {n: b for n, b in kept.blocks.items() if n == name}, kept.factors, kept.num_outputs
        )
        for name in kept.blocks
    ]
    again, _ = kfade(
        apply, params, parts, rows, rows, damping=0.2, ascent=Ascent(1, step_size=1e-3)
    )
    close(again.blocks, edit.blocks, 1e-5)


@BY
@pytest.mark.parametrize("rank", [None, 1])
def test_batch_unlearning_is_that_of_the_eigenvectors(scene, by, rank):
    """They damp the factors apart too: the edits, and how they overlap, are the same."""
    params, _, rows, curvature = scene
    kept = kept_by(curvature, by)
    requests = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), rows)
    how = {"damping": 0.3, "predicted_kl": 0.01, "solver": Solver(rank=rank)}
    expected, found = (batch_unlearn(apply, params, c, requests, **how) for c in (curvature, kept))
    precision = 100 * least()
    for one, other in zip(*(info for _, info in (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, precision, precision)
    for damping in (0.0, 0.3):
        grams = [interactions(c, expected[0], damping=damping) for c in (kept, curvature)]
        close(*grams, precision)
    close(*(balanced(gram) for gram in grams), precision)


@BY
def test_what_needs_eigenvectors_is_refused_before_work(scene, by):
    params, tree, rows, curvature = scene
    kept = kept_by(curvature, by)
    requests = jax.tree.map(lambda x: x[None], rows)
    never = lambda *_: pytest.fail("the model was run")  # noqa: E731
    calls = {
        "power": lambda: power(kept, tree, -0.5, damping=0.1),
        "whitening": lambda: curvature_whitening(kept, damping=0.1),
        "subspace": lambda: orthogonalize_to_retain(2, metric=kept),
        "exact": lambda: batch_unlearn(never, params, kept, requests, solver=Solver(exact=True)),
        "overlap": lambda: interactions(kept, Edit({}), exact=True),
        "relearning": lambda: unlearn_first(scale_by_curvature(kept), rate=0.1).update(
            tree, None, params, curvature=kept, forget_grad_fn=never, grad_fn=never
        ),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=rf'curvature of .* no eigenvectors.*"{by}"'):
            call()


def test_what_needs_matrices_is_refused_leading_eigenvectors_before_work(scene):
    params, _, rows, _ = scene
    estimator = kfac(apply, Categorical(), factorize=Factorize(rank=1))
    curvature = estimate(estimator, params, rows, key=jax.random.key(0))
    requests = jax.tree.map(lambda x: x[None], rows)
    never = lambda *_: pytest.fail("the model was run")  # noqa: E731
    unseen = estimator._replace(update=never)
    how = {"enough": 1.0, "predicted_kl": 0.1, "key": jax.random.key(1)}
    calls = {
        "many": lambda: batch_unlearn(never, params, curvature, requests),
        "overlap": lambda: interactions(curvature, Edit({})),
        "stream": lambda: continual(apply, unseen, rows, **how).init(params),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"curvature of '[uvw]' has the leading .* alone"):
            call()

"""Batch unlearning against one dense edit at a time, formed by `jax.grad` and `solve`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import ekfac, estimate, factors, kfac, quadratic_form, solve
from jedit.curvature.likelihoods import Categorical
from jedit.data import stack_requests
from jedit.edits import Edit, LowRank, apply_edit, compress, dense, sum_edits
from jedit.models import gpt
from jedit.objectives import GA
from jedit.requests import Solver, balanced, batch_unlearn, interactions
from jedit.requests.solution import inner_product

DAMPING = 0.3
REQUESTS, ROWS, SEQ, VOCAB = 5, 2, 6, 11


def batch_of(rng, *lead):
    """Rows of tokens with padding on the right, and half of them counted."""
    tokens = rng.integers(0, VOCAB, (*lead, SEQ + 1))
    valid = (np.arange(SEQ) < rng.integers(3, SEQ + 1, (*lead, 1))).astype(float)
    mask = valid * (np.arange(SEQ) > 0)
    parts = (tokens[..., :-1], tokens[..., 1:])
    return Batch(*(jnp.asarray(x, jnp.int32) for x in parts), jnp.asarray(mask), jnp.asarray(valid))


@pytest.fixture(scope="module")
def scene():
    """A GPT of one block, the curvature of a part of it, and five requests."""
    dtype = jnp.zeros(()).dtype
    apply, params = gpt(
        key=jax.random.key(0),
        vocab=VOCAB,
        width=8,
        num_layers=1,
        num_heads=2,
        max_len=SEQ,
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    retain = batch_of(rng, 8)
    estimator = kfac(apply, Categorical(), select="mlp|query|embed", fisher="empirical")
    curvature = estimate(estimator, params, [retain], key=jax.random.key(1))
    return apply, params, curvature, batch_of(rng, REQUESTS, ROWS), retain


def one(requests, r):
    """The request number r."""
    return jax.tree.map(lambda x: x[r], requests)


def expected(scene, r, inverse):
    """α d of one request at α = 1: the gradient by `jax.grad`, then `inverse`, dense."""
    apply, params, _, requests, _ = scene
    gradient = jax.grad(lambda p: -GA()(apply, p, one(requests, r))[0])(params)
    return inverse(gradient)


def factored(curvature):
    """(F + λ)⁻¹ with damped factors, written with `jnp.linalg.inv` on each block's matrix."""

    def invert(gradient):
        leaves = {
            jax.tree_util.keystr(p, simple=True, separator="/"): x
            for p, x in jax.tree_util.tree_leaves_with_path(gradient)
        }
        found = {}
        for name, block in curvature.blocks.items():
            matrix = block.weight.gather({p: leaves[p] for p in block.weight.paths})[0]
            if hasattr(block, "values"):
                lam = DAMPING * jnp.mean(block.values)
                step = matrix / (block.values[0] + lam)
            else:
                a, g = factors(curvature, name)
                a, g = (jnp.diag(x) if x.ndim == 1 else x for x in (a, g))
                a, g = (
                    x + np.sqrt(DAMPING) * jnp.trace(x) / len(x) * jnp.eye(len(x)) for x in (a, g)
                )
                step = jnp.linalg.inv(a) @ matrix @ jnp.linalg.inv(g)
            found |= block.weight.scatter(step[None])
        return found

    return invert


def exactly(curvature):
    """(F + λ)⁻¹ by `solve`, as a dict of the covered leaves."""

    def invert(gradient):
        step = solve(curvature, gradient, damping=DAMPING)
        return {
            path: x
            for p, x in jax.tree_util.tree_leaves_with_path(step)
            if (path := jax.tree_util.keystr(p, simple=True, separator="/")) in curvature.covered
        }

    return invert


@pytest.mark.parametrize("exact", [False, True])
def test_each_edit_is_the_dense_answer_to_its_request(scene, exact, tolerance):
    apply, params, curvature, requests, _ = scene
    inverse = (exactly if exact else factored)(curvature)
    edits, info = batch_unlearn(
        apply, params, curvature, requests, damping=DAMPING, solver=Solver(exact=exact, chunk=2)
    )
    kernel = edits.blocks["blocks/0/attn/query/kernel"]
    assert isinstance(kernel, LowRank) != exact
    for r in range(REQUESTS):
        wanted = expected(scene, r, inverse)
        found = {path: dense(one(block, r)) for path, block in edits.blocks.items()}
        tolerance.check(found, wanted, kind="factorization")
        loss = -GA()(apply, params, one(requests, r))[0]
        tolerance.check(info.loss[r], loss)


def test_what_is_told_of_an_edit_is_so(scene, tolerance):
    apply, params, curvature, requests, _ = scene
    edits, info = batch_unlearn(
        apply, params, curvature, requests, predicted_kl=0.01, damping=DAMPING
    )
    tolerance.check(info.predicted_kl, jnp.full(REQUESTS, 0.01), kind="factorization")
    for r in range(REQUESTS):
        edit = one(edits, r)
        change = jax.tree.map(jnp.subtract, apply_edit(params, edit), params)
        tolerance.check(
            0.5 * quadratic_form(curvature, change), info.predicted_kl[r], kind="factorization"
        )

        def loss(p, r=r):
            return -GA()(apply, p, one(requests, r))[0]

        # Only what the curvature covers is edited, and the tangent is zero elsewhere.
        _, gain = jax.jvp(loss, (params,), (change,))
        tolerance.check(gain, info.predicted_gain[r], kind="factorization")


@pytest.mark.parametrize("exact", [False, True])
def test_the_interactions_are_gains_of_one_edit_in_anothers_loss(scene, exact, tolerance):
    apply, params, curvature, requests, _ = scene
    edits, info = batch_unlearn(
        apply,
        params,
        curvature,
        requests,
        predicted_kl=1e-3,
        damping=DAMPING,
        solver=Solver(exact=exact),
    )
    gram = interactions(curvature, edits, damping=DAMPING, exact=exact)
    gains = np.zeros((REQUESTS, REQUESTS))
    for r in range(REQUESTS):
        gradient = expected(scene, r, lambda g: g)
        leaves = {
            jax.tree_util.keystr(p, simple=True, separator="/"): x
            for p, x in jax.tree_util.tree_leaves_with_path(gradient)
        }
        for s in range(REQUESTS):
            gains[r, s] = sum(
                float(jnp.vdot(leaves[path], dense(one(block, s))))
                for path, block in edits.blocks.items()
            )
    alpha = np.asarray(info.step_size, np.float64)
    tolerance.check(gram, alpha[:, None] * gains, kind="factorization")
    # Balanced, the sum raises each request's loss by what its own edit does.
    weights = np.asarray(balanced(gram, ridge=0.0))
    assert np.abs(weights - 1).max() > 0.05  # else nothing would be tried here
    np.testing.assert_allclose(gains @ weights, np.diagonal(gains), rtol=1e-4)


def test_equal_requests_share_one_edit(scene):
    apply, params, curvature, requests, _ = scene
    twins = jax.tree.map(lambda x: x[jnp.array([0, 0, 0, 1])], requests)
    edits, _ = batch_unlearn(apply, params, curvature, twins, predicted_kl=1e-3, damping=DAMPING)
    alone, _ = batch_unlearn(
        apply,
        params,
        curvature,
        jax.tree.map(lambda x: x[:2], requests),
        predicted_kl=1e-3,
        damping=DAMPING,
    )
    summed = [
        sum_edits(e, balanced(interactions(curvature, e, damping=DAMPING))) for e in (edits, alone)
    ]
    for path, block in summed[1].blocks.items():
        np.testing.assert_allclose(summed[0].blocks[path], block, rtol=2e-2, atol=1e-5)


def test_a_subset_is_summed_as_if_each_were_applied(scene, tolerance):
    apply, params, curvature, requests, _ = scene
    edits, _ = batch_unlearn(apply, params, curvature, requests, damping=DAMPING)
    mask = jnp.array([True, False, True, False, True])
    edited = apply_edit(params, sum_edits(edits, mask))
    one_by_one = params
    for r in (0, 2, 4):
        one_by_one = apply_edit(one_by_one, one(edits, r))
    tolerance.check(edited, one_by_one)
    with pytest.raises(ValueError, match=r"leading axes are \[5\], the mask is \(4,\)"):
        sum_edits(edits, mask[:4])


@pytest.mark.parametrize("exact", [False, True])
def test_a_rank_cuts_off_what_it_says(scene, exact):
    apply, params, curvature, requests, _ = scene
    given = (apply, params, curvature, requests)
    whole, _ = batch_unlearn(*given, damping=DAMPING, solver=Solver(exact))
    cut, info = batch_unlearn(*given, damping=DAMPING, solver=Solver(exact, rank=2))
    assert cut.blocks["blocks/0/mlp/up/kernel"].rank == 2
    for r in range(REQUESTS):
        blocks = {
            p: (dense(one(b, r)), dense(one(cut.blocks[p], r))) for p, b in whole.blocks.items()
        }
        lost = sum(float(jnp.sum((a - b) ** 2)) for a, b in blocks.values())
        norm = sum(float(jnp.sum(a**2)) for a, _ in blocks.values())
        # Twice the same number, by differences and by what was kept.
        np.testing.assert_allclose(info.cut_off[r], np.sqrt(lost / norm), rtol=1e-2, atol=1e-4)
        for name, block in curvature.blocks.items():
            if isinstance(cut.blocks[block.weight.path], LowRank):
                a, b = (
                    np.asarray(block.weight.gather({p: blocks[p][k] for p in block.weight.paths}))
                    for k in (0, 1)
                )
                values = np.linalg.svd(a[0])[1]
                best = np.sqrt((values[2:] ** 2).sum())
                assert np.linalg.norm(a - b) <= 1.1 * best + 1e-6 * values[0], name


def test_it_compiles_once_and_holds_no_copy_of_the_parameters_per_request(scene):
    apply, params, curvature, requests, _ = scene
    traces = []

    def counted(params, inputs):
        traces.append(1)
        return apply(params, inputs)

    for _ in range(3):
        edits, _ = batch_unlearn(counted, params, curvature, requests, solver=Solver(rank=1))
        count = len(traces)
        requests = jax.tree.map(lambda x: x[::-1], requests)
    assert len(traces) == count
    kernel = edits.blocks["blocks/0/mlp/up/kernel"]
    assert kernel.left.shape == (REQUESTS, 1, 8, 1)
    assert kernel.right.shape == (REQUESTS, 1, 1, 32)


def test_an_ensemble_is_one_vmap(scene, tolerance):
    apply, params, curvature, requests, retain = scene
    estimator = kfac(apply, Categorical(), select="mlp", fisher="empirical")
    models = [params, jax.tree.map(lambda x: 0.9 * x, params)]
    curvatures = [estimate(estimator, p, [retain], key=jax.random.key(0)) for p in models]

    def edit(params, curvature):
        return batch_unlearn(apply, params, curvature, requests, damping=DAMPING)[1]

    stacked = (jax.tree.map(lambda *xs: jnp.stack(xs), *x) for x in (models, curvatures))
    together = jax.vmap(edit)(*stacked)
    for i in range(2):
        alone = edit(models[i], curvatures[i])
        tolerance.check(jax.tree.map(lambda x, i=i: x[i], together), alone, kind="factorization")


def test_corrected_eigenvalues_are_used_when_exact(scene, tolerance):
    apply, params, curvature, requests, retain = scene
    estimator = ekfac(apply, Categorical(), curvature, fisher="empirical")
    corrected = estimate(estimator, params, [retain], key=jax.random.key(2))
    edits, _ = batch_unlearn(
        apply, params, corrected, requests, damping=DAMPING, solver=Solver(exact=True)
    )
    wanted = expected(scene, 1, exactly(corrected))
    found = {path: dense(one(block, 1)) for path, block in edits.blocks.items()}
    tolerance.check(found, wanted, kind="factorization")


def test_a_thin_edit_is_an_edit(scene, tolerance):
    apply, params, curvature, requests, _ = scene
    edits, _ = batch_unlearn(apply, params, curvature, requests, damping=DAMPING)
    first, second = one(edits, 0), one(edits, 1)
    thick = [Edit({path: dense(x) for path, x in e.blocks.items()}) for e in (first, second)]
    for thin, wanted in (
        (first + second, thick[0] + thick[1]),
        (2.0 * first - second, 2.0 * thick[0] - thick[1]),
        (first + thick[1], thick[0] + thick[1]),
    ):
        tolerance.check(apply_edit(params, thin), apply_edit(params, wanted))
    again, errors = compress(first + first, first.blocks["blocks/0/mlp/up/kernel"].rank)
    tolerance.check(apply_edit(params, again), apply_edit(params, 2.0 * thick[0]), "factorization")
    assert max(float(x) for x in errors.values()) < 1e-3


def test_what_it_refuses(scene):
    apply, params, curvature, requests, _ = scene
    with pytest.raises(ValueError, match="predicted_kl must be positive, got 0"):
        batch_unlearn(apply, params, curvature, requests, predicted_kl=0.0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Solver(rank=0)
    with pytest.raises(ValueError, match="need targets"):
        batch_unlearn(apply, params, curvature, Batch(requests.inputs))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        compress(Edit({}), 0)


def test_ragged_requests_are_stacked_and_answered_as_they_are_alone(scene, tolerance):
    apply, params, curvature, requests, _ = scene
    ragged = [
        jax.tree.map(lambda x: x[0, :1, :4], requests),
        jax.tree.map(lambda x: x[1], requests)._replace(mask=None),
        jax.tree.map(lambda x: x[2, :, :5], requests)._replace(valid=None),
    ]
    edits, _ = batch_unlearn(apply, params, curvature, stack_requests(ragged), damping=DAMPING)
    for r, request in enumerate(ragged):
        alone = jax.tree.map(lambda x: x[None], request)
        wanted, _ = batch_unlearn(apply, params, curvature, alone, damping=DAMPING)
        for path, block in wanted.blocks.items():
            found = dense(one(edits.blocks[path], r))
            tolerance.check(found, dense(one(block, 0)), kind="factorization")
    with pytest.raises(ValueError, match="no requests"):
        stack_requests([])
    with pytest.raises(ValueError, match="differ in the number of axes"):
        stack_requests([one(requests, 0), Batch(jnp.zeros(3), jnp.zeros(3))])


@pytest.mark.parametrize("shape", [(3, 2, 40, 50), (2, 3, 8, 9), (9, 9, 4, 5), (1, 1, 1, 1)])
def test_inner_products_of_thin_pairs_are_the_matrices(shape, key, tolerance):
    """Both ways: few long rows by their Gram matrices, many short ones by their products."""
    n, m, d_in, d_out = shape
    sides = ((n, d_in), (n, d_out), (m, d_in), (m, d_out))
    a, g, b, h = (
        jax.random.normal(k, (2, *side))
        for k, side in zip(jax.random.split(key, 4), sides, strict=True)
    )
    wide = [np.asarray(x, np.float64) for x in (a, g, b, h)]
    wanted = sum(np.sum((wide[0][i].T @ wide[1][i]) * (wide[2][i].T @ wide[3][i])) for i in (0, 1))
    size = np.sqrt(n * m * d_in * d_out)
    tolerance.check(inner_product((a, g), (b, h)) / size, wanted / size)
    # Whichever array is the smaller one is formed.
    text = jax.jit(inner_product).lower((a, g), (b, h)).as_text()
    made = re.findall(r"dot_general.*-> tensor<2x(\d+)x(\d+)x", text)
    is_long = max(n, m) * (d_in + d_out) <= d_in * d_out
    assert {tuple(map(int, x)) for x in made} == ({(n, m)} if is_long else {(d_in, d_out)})

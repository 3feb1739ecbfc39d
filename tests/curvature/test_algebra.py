"""The algebra on trees against dense matrices that NumPy and SciPy make of the factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

from jedit.core.batch import Batch
from jedit.curvature import (
    diagonal,
    ekfac,
    estimate,
    factors,
    kfac,
    matvec,
    power,
    quadratic_form,
    solve,
    trace,
)
from jedit.curvature.algebra import apply_spectral
from jedit.curvature.likelihoods import Categorical
from jedit.geometry import curvature_whitening
from jedit.methods.curvature.kfade import direction
from jedit.transforms import scale_by_curvature

KINDS = ("kfac", "ekfac", "diagonal")
each_kind = pytest.mark.parametrize("kind", KINDS)
damped = pytest.mark.parametrize(
    ("damping", "absolute"), [(0.03, True), (0.2, False)], ids=["absolute", "relative"]
)


def apply(params, x):
    """A bias, a gain, a stack in one leaf of which a layer is left out, and an uncovered leaf."""
    hidden = jnp.tanh(x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 5)))
    hidden = hidden * jnp.broadcast_to(params["gain"], hidden.shape)
    for i in (0, 2):
        hidden = jnp.tanh(hidden @ params["stack"][i])
    positive = jax.nn.relu(params["rate"])  # a custom derivative rule: no site
    return (hidden * jnp.broadcast_to(positive, hidden.shape)) @ params["v"].T


@pytest.fixture(scope="module")
def problem():
    """Params, a random tree, and the three curvatures, estimated once."""
    rng = np.random.default_rng(11)
    shapes = {
        "w": (4, 5), "b": (5,), "gain": (5,), "stack": (3, 5, 5), "rate": (5,), "v": (3, 5),
    }  # fmt: skip

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape), float)

    params, tree = ({name: normal(shape) for name, shape in shapes.items()} for _ in range(2))
    params["rate"] = jnp.abs(params["rate"])
    batch, key = Batch(normal((7, 4))), jax.random.key(3)
    exact = {"fisher": "exact"}
    first = estimate(kfac(apply, Categorical(), **exact), params, [batch], key=key)
    second = estimate(ekfac(apply, Categorical(), first, **exact), params, [batch], key=key)
    third = estimate(diagonal(apply, Categorical(), **exact), params, [batch], key=key)
    return params, tree, dict(zip(KINDS, (first, second, third), strict=True))


def dense(curvature, params, damping=0.0, absolute=False):
    """The whole matrix over the flattened params, damped on the covered ones, by NumPy.

    Returns:
        The matrix, and which entries of the flattened params are covered.
    """
    flat, unravel = ravel_pytree(params)
    places = unravel(np.arange(flat.size, dtype=flat.dtype))
    matrix, is_covered = np.zeros((flat.size, flat.size)), np.zeros(flat.size, bool)
    layouts = {
        "w": np.concatenate([np.asarray(places["w"]), np.asarray(places["b"])[None]]),
        "gain": np.asarray(places["gain"])[None],
        "stack": np.asarray(places["stack"][0]),
        "stack#1": np.asarray(places["stack"][2]),
        "v": np.asarray(places["v"]).T,
    }
    assert set(layouts) == set(curvature.blocks)
    for name, layout in layouts.items():
        block = curvature.blocks[name]
        if hasattr(block, "values"):
            whole = np.diag(np.asarray(block.values, np.float64).ravel())
        elif block.corrected is None:
            whole = np.kron(*(np.asarray(m, np.float64) for m in factors(curvature, name)))
        else:
            bases = (curvature.factors[f].basis[0] for f in (block.input, block.output))
            q = np.kron(*(np.asarray(basis, np.float64) for basis in bases))
            whole = q @ np.diag(np.asarray(block.corrected, np.float64).ravel()) @ q.T
        mean = 1.0 if absolute else np.trace(whole) / len(whole)
        entries = layout.astype(int).ravel()
        matrix[np.ix_(entries, entries)] = whole + damping * mean * np.eye(len(whole))
        is_covered[entries] = True
    return matrix, is_covered


def ravel(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@each_kind
@damped
def test_matvec_is_the_dense_product(problem, kind, damping, absolute, tolerance):
    params, tree, curvatures = problem
    matrix, _ = dense(curvatures[kind], params, damping, absolute)
    found = matvec(curvatures[kind], tree, damping=damping, absolute=absolute)
    tolerance.check(ravel(found), matrix @ ravel(tree), "factorization")


@each_kind
@damped
def test_solve_is_the_dense_solution(problem, kind, damping, absolute, tolerance):
    params, tree, curvatures = problem
    options = {"damping": damping, "absolute": absolute}
    matrix, covered = dense(curvatures[kind], params, **options)
    expected = np.zeros(len(matrix))
    expected[covered] = scipy.linalg.solve(matrix[np.ix_(covered, covered)], ravel(tree)[covered])
    found = solve(curvatures[kind], tree, **options)
    tolerance.check(ravel(found), expected, "factorization")
    back = matvec(curvatures[kind], found, **options)
    tolerance.check(ravel(back), np.where(covered, ravel(tree), 0), "factorization")


@each_kind
@damped
@pytest.mark.parametrize("exponent", [0.5, -0.5, 1.7])
def test_power_is_the_dense_power(problem, kind, damping, absolute, exponent, tolerance):
    params, tree, curvatures = problem
    options = {"damping": damping, "absolute": absolute}
    matrix, covered = dense(curvatures[kind], params, **options)
    w, q = scipy.linalg.eigh(matrix[np.ix_(covered, covered)])
    whole = (q * w**exponent) @ q.T
    expected = np.zeros(len(matrix))
    expected[covered] = whole @ ravel(tree)[covered]
    found = power(curvatures[kind], tree, exponent, **options)
    tolerance.check(ravel(found), expected, "factorization")


@each_kind
def test_powers_compose(problem, kind, tolerance):
    _, tree, curvatures = problem
    curvature = curvatures[kind]
    half = power(curvature, tree, 0.5, damping=0.1)
    whole = power(curvature, half, 0.5, damping=0.1)
    tolerance.check(whole, matvec(curvature, tree, damping=0.1), "factorization")
    inverse = power(curvature, tree, -1.0, damping=0.1)
    tolerance.check(inverse, solve(curvature, tree, damping=0.1), "factorization")


@each_kind
@damped
def test_forms_and_traces(problem, kind, damping, absolute, tolerance):
    params, tree, curvatures = problem
    options = {"damping": damping, "absolute": absolute}
    matrix, _ = dense(curvatures[kind], params, **options)
    form = quadratic_form(curvatures[kind], tree, **options)
    tolerance.check(form, ravel(tree) @ matrix @ ravel(tree), "factorization")
    tolerance.check(trace(curvatures[kind], **options), np.trace(matrix), "factorization")


def test_trace_is_the_product_of_traces(problem, tolerance):
    _, _, curvatures = problem
    curvature = curvatures["kfac"]
    pairs = [factors(curvature, name) for name in ("w", "stack", "stack#1", "v")]
    products = sum(jnp.trace(a) * jnp.trace(g) for a, g in pairs)
    tolerance.check(trace(curvature), products + jnp.sum(curvature.blocks["gain"].values))


@each_kind
def test_uncovered_parameters_are_frozen_or_pass(problem, kind, tolerance):
    """A leaf without a block, and the layer of a stack that no block has."""
    params, tree, curvatures = problem
    frozen = solve(curvatures[kind], tree, damping=0.1)
    passed = solve(curvatures[kind], tree, damping=0.1, uncovered="identity")
    _, covered = dense(curvatures[kind], params)
    assert 0 < (~covered).sum() == 5 + 25
    np.testing.assert_array_equal(ravel(frozen)[~covered], 0)
    np.testing.assert_array_equal(ravel(passed)[~covered], ravel(tree)[~covered])
    tolerance.check(ravel(passed)[covered], ravel(frozen)[covered], "rounding")


def test_without_damping_null_directions_are_left_at_zero(problem, tolerance):
    """The pseudo-inverse: solve(matvec(T)) is the projection of T, here on 7 inputs' span."""
    params, tree, curvatures = problem
    curvature = curvatures["diagonal"]
    values = curvature.blocks["gain"].values.at[0, 0, 1].set(0.0)
    block = type(curvature.blocks["gain"])(curvature.blocks["gain"].weight, values)
    curvature = type(curvature)({"gain": block}, {}, curvature.num_outputs)
    back = solve(curvature, matvec(curvature, tree), damping=0.0)
    tolerance.check(back["gain"], tree["gain"].at[1].set(0.0), "factorization")
    assert power(curvature, params, -0.5)["gain"][1] == 0


def test_jit_vmap_and_traced_damping(problem, tolerance):
    _, tree, curvatures = problem
    curvature = curvatures["ekfac"]
    expected = [solve(curvature, tree, damping=d) for d in (0.1, 0.7)]
    many = jax.jit(jax.vmap(lambda c, t, d: solve(c, t, damping=d), in_axes=(None, None, 0)))
    found = many(curvature, tree, jnp.asarray([0.1, 0.7]))
    for i, one in enumerate(expected):
        tolerance.check(jax.tree.map(lambda x, i=i: x[i], found), one, "factorization")


def test_leaves_keep_their_dtype(problem):
    """bfloat16 in, bfloat16 out, one rounding away from the wide result."""
    _, tree, curvatures = problem
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    found = solve(curvatures["kfac"], narrow, damping=0.1, uncovered="identity")
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda x: x.astype(float), narrow)
    wide = solve(curvatures["kfac"], wide, damping=0.1, uncovered="identity")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(a.astype(float), b, rtol=2**-8, atol=1e-12)


def test_bad_trees_get_a_sentence(problem):
    _, tree, curvatures = problem
    curvature = curvatures["kfac"]
    without = {name: leaf for name, leaf in tree.items() if name != "b"}
    with pytest.raises(ValueError, match="the tree has no leaf 'b', which the curvature covers"):
        solve(curvature, without, damping=0.1)
    flipped = {**tree, "w": tree["w"].T}
    for call in (quadratic_form, matvec):
        with pytest.raises(ValueError, match=r"leaf 'w' has shape \(5, 4\), .* has \(4, 5\)"):
            call(curvature, flipped)
    with pytest.raises(ValueError, match="uncovered must be"):
        apply_spectral(curvature, tree, jnp.sqrt, uncovered="freeze")
    with pytest.raises(ValueError, match="'gain' has no Kronecker block; of those that"):
        factors(curvature, "gain")


def test_damping_is_in_units_of_the_blocks_mean_eigenvalue(key, tolerance):
    """Of a block whose A is 5 by 5 and G 3 by 3, by a dense solve with 0.1 of its mean eigenvalue.

    And what solves in a curvature's metric elsewhere damps by the same number.
    """
    rng = np.random.default_rng(7)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.asarray(rng.normal(size=3))}
    batch = Batch(jnp.asarray(rng.normal(size=(50, 4)) * [3.0, 1.0, 0.3, 0.1]))
    affine = lambda p, x: x @ p["w"] + jnp.broadcast_to(p["b"], (len(x), 3))  # noqa: E731
    curvature = estimate(kfac(affine, Categorical()), params, [batch], key=key)
    a, g = (np.asarray(m, np.float64) for m in factors(curvature, "w"))
    assert (a.shape, g.shape) == ((5, 5), (3, 3))
    whole = np.kron(a, g)
    mean = np.trace(whole) / 15
    assert not 0.5 < mean < 2  # or an absolute number would pass for a relative one
    matrix = whole + 0.1 * mean * np.eye(15)
    tree = {"w": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.asarray(rng.normal(size=3))}
    rows = np.concatenate([np.asarray(tree["w"]), np.asarray(tree["b"])[None]]).ravel()

    def check(found, expected):
        found = np.concatenate([np.asarray(found["w"]), np.asarray(found["b"])[None]])
        tolerance.check(found.ravel(), expected, "factorization")

    solved = np.linalg.solve(matrix, rows)
    check(solve(curvature, tree, damping=0.1), solved)
    check(solve(curvature, tree, damping=0.1 * mean, absolute=True), solved)
    check(matvec(curvature, tree, damping=0.1), matrix @ rows)
    check(power(curvature, tree, -1.0, damping=0.1), solved)
    form = quadratic_form(curvature, tree, damping=0.1)
    tolerance.check(form, rows @ matrix @ rows, "factorization")
    tolerance.check(trace(curvature, damping=0.1), np.trace(matrix), "factorization")
    transform = scale_by_curvature(curvature, damping=0.1)
    check(transform.update(tree, transform.init(params), params)[0], solved)
    whitening = curvature_whitening(curvature, damping=0.1)
    check(whitening.whiten(whitening.whiten(tree)), solved)
    check(direction(curvature, tree, 0.1), -solved)

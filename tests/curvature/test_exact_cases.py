"""Where an approximation is exact, and the spectra that are exact by definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.core.batch import Batch
from jedit.curvature import (
    diagonal,
    eigenvalues,
    ekfac,
    estimate,
    factors,
    ggn_vector_product,
    kfac,
    matvec,
    trace,
)
from jedit.curvature.likelihoods import Categorical, Gaussian
from jedit.curvature.types import Diagonal
from tests.curvature.programs import BY_NAME, TEMPERED, exact_kfac, make_problem
from tests.curvature.references import counted, dense_fisher, rows_as_trees, score_rows

# The others differ from these in the layout of their sites alone, which test_factors has.
SPECTRA = [
    *("rows", "factored", "convolution", "tied", "shared_twice", "stack", "recurrent"),
    *("mixture", "branches", "normalised", "gained_rows", "positioned"),
]


def in_basis(curvature, name, rows):
    """A block's gradients (rows, layers, d_in, d_out) of a tree of rows, in its eigenbasis."""
    block = curvature.blocks[name]
    matrices = jax.vmap(block.weight.gather)(jax.tree.map(jnp.asarray, rows))
    matrices = np.asarray(matrices, np.float64)
    if isinstance(block, Diagonal):
        return matrices
    for factor, spec in ((block.input, "lia,rlij->rlaj"), (block.output, "ljb,rlij->rlib")):
        basis = curvature.factors[factor].basis
        if basis is not None:
            matrices = np.einsum(spec, np.asarray(basis, np.float64), matrices)
    return matrices


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_equal_brute_force(name, key, tolerance):
    """EK-FAC and the diagonal against gradients of every output and label, by `jax.jacrev`."""
    program = BY_NAME[name]
    params, batch, first = exact_kfac(program)
    rows, number = score_rows(program.run, TEMPERED, params, batch)
    trees = rows_as_trees(rows, params)
    exact = {"fisher": "exact"}
    flat = estimate(diagonal(program.run, TEMPERED, **exact), params, [batch], key=key)
    corrected = estimate(ekfac(program.run, TEMPERED, first, **exact), params, [batch], key=key)
    assert set(flat.covered) == set(corrected.covered) == set(params)
    for curvature in (flat, corrected):
        for name in curvature.blocks:
            expected = (in_basis(curvature, name, trees) ** 2).sum(0) / number
            tolerance.check(eigenvalues(curvature, name), expected)
        tolerance.check(trace(curvature), (rows**2).sum() / number)


@pytest.mark.parametrize("name", ["perceptron", "convolution", "tied", "positioned"])
def test_empirical_spectra_are_per_example_gradients(name, key, tolerance):
    program = BY_NAME[name]
    params, batch, _ = exact_kfac(program)
    classes = program.run(params, batch.inputs).shape[-1]
    targets = jnp.asarray(np.arange(np.prod(program.lead)).reshape(program.lead) % classes)
    batch = batch._replace(targets=targets)
    is_counted = jnp.asarray(counted(batch, program.lead))

    def loss(params, n):
        """The summed loss of example n, in a batch that holds it alone where others are zero."""
        nll = Categorical().nll(program.run(params, batch.inputs), targets)
        return jnp.sum(jnp.where(is_counted, nll, 0)[n])

    examples = jnp.arange(len(targets))
    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(params, examples)
    expected = jax.tree.map(lambda g: np.square(g).sum(0) / np.asarray(is_counted).sum(), gradients)
    estimator = diagonal(program.run, Categorical(), fisher="empirical")
    found = estimate(estimator, params, [batch], key=key)
    trees = [block.weight.scatter(block.values) for block in found.blocks.values()]
    found = {path: sum(t[path] for t in trees if path in t) for path in params}
    tolerance.check(found, expected)


def test_empirical_factors_of_a_linear_layer(key, tolerance):
    """G is the second moment of softmax(z) - onehot(y), by NumPy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(7, 4)), rng.normal(size=(4, 3))
    y = rng.integers(3, size=7)
    batch = Batch(jnp.asarray(x, float), targets=jnp.asarray(y))
    estimator = kfac(lambda p, x: x @ p["w"], Categorical(), fisher="empirical")
    found = factors(estimate(estimator, {"w": jnp.asarray(w, float)}, [batch], key=key), "w")
    p = np.exp(x @ w)
    g = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    tolerance.check(found, (x.T @ x / 7, g.T @ g / 7))


def check_dense_blocks(apply, likelihood, params, batch, tolerance, **options):
    """Every K-FAC block, with its bias, equals that block of the dense Fisher."""
    curvature = estimate(
        kfac(apply, likelihood, fisher="exact", **options), params, [batch], key=jax.random.key(0)
    )
    rows, number = score_rows(apply, likelihood, params, batch)
    trees = rows_as_trees(rows, params)
    for name, block in curvature.blocks.items():
        matrices = np.asarray(jax.vmap(block.weight.gather)(jax.tree.map(jnp.asarray, trees)))
        flat = matrices.reshape(len(rows), -1).astype(np.float64)
        a, g = factors(curvature, name)
        kron = np.kron(np.asarray(a, np.float64), np.asarray(g, np.float64))
        tolerance.check(kron, flat.T @ flat / number)
        tolerance.check(jnp.sum(eigenvalues(curvature, name)), np.trace(kron))
    return curvature


def linear(params, x):
    for name in sorted(params):
        if not name.startswith("b"):
            x = x @ params[name]
            if "b" + name in params:
                x = x + jnp.broadcast_to(params["b" + name], x.shape)
    return x


def linear_params(rng, shapes):
    return {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in shapes.items()}


def test_one_softmax_layer_and_one_example(key, tolerance):
    del key
    rng = np.random.default_rng(1)
    params = linear_params(rng, {"w": (4, 3), "bw": (3,)})
    batch = Batch(jnp.asarray(rng.normal(size=(1, 4)), float))
    check_dense_blocks(linear, Categorical(1.6), params, batch, tolerance)


def test_deep_linear_network_with_one_example(tolerance):
    rng = np.random.default_rng(2)
    params = linear_params(rng, {"u": (4, 5), "bu": (5,), "v": (5, 6), "w": (6, 3), "bw": (3,)})
    batch = Batch(jnp.asarray(rng.normal(size=(1, 4)), float))
    curvature = check_dense_blocks(linear, Categorical(0.8), params, batch, tolerance)
    corrected = estimate(
        ekfac(linear, Categorical(0.8), curvature, fisher="exact"),
        params,
        [batch],
        key=jax.random.key(0),
    )
    for name in curvature.blocks:  # one normalisation: exact K-FAC needs no correction
        tolerance.check(eigenvalues(corrected, name), eigenvalues(curvature, name), "factorization")
    tolerance.check(trace(corrected), trace(curvature))


def test_linear_regression_of_many_masked_positions(tolerance):
    """Where G does not vary, A ⊗ G is exact whatever the inputs."""
    rng = np.random.default_rng(3)
    params = linear_params(rng, {"w": (4, 3), "bw": (3,)})
    valid = jnp.asarray([[1, 1, 0], [1, 0, 0]])
    batch = Batch(jnp.asarray(rng.normal(size=(2, 3, 4)), float), valid=valid)
    check_dense_blocks(linear, Gaussian(0.6), params, batch, tolerance)


def test_averaged_positions_are_exact_when_reduced(tolerance):
    rng = np.random.default_rng(4)
    params = linear_params(rng, {"w": (4, 3), "bw": (3,)})
    batch = Batch(jnp.asarray(rng.normal(size=(1, 5, 4)), float))

    def apply(params, x):
        return jnp.mean(linear(params, x), axis=1)

    check_dense_blocks(apply, Categorical(), params, batch, tolerance, sharing="reduce")
    with pytest.raises(AssertionError):
        check_dense_blocks(apply, Categorical(), params, batch, tolerance, sharing="expand")


def test_matvec_equals_the_matrix_free_product(tolerance):
    rng = np.random.default_rng(5)
    params = linear_params(rng, {"w": (4, 3)})
    vector = linear_params(rng, {"w": (4, 3)})
    batch = Batch(jnp.asarray(rng.normal(size=(1, 4)), float))
    for likelihood in (Categorical(1.4), Gaussian(0.6)):
        curvature = estimate(
            kfac(linear, likelihood, fisher="exact"), params, [batch], key=jax.random.key(0)
        )
        product = ggn_vector_product(linear, params, batch, vector, likelihood=likelihood)
        tolerance.check(matvec(curvature, vector), product, "factorization")
        fisher = dense_fisher(linear, likelihood, params, batch)
        tolerance.check(product["w"].ravel(), fisher @ np.asarray(vector["w"]).ravel())


def many_draws(estimator, params, batch, key, number=400):
    """The state after one batch for many keys, stacked."""
    state = estimator.init(params, batch)
    keys = jax.random.split(key, number)
    return jax.jit(jax.vmap(estimator.update, in_axes=(None, None, None, 0)))(
        state, params, batch, keys
    )


def check_mean(draws, expected, num_errors=5):
    """The mean of draws is the expected array within standard errors that they estimate."""
    draws, expected = np.asarray(draws, np.float64), np.asarray(expected, np.float64)
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert np.all(error[np.abs(expected) > 1e-3] > 0)
    assert np.all(np.abs(draws.mean(axis=0) - expected) <= num_errors * error + 1e-6)


@pytest.mark.parametrize("name", ["normalised", "positioned"])
def test_sampled_sums_converge_to_the_exact_ones(name, key):
    program = BY_NAME[name]
    params, batch, _ = exact_kfac(program)
    sampled = many_draws(kfac(program.run, Categorical()), params, batch, key)
    exact = kfac(program.run, Categorical(), fisher="exact")
    exact = jax.jit(exact.update)(exact.init(params, batch), params, batch, key)
    jax.tree.map(check_mean, sampled.squares, exact.squares)
    lower = [jax.tree.map(jnp.tril, state.outputs) for state in (sampled, exact)]
    jax.tree.map(check_mean, *lower)
    drawn = jax.tree.map(lambda x: x[0], sampled.inputs)
    jax.tree.map(np.testing.assert_array_equal, drawn, exact.inputs)


def test_sampled_squares_converge_to_the_exact_ones(key):
    program = BY_NAME["perceptron"]
    params, batch, curvature = exact_kfac(program)
    sampled = many_draws(ekfac(program.run, TEMPERED, curvature), params, batch, key)
    exact = ekfac(program.run, TEMPERED, curvature, fisher="exact")
    exact = jax.jit(exact.update)(exact.init(params, batch), params, batch, key)
    jax.tree.map(check_mean, sampled.squares, exact.squares)


@pytest.mark.reuses_keys  # one key for the problem and for the labels: they are independent of it
def test_more_samples_are_averaged(key):
    """The mean of 400 draws in one estimate, against the spread of single draws."""
    program = BY_NAME["rows"]
    params, batch = make_problem(program, key)
    k_single, k_many = jax.random.split(key)
    single = many_draws(diagonal(program.run, Categorical()), params, batch, k_single)
    spread = jax.tree.map(lambda x: np.asarray(x).std(0) / np.sqrt(400), single.squares)
    exact = estimate(diagonal(program.run, Categorical(), fisher="exact"), params, [batch], key=key)
    many = diagonal(program.run, Categorical(), samples=400)
    found = estimate(many, params, [batch], key=k_many)
    number = counted(batch, program.lead).sum()
    for name, block in found.blocks.items():
        error = np.abs(np.asarray(block.values) - np.asarray(exact.blocks[name].values))
        assert np.all(error <= 5 * spread[name] / number + 1e-6)
    factor = estimate(kfac(program.run, Categorical(), samples=400), params, [batch], key=k_many)
    whole = estimate(kfac(program.run, Categorical(), fisher="exact"), params, [batch], key=key)
    np.testing.assert_allclose(trace(factor), trace(whole), rtol=0.2)


def test_an_estimate_without_counted_outputs_is_refused(key):
    program = BY_NAME["perceptron"]
    params, batch = make_problem(program, key)
    batch = batch._replace(mask=jnp.zeros(program.lead))
    with pytest.raises(ValueError, match="the curvature is of no outputs"):
        estimate(kfac(program.run, Categorical()), params, [batch], key=key)


def test_one_damping_means_one_thing(key, tolerance):
    """Mean eigenvalues of K-FAC and EK-FAC agree for uneven masks and several positions."""
    program = dataclasses.replace(BY_NAME["perceptron"], shapes={"v": (4, 3)}, model=last_layer)
    params, batch = make_problem(program, key)
    batch = batch._replace(mask=batch.valid)
    likelihood = Gaussian(0.5)
    first = estimate(kfac(program.run, likelihood, fisher="exact"), params, [batch], key=key)
    second = estimate(
        ekfac(program.run, likelihood, first, fisher="exact"), params, [batch], key=key
    )
    tolerance.check(eigenvalues(second, "v"), eigenvalues(first, "v"), "factorization")


def last_layer(params, x, tap):
    return tap("v", x, x @ params["v"])

"""Curvatures without all eigenvectors, against dense matrices that NumPy makes of the factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jedit.core.batch import Batch
from jedit.curvature import (
    Factorize,
    estimate,
    factors,
    kfac,
    matvec,
    power,
    quadratic_form,
    rotate,
    solve,
    trace,
)
from jedit.curvature.likelihoods import Categorical

pytestmark = pytest.mark.float64  # precise statements about linear algebra
SHAPES = {"w": (6, 5), "b": (5,), "stack": (2, 5, 5), "v": (3, 5)}
RANK = 3
damped = pytest.mark.parametrize(
    ("damping", "absolute"), [(0.03, True), (0.2, False)], ids=["absolute", "relative"]
)


def apply(params, x):
    hidden = jnp.tanh(x @ params["w"] + jnp.broadcast_to(params["b"], (len(x), 5)))
    for one in params["stack"]:
        hidden = jnp.tanh(hidden @ one)
    return hidden @ params["v"].T


@pytest.fixture(scope="module")
def problem():
    """Params, a random tree, and a way to estimate a curvature of the same moments."""
    rng = np.random.default_rng(3)
    params, tree = (
        {name: jnp.asarray(rng.normal(size=shape), float) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    batch = Batch(jnp.asarray(rng.normal(size=(9, 6)), float))

    def curvature(how):
        estimator = kfac(apply, Categorical(), fisher="exact", factorize=how)
        return estimate(estimator, params, batch, key=jax.random.key(0))

    return params, tree, curvature


def of_factors(dense, function):
    """A tree's image when `function(A, G, T)` acts on each block's matrices, in NumPy."""

    def image(tree):
        new = {name: np.zeros(np.shape(leaf)) for name, leaf in tree.items()}
        whole = np.vstack([tree["w"], tree["b"][None]])
        found = function(*map(np.asarray, factors(dense, "w")), whole)
        new["w"], new["b"] = found[:-1], found[-1]
        for k in range(2):
            name = "stack" if k == 0 else f"stack#{k}"
            a, g = (np.asarray(x).reshape(5, 5) for x in factors(dense, name))
            new["stack"][k] = function(a, g, np.asarray(tree["stack"][k]))
        a, g = map(np.asarray, factors(dense, "v"))
        new["v"] = function(a, g, np.asarray(tree["v"]).T).T
        return new

    return image


def apart(damping, absolute):
    """(A + λ_A, G + λ_G) by the definition of factored damping."""

    def pair(a, g):
        mean_a, mean_g = np.trace(a) / len(a), np.trace(g) / len(g)
        level = damping if absolute else damping * mean_a * mean_g
        ratio = np.sqrt(mean_a / mean_g)
        return (
            a + ratio * np.sqrt(level) * np.eye(len(a)),
            g + np.sqrt(level) / ratio * np.eye(len(g)),
        )

    return pair


def rounded_off(matrix, rank):
    """The matrix with all but its leading eigenvalues replaced by their mean."""
    values, vectors = np.linalg.eigh(matrix)
    if rank < len(matrix):
        values[: len(matrix) - rank] = values[: len(matrix) - rank].mean()
    return (vectors * values) @ vectors.T


def agree(found, expected, rtol=1e-9):
    one, other = (ravel_pytree(jax.tree.map(np.asarray, x))[0] for x in (found, expected))
    np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@damped
@pytest.mark.parametrize("by", ["cholesky", "inverse"])
def test_factored_damping_is_that_of_both_factors(problem, damping, absolute, by):
    _, tree, curvature = problem
    dense, kept = curvature("eigh"), curvature(by)
    pair, how = apart(damping, absolute), {"damping": damping, "absolute": absolute}

    def inverse(a, g, matrix):
        a, g = pair(a, g)
        return np.linalg.solve(a, matrix) @ np.linalg.inv(g)

    def product(a, g, matrix):
        a, g = pair(a, g)
        return a @ matrix @ g

    # By products an inverse has the residual that is asked for, 1.5e-8, or less.
    agree(
        solve(kept, tree, **how),
        of_factors(dense, inverse)(tree),
        1e-7 if by == "inverse" else 1e-9,
    )
    moved = of_factors(dense, product)(tree)
    agree(matvec(kept, tree, **how), moved)
    form = sum(float(np.sum(np.asarray(tree[n]) * moved[n])) for n in tree)
    np.testing.assert_allclose(quadratic_form(kept, tree, **how), form, rtol=1e-9)


@damped
def test_leading_eigenvectors_with_the_mean_of_the_rest(problem, damping, absolute):
    _, tree, curvature = problem
    dense, kept = curvature("eigh"), curvature(Factorize(rank=RANK))
    how = {"damping": damping, "absolute": absolute}

    def spectral(function):
        def image(a, g, matrix):
            a, g = rounded_off(a, RANK), rounded_off(g, RANK)
            whole = np.kron(a, g)
            level = damping if absolute else damping * np.trace(whole) / len(whole)
            values, vectors = np.linalg.eigh(whole + level * np.eye(len(whole)))
            return ((vectors * function(values)) @ vectors.T @ matrix.reshape(-1)).reshape(
                matrix.shape
            )

        return of_factors(dense, image)(tree)

    agree(solve(kept, tree, **how), spectral(lambda x: 1 / x), 1e-7)
    agree(matvec(kept, tree, **how), spectral(lambda x: x))
    agree(power(kept, tree, -0.5, **how), spectral(lambda x: x**-0.5), 1e-7)
    moved = spectral(lambda x: x)
    form = sum(float(np.sum(np.asarray(tree[n]) * moved[n])) for n in tree)
    np.testing.assert_allclose(quadratic_form(kept, tree, **how), form, rtol=1e-9)


@pytest.mark.parametrize("how", ["cholesky", "inverse", Factorize(rank=RANK)], ids=str)
def test_traces_and_undamped_forms_are_those_of_the_dense_curvature(problem, how):
    _, _, curvature = problem
    np.testing.assert_allclose(trace(curvature(how)), trace(curvature("eigh")), rtol=1e-9)


def test_a_rank_as_long_as_the_axis_is_the_dense_answer(problem):
    _, tree, curvature = problem
    agree(
        solve(curvature(Factorize(rank=100)), tree, damping=0.1),
        solve(curvature("eigh"), tree, damping=0.1),
    )


@pytest.mark.parametrize("how", ["cholesky", Factorize(rank=RANK)], ids=str)
def test_what_needs_all_eigenvectors_says_so(problem, how):
    _, _, curvature = problem
    with pytest.raises(ValueError, match=r"curvature of '.*' has .*factorize=\"eigh\""):
        rotate(curvature(how), "w", jnp.zeros((1, 7, 5)))


def test_a_rank_and_no_eigenvectors_exclude_one_another():
    with pytest.raises(ValueError, match='rank=4 keeps eigenvectors, which by="cholesky"'):
        Factorize("cholesky", rank=4)

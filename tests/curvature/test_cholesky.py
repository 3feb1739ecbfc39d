"""Cholesky factors by products of matrices against NumPy's in float64."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.curvature import Factor, factored
from jedit.curvature.cholesky import SHORTEST, by_products, cholesky


def matrices(d, layers=2, level=0.1):
    """Second moments of rows whose coordinates fall off, damped."""
    rng = np.random.default_rng(d)
    rows = rng.standard_normal((layers, 2 * d, d)) / np.sqrt(np.arange(1, d + 1))
    moments = np.einsum("lni,lnj->lij", rows, rows) / (2 * d)
    return moments + level * np.eye(d)


# One leaf; two and three of unlike lengths; layers; and the first side at which it is used.
@pytest.mark.parametrize(("d", "layers"), [(7, 1), (100, 2), (211, 1), (SHORTEST, 3), (333, 1)])
def test_it_is_numpys(d, layers, tolerance):
    A = matrices(d, layers)
    found = np.asarray(jax.jit(by_products)(jnp.asarray(A, float)), np.float64)
    tolerance.check(found, np.linalg.cholesky(A), "factorization")
    np.testing.assert_array_equal(np.triu(found, 1), 0)


@pytest.mark.float64
def test_a_large_condition_costs_no_more_than_lapack_does():
    """Leaves are inverted, which a bad condition would show in what is left over."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 300)))
    A = ((q * 10.0 ** np.linspace(-12, 0, 300)) @ q.T)[None]

    def left_over(L):
        return np.linalg.norm(L @ L.T - A[0]) / np.linalg.norm(A[0])

    found = np.asarray(by_products(jnp.asarray(A))[0])
    assert left_over(found) <= 3 * left_over(np.linalg.cholesky(A[0])) + 1e-15


@pytest.mark.parametrize("bad", [0, 120, 299])
def test_what_is_not_positive_definite_is_nan_from_there_on(bad):
    A = matrices(300)
    A[0, bad, bad] = -1
    found = np.asarray(jax.jit(cholesky)(jnp.asarray(A, float)))
    rows, columns = np.tril_indices(300)
    assert np.isnan(found[0][bad:][:, bad:][np.tril_indices(300 - bad)]).all()
    # Columns before the leaf that failed are as they would be, and so is the other layer.
    assert np.isfinite(found[1]).all()
    before = max(0, bad - 300 // 3)
    assert np.isfinite(found[0][rows, columns][columns < before]).all()


def test_gradients_and_vmap_are_jaxs(tolerance, key):
    A = jnp.asarray(matrices(SHORTEST), float)
    weights = jax.random.normal(key, A.shape)

    def of(function):
        return lambda x: jnp.sum(weights * function((x + jnp.swapaxes(x, 1, 2)) / 2))

    found, expected = (jax.grad(of(f))(A) for f in (cholesky, jnp.linalg.cholesky))
    tolerance.check(found, expected, "factorization")
    side_by_side = jax.vmap(cholesky)(A[:, None])
    tolerance.check(side_by_side[:, 0], cholesky(A), "factorization")


def test_matrices_under_vmap_are_no_batch_for_lapack():
    """Batched calls side by side wait for one another, where CPUs have several threads."""

    def dims(function):
        shape = jax.ShapeDtypeStruct((3, 2, SHORTEST, SHORTEST), float)
        text = jax.jit(jax.vmap(function)).lower(shape).as_text()
        calls = re.findall(r"@lapack_.*?\(tensor<((?:\d+x)+)", text)
        return {call.count("x") for call in calls}

    assert dims(cholesky) == {2}
    assert dims(by_products) == {3}  # what is asked would be seen


def largest_leaf(function, *given):
    """The longest matrix that LAPACK is handed, in the program of a function."""
    text = jax.jit(function).lower(*given).as_text()
    sides = re.findall(r"lapack_.potrf_ffi\(.*?tensor<(?:\d+x)*?(\d+)x\d+xf", text)
    return max(map(int, sides))


def test_damped_factors_are_made_by_it_on_cpus_and_by_the_library_elsewhere():
    shape = jax.ShapeDtypeStruct((2, SHORTEST, SHORTEST), float)
    level = jax.ShapeDtypeStruct((2,), float)

    def values(matrix, level):
        return factored.inverse(Factor(matrix, None, None, "cholesky"), level).values

    assert largest_leaf(values, shape, level) < SHORTEST / 2
    assert largest_leaf(jnp.linalg.cholesky, shape) == SHORTEST
    short = jax.ShapeDtypeStruct((2, SHORTEST - 1, SHORTEST - 1), float)
    assert largest_leaf(values, short, level) == SHORTEST - 1
    exported = jax.export.export(jax.jit(values), platforms=["cuda"])(shape, level)
    text = exported.mlir_module()
    assert "cusolver_potrf" in text
    assert "lapack" not in text
    assert "dot_general" not in text

"""Eigendecompositions: one matrix a call, outside of jit, in the dtype asked for."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit.curvature import Factorize, estimate, kfac
from jedit.curvature.checks import check_layers_finite
from jedit.curvature.eigenbases import factorize
from jedit.curvature.likelihoods import Categorical
from tests.curvature.programs import BY_NAME, make_problem


def moment(rng, layers, d, n):
    x = rng.normal(size=(layers, n, d))
    return jnp.asarray(np.einsum("lni,lnj->lij", x, x) / n, float)


def test_factors_are_their_decompositions(tolerance):
    matrix = moment(np.random.default_rng(0), 3, 6, 4)  # of rank 4
    factor = factorize(matrix, "w")
    q, w = np.asarray(factor.basis, np.float64), np.asarray(factor.eigenvalues, np.float64)
    tolerance.check(np.einsum("lij,lj,lkj->lik", q, w, q), matrix, "factorization")
    tolerance.check(np.einsum("lij,lik->ljk", q, q), np.stack([np.eye(6)] * 3), "factorization")
    assert np.all(w >= 0)
    assert np.all(np.diff(w, axis=1) >= 0)
    diagonal = factorize(jnp.ones((2, 5)), "w")
    assert diagonal.basis is None


def test_one_call_for_each_matrix_and_none_in_jit(monkeypatch, key):
    """Several batched eigh in one jitted function deadlock in jaxlib 0.10.2 on CPU."""
    calls = []
    eigh = jnp.linalg.eigh

    def watched(matrix, *args, **kwargs):
        calls.append((matrix.ndim, isinstance(matrix, jax.core.Tracer)))
        return eigh(matrix, *args, **kwargs)

    monkeypatch.setattr(jnp.linalg, "eigh", watched)
    program = BY_NAME["stack"]
    params, batch = make_problem(program, key)
    estimate(kfac(program.run, Categorical()), params, [batch], key=key)
    assert calls == [(2, False)] * (2 * 3 + 2)  # A and G of three layers, and of the head


def test_finalize_under_jit_is_no_way_round(key):
    program = BY_NAME["perceptron"]
    params, batch = make_problem(program, key)
    estimator = kfac(program.run, Categorical())
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(estimator.finalize)(estimator.init(params, batch))


def test_many_blocks_do_not_deadlock():
    """In a process of its own, which is killed when it hangs."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jedit.curvature import estimate, kfac
from jedit.curvature.likelihoods import Categorical
from jedit.core.batch import Batch

rng = np.random.default_rng(0)
params = {f"w{i:02}": jnp.asarray(rng.normal(size=(96, 96)) / 10, jnp.float32) for i in range(8)}
params["stack"] = jnp.asarray(rng.normal(size=(8, 96, 96)) / 10, jnp.float32)

def apply(params, x):
    for i in range(8):
        x = jnp.tanh(x @ params[f"w{i:02}"])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]

batch = Batch(jnp.asarray(rng.normal(size=(64, 96)), jnp.float32))
estimator = kfac(apply, Categorical())
for _ in range(3):
    curvature = estimate(estimator, params, [batch], key=jax.random.key(0))
    jax.block_until_ready(curvature)
print(len(curvature.factors))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stdout.split() == ["18"]


def check_rounded_once(found, exact, name=""):
    difference = np.abs(np.asarray(found, np.float64) - np.maximum(exact, 0))
    assert np.all(difference <= 2.0**-24 * np.abs(exact) + 1e-14), name


@pytest.mark.parametrize("dtype", [np.float64, "float64"], ids=["type", "name"])
def test_float32_moments_decomposed_in_float64(dtype, key):
    """Also where JAX has float64 disabled; moments and results stay float32."""
    rng = np.random.default_rng(1)
    matrix = moment(rng, 1, 40, 30).astype(jnp.float32)
    factor = factorize(matrix, "w", dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(factor)} == {jnp.dtype(jnp.float32)}
    expected = np.linalg.eigvalsh(np.asarray(matrix[0], np.float64))
    check_rounded_once(factor.eigenvalues[0], expected)
    # So many leading ones are found among all.
    leading = factorize(matrix, "w", dtype=dtype, how=Factorize(rank=12))
    assert leading.form == "leading"
    check_rounded_once(leading.eigenvalues[0, 1:], expected[-12:])
    program = BY_NAME["perceptron"]
    params, batch = make_problem(program, key)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    batch = batch._replace(inputs=batch.inputs.astype(jnp.float32))
    estimator = kfac(program.run, Categorical())
    state = estimator.update(estimator.init(narrow, batch), narrow, batch, key)
    for name, factor in estimator.finalize(state, dtype=dtype).factors.items():
        assert factor.eigenvalues.dtype == jnp.float32
        exact = np.linalg.eigvalsh(np.asarray(factor.matrix[0], np.float64))
        check_rounded_once(factor.eigenvalues[0], exact, name)


def test_what_is_not_finite_never_reaches_lapack():
    matrix = jnp.stack([jnp.eye(3), jnp.eye(3).at[0, 1].set(jnp.nan), jnp.eye(3)])
    with pytest.raises(FloatingPointError, match=r"'w' \(layers \[1\]\) is not finite"):
        factorize(matrix, "w")
    with pytest.raises(FloatingPointError, match="'w' is not finite: because"):
        check_layers_finite(matrix[1:2], "w", "because")

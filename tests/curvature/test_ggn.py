"""The matrix-free Gauss-Newton product against a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jedit.core import row_blocks
from jedit.core.batch import Batch
from jedit.curvature.ggn import ggn_vector_product, quadratic_kl
from jedit.curvature.likelihoods import Bernoulli, Categorical, Gaussian

LIKELIHOODS = [Categorical(1.6), Gaussian(0.7), Bernoulli(1.3)]
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)


def make_params(key):
    k_in, k_bias, k_out = jax.random.split(key, 3)
    return {
        "hidden": {
            "kernel": jax.random.normal(k_in, (4, 6)),
            "bias": jax.random.normal(k_bias, (6,)),
        },
        "out": jax.random.normal(k_out, (6, 3)),
    }


def apply(params, inputs):
    hidden = inputs @ params["hidden"]["kernel"]
    hidden = jnp.tanh(hidden + jnp.broadcast_to(params["hidden"]["bias"], hidden.shape))
    return hidden @ params["out"]


def make_problem(key):
    k_params, k_x, k_v = jax.random.split(key, 3)
    params = make_params(k_params)
    mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    valid = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 1], [1, 1, 0]])
    batch = Batch(jax.random.normal(k_x, (4, 3, 4)), mask=mask, valid=valid)
    vector = make_params(k_v)
    return params, batch, vector


def dense_ggn(likelihood, params, batch):
    """The sum of JᵀHJ over the outputs that count, over their number; H by autodiff of the KL."""
    theta, unravel = ravel_pytree(params)
    counted = np.asarray(batch.mask).astype(bool) & np.asarray(batch.valid).astype(bool)
    inputs = batch.inputs[counted]
    outputs = apply(params, inputs)
    jacobian = jax.jit(jax.jacobian(lambda theta: apply(unravel(theta), inputs)))(theta)

    @jax.jit
    @jax.vmap
    def hessians(z):
        return jax.hessian(lambda d: likelihood.kl(z[None], (z + d)[None])[0])(jnp.zeros_like(z))

    return jnp.einsum("nia,nij,njb->ab", jacobian, hessians(outputs), jacobian) / len(inputs)


@each_likelihood
def test_product_equals_the_dense_matrix(likelihood, key, tolerance):
    params, batch, vector = make_problem(key)
    dense = dense_ggn(likelihood, params, batch)
    flat = ravel_pytree(vector)[0]
    product = jax.jit(ggn_vector_product, static_argnums=0)(
        apply, params, batch, vector, likelihood=likelihood
    )
    assert jax.tree.structure(product) == jax.tree.structure(params)
    tolerance.check(ravel_pytree(product)[0], dense @ flat)
    quadratic = quadratic_kl(apply, params, batch, vector, likelihood=likelihood)
    tolerance.check(quadratic, 0.5 * flat @ dense @ flat)


@each_likelihood
def test_padding_changes_nothing(likelihood, key):
    params, batch, vector = make_problem(key)
    counted = (batch.mask * batch.valid).astype(bool)
    garbage = batch._replace(inputs=jnp.where(counted[..., None], batch.inputs, 1e3))
    for function in (ggn_vector_product, quadratic_kl):
        call = jax.jit(function, static_argnums=0)
        clean = call(apply, params, batch, vector, likelihood=likelihood)
        dirty = call(apply, params, garbage, vector, likelihood=likelihood)
        jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_quadratic_kl_survives_outputs_that_are_not_numbers(key):
    params, batch, vector = make_problem(key)
    counted = (batch.mask * batch.valid).astype(bool)
    broken = batch._replace(inputs=jnp.where(counted[..., None], batch.inputs, jnp.nan))
    clean = quadratic_kl(apply, params, batch, vector, likelihood=Categorical())
    assert quadratic_kl(apply, params, broken, vector, likelihood=Categorical()) == clean


@each_likelihood
def test_quadratic_kl_predicts_the_true_one_for_small_steps(likelihood, key):
    params, batch, vector = make_problem(key)
    counted = np.asarray(batch.mask * batch.valid).astype(bool)
    step = jax.tree.map(lambda v: 1e-3 * v, vector)
    moved = jax.tree.map(jnp.add, params, step)
    true = likelihood.kl(apply(params, batch.inputs), apply(moved, batch.inputs))
    predicted = quadratic_kl(apply, params, batch, step, likelihood=likelihood)
    np.testing.assert_allclose(np.asarray(true)[counted].mean(), predicted, rtol=2e-2)


def test_a_batch_without_masks_counts_everything(key, tolerance):
    params, batch, vector = make_problem(key)
    ones = jnp.ones((4, 3))
    bare = ggn_vector_product(apply, params, Batch(batch.inputs), vector, likelihood=Categorical())
    full = ggn_vector_product(
        apply, params, Batch(batch.inputs, mask=ones, valid=ones), vector, likelihood=Categorical()
    )
    tolerance.check(bare, full, "rounding")


def test_an_all_masked_batch_gives_zero(key):
    params, batch, vector = make_problem(key)
    empty = batch._replace(mask=jnp.zeros((4, 3)))
    product = ggn_vector_product(apply, params, empty, vector, likelihood=Categorical())
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(product))


def test_bfloat16_parameters_get_bfloat16_products(key):
    params, batch, vector = make_problem(key)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, batch.inputs, vector))
    params, inputs, vector = narrow
    batch = batch._replace(inputs=inputs)
    product = ggn_vector_product(apply, params, batch, vector, likelihood=Categorical())
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype(jnp.bfloat16)}
    assert quadratic_kl(apply, params, batch, vector, likelihood=Categorical()).dtype == jnp.float32


def test_blocks_of_bfloat16_parameters_are_added_in_float32(key, monkeypatch):
    """Thousands of blocks, of which a sum in bfloat16 would soon take no more."""
    params, few, vector = make_problem(key)
    params, inputs, vector = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (params, few.inputs, vector)
    )
    many = few._replace(inputs=inputs)
    many = jax.tree.map(lambda x: jnp.concatenate([x] * 400), many)

    def product(dtype):
        given, direction = jax.tree.map(lambda x: x.astype(dtype), (params, vector))
        rows = many._replace(inputs=many.inputs.astype(dtype))
        return ggn_vector_product(apply, given, rows, direction, likelihood=Categorical())

    expected = product(jnp.float32)
    monkeypatch.setattr(row_blocks, "MOST_BYTES", 1)
    blocks = product(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(blocks)} == {jnp.dtype(jnp.bfloat16)}
    for x, y in zip(*map(jax.tree.leaves, (expected, blocks)), strict=True):
        # A row's own product is off by some hundredths; a sum in bfloat16 by more than a half.
        scale = float(jnp.max(jnp.abs(x)))
        np.testing.assert_allclose(y.astype("float32"), x, atol=0.1 * scale)

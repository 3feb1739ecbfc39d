"""`rotate_scale` against a dense solve, in XLA and as a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jedit_kernels import rotate_scale
from jedit_kernels.rotate_scale.reference import rotate_scale_reference
from jedit_kernels.shapes import LLAMA_MATRICES, TOY_MATRICES

from tests.kernels.hopper import check, draw, interpreted, lowered_for_cuda, needs_kernels

BFLOAT16 = 2e-2  # three roundings to 8 bits on the way, relative to the largest


def case(key, shape):
    """(T, Q_A, Q_G, eigenvalues, one damping a layer) in float64."""
    layers, d_in, d_out = shape
    drawn = draw(key, shape, (layers, d_in, d_in), (layers, d_out, d_out), shape)
    t, x, y, z = (d.astype(np.float64) for d in drawn)
    return t, np.linalg.qr(x)[0], np.linalg.qr(y)[0], z**2, 0.3 / np.arange(1, layers + 1)


def in_numpy(t, q, r, values, damping):
    rotated = np.einsum("lia,lij,ljb->lab", q, t, r)
    return np.einsum("lia,lab,ljb->lij", q, rotated / (values + damping[:, None, None]), r)


@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 3, 5)])
def test_xla_solves_the_dense_system(key, shape, tolerance):
    t, q, r, values, damping = case(key, shape)
    out = rotate_scale(*(jnp.asarray(x, float) for x in (t, q, r, values, damping)))
    for layer in range(shape[0]):
        basis = np.kron(q[layer], r[layer])
        matrix = basis @ np.diag(values[layer].ravel() + damping[layer]) @ basis.T
        expected = np.linalg.solve(matrix, t[layer].ravel()).reshape(shape[1:])
        check(out[layer], expected, tolerance.factorization)


@pytest.mark.parametrize("shape", TOY_MATRICES)
def test_xla_is_numpys(key, shape, tolerance):
    operands = case(key, shape)
    arrays = [jnp.asarray(x, float) for x in operands]
    check(rotate_scale(*arrays), in_numpy(*operands), tolerance.contraction)
    check(rotate_scale_reference(*arrays), in_numpy(*operands), tolerance.contraction)


def test_one_number_damps_every_layer(key, tolerance):
    t, q, r, values, _ = case(key, (2, 6, 4))
    out = rotate_scale(*(jnp.asarray(x, float) for x in (t, q, r, values)), 0.7)
    check(out, in_numpy(t, q, r, values, np.full(2, 0.7)), tolerance.contraction)


def test_a_direction_without_eigenvalue_is_left_at_zero(key, tolerance):
    t, q, r, values, _ = case(key, (1, 6, 4))
    values[:, 2, 1] = 0
    out = rotate_scale(*(jnp.asarray(x, float) for x in (t, q, r, values)), 0.0)
    rotated = np.einsum("lia,lij,ljb->lab", q, t, r)
    rotated[:, 2, 1] = 0
    values[:, 2, 1] = 1
    expected = np.einsum("lia,lab,ljb->lij", q, rotated / values, r)
    check(out, expected, tolerance.contraction)


@needs_kernels
@pytest.mark.parametrize("shape", TOY_MATRICES)
def test_kernel_is_numpys(key, shape):
    operands = case(key, shape)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in operands[:3]]
    wide = [jnp.asarray(x, jnp.float32) for x in operands[3:]]
    with interpreted(is_whole=shape == TOY_MATRICES[0]):
        out = rotate_scale(*narrow, *wide, implementation="mosaic")
    assert out.dtype == jnp.float32
    check(out, in_numpy(*operands), BFLOAT16)
    # Both round at the same places, so they differ by less than the rounding itself.
    check(out, rotate_scale(*narrow, *wide, implementation="xla"), BFLOAT16 / 10)


@needs_kernels
@pytest.mark.parametrize("shape", LLAMA_MATRICES)
def test_kernel_is_lowered_for_hopper(shape):
    layers, d_in, d_out = shape
    shapes = shape, (layers, d_in, d_in), (layers, d_out, d_out)
    operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    wide = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((layers,), jnp.float32)
    text = lowered_for_cuda(lambda *x: rotate_scale(*x, implementation="mosaic"), *operands, *wide)
    assert text.count("@mosaic_gpu") == 1
    assert text.count("stablehlo.dot_general") == 3
    assert "stablehlo.divide" not in text  # it is in the kernel
    assert "stablehlo.pad" not in text

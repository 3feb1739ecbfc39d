"""`squared_gradient_sum` against NumPy, in XLA and as a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jedit_kernels import squared_gradient_sum
from jedit_kernels.shapes import CPU_GRADIENTS, LLAMA_GRADIENTS, TOY_GRADIENTS
from jedit_kernels.squared_gradient_sum.reference import squared_gradient_sum_reference
from jedit_kernels.squared_gradient_sum.xla import at_a_time

from tests.kernels.hopper import check, draw, interpreted, lowered_for_cuda, needs_kernels

DTYPES = [(None, None), (jnp.float32, jnp.float32), (jnp.float32, jnp.bfloat16)]
SINGLE = 1e-6


def case(key, shape):
    """(total, a, g) and NumPy's sum in float64, one example after the other."""
    layers, n, s, d_in, d_out = shape
    total, a, g = draw(key, (layers, d_in, d_out), (layers, n, s, d_in), (layers, n, s, d_out))
    expected = total.astype(np.float64)
    for layer in range(layers):
        for example in range(n):
            x, y = (z[layer, example].astype(np.float64) for z in (a, g))
            expected[layer] += (x.T @ y) ** 2
    return total, a, g, expected


@pytest.mark.parametrize(
    "shape", [*TOY_GRADIENTS, (2, 4, 1, 5, 3), (1, 1, 3, 1, 2), (1, 6, 3, 4, 5)]
)
@pytest.mark.parametrize(("wide", "narrow"), DTYPES)
def test_xla_is_numpys(key, shape, wide, narrow, tolerance):
    total, a, g, expected = case(key, shape)
    total = jnp.asarray(total, wide or float)
    a, g = (jnp.asarray(x, narrow or float) for x in (a, g))
    out = squared_gradient_sum(total, a, g)
    assert out.dtype == total.dtype
    bound = SINGLE if wide else tolerance.contraction
    check(out, expected, bound)
    check(squared_gradient_sum_reference(total, a, g), expected, bound)


@needs_kernels
@pytest.mark.parametrize("shape", TOY_GRADIENTS)
def test_kernel_is_numpys(key, shape):
    total, a, g, expected = case(key, shape)
    total, a, g = jnp.asarray(total, jnp.float32), jnp.asarray(a), jnp.asarray(g)
    with interpreted(is_whole=shape == TOY_GRADIENTS[0]):
        out = squared_gradient_sum(total, a, g, implementation="mosaic")
    assert out.dtype == jnp.float32
    check(out, expected, SINGLE)


@needs_kernels
@pytest.mark.parametrize("shape", [*CPU_GRADIENTS, *LLAMA_GRADIENTS])
def test_kernel_is_lowered_for_hopper(shape):
    layers, n, s, d_in, d_out = shape
    operands = (
        jax.ShapeDtypeStruct((layers, d_in, d_out), jnp.float32),
        jax.ShapeDtypeStruct((layers, n, s, d_in), jnp.bfloat16),
        jax.ShapeDtypeStruct((layers, n, s, d_out), jnp.bfloat16),
    )
    text = lowered_for_cuda(lambda *x: squared_gradient_sum(*x, implementation="mosaic"), *operands)
    assert text.count("@mosaic_gpu") == 1
    # No example's gradient is in memory: nothing but the kernel computes, or is padded for it.
    assert "stablehlo.dot_general" not in text
    assert "stablehlo.pad" not in text
    assert f"tensor<{layers}x{n}x{d_in}x{d_out}" not in text


@needs_kernels
def test_the_kernel_refuses_two_dtypes():
    total = jnp.zeros((1, 3, 2), jnp.float32)
    a, g = jnp.zeros((1, 2, 4, 3), jnp.bfloat16), jnp.zeros((1, 2, 4, 2), jnp.float16)
    with pytest.raises(ValueError, match="got a in bfloat16, g in float16"):
        squared_gradient_sum(total, a, g, implementation="mosaic")


def test_how_many_gradients_are_there_at_a_time():
    assert at_a_time(1025 * 1024, 8) == 4
    assert at_a_time(257 * 256, 3) == 3
    assert at_a_time(257 * 256, 0) == 1
    # A large one alone: four of Llama's would be a gigabyte.
    assert at_a_time(4096 * 14336, 16) == 1

"""`moment` against NumPy, in XLA and as a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jedit_kernels import moment
from jedit_kernels.moment.mosaic import moment_mosaic
from jedit_kernels.moment.reference import moment_reference
from jedit_kernels.moment.xla import divided, moment_xla
from jedit_kernels.shapes import CPU_MOMENTS, LLAMA_MOMENTS, TOY_MOMENTS
from jedit_kernels.tiles import WIDTHS

from tests.kernels.hopper import check, draw, interpreted, lowered_for_cuda, needs_kernels

DTYPES = [(None, None), (jnp.float32, jnp.float32), (jnp.float32, jnp.bfloat16)]
SINGLE = 1e-6  # float32 sums of a hundred products, relative to the largest


def lower(x):
    return np.tril(np.asarray(x, np.float64))


def case(key, shape, *, is_masked):
    """(total, rows, mask) with NaN in masked rows, and NumPy's moment in float64."""
    layers, n, d = shape
    total, rows = draw(key, (layers, d, d), (layers, n, d))
    a = rows.astype(np.float64)
    mask = None
    if is_masked:
        # Whole, mixed and empty stretches of rows, and another pattern in each layer.
        number = np.arange(n)
        mask = np.stack([(number < n // 2) | (number % (3 + i) == 0) for i in range(layers)])
        mask[:, n - n // 4 :] = False
        a = np.where(mask[..., None], a, 0)
        rows = np.where(mask[..., None], rows, np.asarray(np.nan, rows.dtype))
    return total, rows, mask, total.astype(np.float64) + np.einsum("lni,lnj->lij", a, a)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", [*TOY_MOMENTS, (2, 5, 1), (1, 40, 1100), (1, 20, 1601)])
@pytest.mark.parametrize(("wide", "narrow"), DTYPES)
def test_xla_is_numpys(key, shape, wide, narrow, is_masked, tolerance):
    total, rows, mask, expected = case(key, shape, is_masked=is_masked)
    bound = SINGLE if wide else tolerance.contraction
    total, rows = jnp.asarray(total, wide or float), jnp.asarray(rows, narrow or float)
    mask = None if mask is None else jnp.asarray(mask)
    out = moment(total, rows, mask)
    assert out.dtype == total.dtype
    check(lower(out), lower(expected), bound)
    check(moment_reference(total, rows, mask), expected, bound)


@needs_kernels
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", TOY_MOMENTS)
def test_kernel_is_numpys(key, shape, is_masked):
    total, rows, mask, expected = case(key, shape, is_masked=is_masked)
    mask = None if mask is None else jnp.asarray(mask)
    with interpreted(is_whole=shape == TOY_MOMENTS[0]):
        out = moment(
            jnp.asarray(total, jnp.float32), jnp.asarray(rows), mask, implementation="mosaic"
        )
    assert out.dtype == jnp.float32
    check(lower(out), lower(expected), SINGLE)


@needs_kernels
@pytest.mark.parametrize("width", [192, 256])  # the small moments above take 128
def test_masked_kernel_of_every_width(key, width):
    total, rows, mask, expected = case(key, (1, 100, 330), is_masked=True)
    operands = jnp.asarray(total, jnp.float32), jnp.asarray(rows), jnp.asarray(mask)
    with interpreted(is_whole=False):
        check(lower(moment_mosaic(*operands, width=width)), lower(expected), SINGLE)


@needs_kernels
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", [*CPU_MOMENTS, *LLAMA_MOMENTS])
def test_kernel_is_lowered_for_hopper(shape, is_masked):
    total = jax.ShapeDtypeStruct((shape.layers, shape.d, shape.d), jnp.float32)
    rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    mask = [jax.ShapeDtypeStruct(shape[:2], jnp.bool_)] if is_masked else []
    text = lowered_for_cuda(lambda *x: moment(*x, implementation="mosaic"), total, rows, *mask)
    assert text.count("@mosaic_gpu") == 1
    # Real sizes are whole, so nothing is copied around the kernel; no product is left to XLA.
    assert "stablehlo.dot_general" not in text
    assert is_masked or "stablehlo.pad" not in text


@needs_kernels
def test_no_rows_add_nothing(key):
    (total,) = draw(key, (1, 5, 5))
    total, rows = jnp.asarray(total, jnp.float32), jnp.zeros((1, 0, 5), jnp.bfloat16)
    for implementation in ("xla", "mosaic"):
        out = moment(total, rows, implementation=implementation)
        np.testing.assert_array_equal(lower(out), lower(total))


@needs_kernels
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_is_lowered_with_a_mask(width):
    layers, n, d = LLAMA_MOMENTS[0]
    operands = (
        jax.ShapeDtypeStruct((layers, d, d), jnp.float32),
        jax.ShapeDtypeStruct((layers, n, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((layers, n), jnp.bool_),
    )
    text = lowered_for_cuda(lambda *x: moment_mosaic(*x, width=width), *operands)
    assert text.count("@mosaic_gpu") == 1


def test_by_default_it_is_xlas(key):
    total, rows, _, _ = case(key, (1, 8, 5), is_masked=False)
    total, rows = jnp.asarray(total, jnp.float32), jnp.asarray(rows)
    np.testing.assert_array_equal(
        moment(total, rows), moment(total, rows, implementation="xla"), strict=True
    )


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match='"xla" or "mosaic", got \'triton\''):
        moment(jnp.zeros((1, 3, 3)), jnp.zeros((1, 2, 3)), implementation="triton")


@needs_kernels
def test_the_kernel_refuses_float32():
    with pytest.raises(ValueError, match="got rows in float32: Hopper's tensor cores"):
        moment(
            jnp.zeros((1, 3, 3), jnp.float32),
            jnp.zeros((1, 2, 3), jnp.float32),
            implementation="mosaic",
        )


def products(d):
    """Shapes of the products that a program of `d` columns is lowered to."""
    total, rows = (
        jax.ShapeDtypeStruct((1, d, d), jnp.float32),
        jax.ShapeDtypeStruct((1, 8, d), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(moment_xla)(total, rows)
    return [e.outvars[0].aval.shape[1:] for e in jaxpr.eqns if e.primitive.name == "dot_general"]


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        (10, [(10, 10)]),
        (256, [(64, 64), (64, 128), (64, 192), (64, 256)]),
        (1024, [(256, 256), (256, 512), (256, 768), (256, 1024)]),
        (2048, [(256, 256)] * 36),
    ],
)
def test_the_division_is_the_measured_one(d, expected):
    assert products(d) == expected


def test_what_is_benched_takes_fewer_flops_than_the_whole_product():
    widths = {shape.d for shape in (*CPU_MOMENTS, *LLAMA_MOMENTS)} | {256, 784}
    for d in widths:
        done = sum(rows * columns for rows, columns in products(d))
        number, _ = divided(d)
        # Never more than the lower triangle in so many parts: half, and half a part a column.
        assert done <= d * d * (number + 1) / (2 * number) + d
        assert number > 1

"""How the kernels for Hopper are tested without one: interpreted, and lowered for CUDA.

The interpreter runs a block's threads side by side on the CPU, with its barriers and copies, and
reports reads and writes that no barrier orders. Lowering goes through layouts, swizzles, copy
descriptors and the size of shared memory, up to what the CUDA compiler would be given.
"""

import jax
import numpy as np
import pytest
from jedit_kernels.choice import OLDEST_JAX, is_jax_new_enough

NEEDED = ".".join(map(str, OLDEST_JAX))
needs_kernels = pytest.mark.skipif(
    not is_jax_new_enough(), reason=f"the Hopper kernels need jax >= {NEEDED}: make test-newest"
)


def interpreted(*, is_whole):
    """A context in which kernels are interpreted.

    Args:
        is_whole: every tile is whole, so nothing may be read outside an array, and memory that
            nobody has written holds NaN. Else what the copy engine reads outside is zero, as on the
            GPU, which the interpreter knows only for all unwritten memory at once.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    outside = {} if is_whole else {"out_of_bounds_reads": "uninitialized"}
    memory = "nan" if is_whole else "zero"
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory=memory, **outside)
    return plgpu.force_gpu_interpret_mode(params)


def lowered_for_cuda(function, *operands):
    """The program that a CUDA compiler would be given, as text; needs no GPU."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def check(actual, expected, tolerance):
    """Agreement relative to the largest expected entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


def draw(key, *shapes):
    """Standard normal arrays of these shapes, as NumPy's float64 rounded to bfloat16's values."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist())
    return [
        np.asarray(jax.numpy.asarray(rng.standard_normal(s), jax.numpy.bfloat16)) for s in shapes
    ]

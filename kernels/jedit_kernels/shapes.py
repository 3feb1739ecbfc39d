"""The shapes that tests and benchmarks run the operations at.

Llama-3.1-8B: a residual stream of 4,096, keys and values of 1,024, an MLP of 14,336; 16 examples of
512 positions.
"""

from typing import NamedTuple


class MomentShape(NamedTuple):
    """The shape of rows (layers, n, d), for `moment`."""

    layers: int
    n: int
    d: int


class GradientShape(NamedTuple):
    """The shapes of inputs (layers, n, s, d_in) and gradients (layers, n, s, d_out)."""

    layers: int
    n: int
    s: int
    d_in: int
    d_out: int


# Real sizes, for a GPU and for lowering.
LLAMA_MOMENTS = (
    MomentShape(1, 8192, 4096),
    MomentShape(4, 8192, 4096),
    MomentShape(1, 8192, 14336),
)
LLAMA_GRADIENTS = (
    GradientShape(1, 16, 512, 4096, 1024),
    GradientShape(1, 16, 512, 4096, 4096),
    GradientShape(1, 16, 512, 4096, 14336),
)

# A few tiles, for interpreting a kernel: whole tiles first, then every size ragged; the last of
# each goes round the ring of slots more than once.
TOY_MOMENTS = (MomentShape(1, 128, 256), MomentShape(2, 100, 200), MomentShape(1, 500, 130))
TOY_GRADIENTS = (GradientShape(1, 2, 128, 128, 128), GradientShape(2, 4, 75, 70, 200))

# What two CPU cores do in seconds.
CPU_MOMENTS = (MomentShape(1, 1024, 256), MomentShape(1, 2048, 1024), MomentShape(1, 2048, 2048))
CPU_GRADIENTS = (GradientShape(1, 16, 64, 512, 512), GradientShape(1, 16, 256, 512, 1024))

"""The network that `resnet` makes, as Flax NNX modules."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MAX_GROUPS = 8  # of a group norm; its paper has 32, of the 256 channels of a wider network
EPS = 1e-5


class GroupNorm(nnx.Module):
    """Group norm with a gain and a shift of each channel.

    Eight channels or fewer may have one group each, which is an instance norm.

    As in `_networks.LayerNorm` the gain multiplies the normalised activation, which is what a
    curvature of the gain has to see, and the moments are taken in float32 or wider.
    """

    def __init__(self, width: int, param_dtype: DTypeLike, *, gain: float = 1.0):
        self.groups = math.gcd(width, MAX_GROUPS)
        self.scale = nnx.Param(jnp.full((width,), gain, param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "batch height width d"]) -> Float[Array, "batch h w d"]:
        wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        grouped = wide.reshape(*x.shape[:3], self.groups, -1)
        axes = (1, 2, 4)
        centred = grouped - jnp.mean(grouped, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
        normalised = (centred * jax.lax.rsqrt(variance + EPS)).reshape(x.shape).astype(x.dtype)
        return normalised * self.scale[None, None, None] + self.bias[None, None, None]


def _conv(
    d_in: int, d_out: int, size: int, stride: int, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        d_in,
        d_out,
        kernel_size=(size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=jax.nn.initializers.he_normal(),
        param_dtype=param_dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Two convolutions, around which the input is added."""

    def __init__(self, d_in: int, d_out: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = _conv(d_in, d_out, 3, stride, dtype, rngs)
        self.norm1 = GroupNorm(d_out, dtype)
        self.conv2 = _conv(d_out, d_out, 3, 1, dtype, rngs)
        self.norm2 = GroupNorm(d_out, dtype, gain=0.0)
        is_same = d_in == d_out and stride == 1
        self.shortcut = None if is_same else _conv(d_in, d_out, 1, stride, dtype, rngs)

    def __call__(self, x: Float[Array, "batch height width d"]) -> Float[Array, "batch h w d2"]:
        h = self.conv2(jax.nn.relu(self.norm1(self.conv1(x))))
        around = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(around + self.norm2(h))


class ResNet(nnx.Module):
    def __init__(
        self,
        channels: int,
        num_classes: int,
        width: int,
        blocks: Sequence[int],
        stem_stride: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(channels, width, 3, stem_stride, param_dtype, rngs)
        self.stem_norm = GroupNorm(width, param_dtype)
        stages, d_in = [], width
        for i, count in enumerate(blocks):
            made = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                made.append(Block(d_in, width * 2**i, stride, param_dtype, rngs))
                d_in = width * 2**i
            stages.append(nnx.List(made))
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(d_in, num_classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width d"]) -> Float[Array, "batch classes"]:
        x = x.astype(self.head.kernel[...].dtype)  # a layer would else take the wider of the two
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))

"""A small convolutional network for small images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jedit.core.checks import COUNT, check_numbers
from jedit.models.functional import Apply, to_pure


class _Cnn(nnx.Module):
    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        channels: Sequence[int],
        hidden: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        height, width, d_in = image_shape
        widths = (d_in, *channels)
        self.convs = nnx.List(
            nnx.Conv(a, b, kernel_size=(3, 3), param_dtype=param_dtype, rngs=rngs)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        shrink = 2 ** len(channels)
        d_flat = (height // shrink) * (width // shrink) * widths[-1]
        self.hidden = nnx.Linear(d_flat, hidden, param_dtype=param_dtype, rngs=rngs)
        self.head = nnx.Linear(hidden, num_classes, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width d_in"]) -> Float[Array, "batch classes"]:
        for conv in self.convs:
            x = _max_pool(jax.nn.relu(conv(x)))
        x = jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(x)


def _max_pool(x: Float[Array, "batch height width d"]) -> Float[Array, "batch height_2 width_2 d"]:
    """The largest of each two by two square."""
    # A reshape and a maximum, because the derivative of a windowed maximum is a scatter: a training
    # step of this network takes a quarter longer with one.
    batch, height, width, d = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, d).max(axis=(2, 4))


def cnn(
    *,
    key: Key[Array, ""],
    image_shape: tuple[int, int, int] = (8, 8, 1),
    num_classes: int = 10,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a convolutional classifier as a pure function.

    Each stage is a 3 x 3 convolution, a ReLU and a 2 x 2 maximum; a hidden dense layer and the head
    follow. Parameters are "convs/<i>/kernel" of shape `(3, 3, d_in, d_out)`, "hidden/kernel",
    "head/kernel", and a bias beside each.

    Args:
        key: for the initial parameters (LeCun normal kernels, zero biases).
        image_shape: height, width and channels of one image.
        num_classes: number of logits.
        channels: output channels of each stage.
        hidden: width of the hidden dense layer.
        dtype: of the parameters; the computation follows the parameters given to `apply`.

    Returns:
        `(apply, params)`, with `apply(params, images) -> logits` of shape `(batch, num_classes)`.

    Raises:
        ValueError: the image cannot be halved once per stage.
    """
    shrink = 2 ** len(channels)
    if image_shape[0] % shrink or image_shape[1] % shrink:
        raise ValueError(
            f"image_shape {image_shape} cannot be halved {len(channels)} times, once per stage: "
            f"give a height and width divisible by {shrink}, or fewer channels."
        )
    check_numbers(COUNT, image_shape=image_shape, num_classes=num_classes, hidden=hidden)
    check_numbers(COUNT, channels=tuple(channels) or None)
    return to_pure(_Cnn(image_shape, num_classes, channels, hidden, dtype, nnx.Rngs(key)))

"""A small convolutional network for small images."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.models.functional import to_pure


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
        dtype: dtype of the parameters; the computation follows the parameters given to `apply`.

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
    from flax import nnx  # late: it takes a third of a second

    from jedit.models._networks import Cnn

    return to_pure(Cnn(image_shape, num_classes, channels, hidden, dtype, nnx.Rngs(key)))

"""A residual network for small images: a ResNet-18 by default (He et al., arXiv 1512.03385)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.models.functional import to_pure


def resnet(
    *,
    key: Key[Array, ""],
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    stem_stride: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a residual classifier as a pure function.

    As the field builds ResNet-18 for images of 32 x 32: a 3 x 3 convolution without a pooling,
    then stages of basic blocks (two 3 x 3 convolutions around which the input is added, through a
    1 x 1 convolution where the shape changes), each stage twice as wide as the one before and, but
    for the first, half as high; the mean over positions, and the head. The norms are **group
    norms**, where the paper's are batch norms: those carry averages that are no parameters, and
    make the output of a row depend on the others. They are of eight groups, or of the largest
    power of two below that divides the channels: a stage of up to eight channels may have one
    channel in each (an instance norm), and where such a stage is only one pixel high and wide
    nothing but the shift comes through.

    Parameters are "stem/kernel", "stages/<i>/<j>/conv1/kernel", "conv2", "shortcut" (all without
    bias), "norm1/scale", "norm1/bias", "norm2", "stem_norm", "head/kernel" and "head/bias".

    Args:
        key: for the initial parameters (He normal kernels; the last gain of every block is 0, so
            that blocks begin as the identity).
        image_shape: height, width and channels of one image.
        num_classes: number of logits.
        width: channels of the first stage; 64 is ResNet-18's.
        blocks: number of blocks of each stage; (2, 2, 2, 2) is ResNet-18.
        stem_stride: step of the first convolution: 1, as the field has it, or 2 for a quarter of
            the work.
        dtype: dtype of the parameters; the computation follows the parameters given to `apply`,
            whatever the images are of.

    Returns:
        `(apply, params)`, with `apply(params, images) -> logits` of shape `(batch, num_classes)`.

    Raises:
        ValueError: there is no stage, or a number is out of its range.
    """
    check_numbers(COUNT, image_shape=image_shape, num_classes=num_classes, width=width)
    check_numbers(COUNT, blocks=tuple(blocks) or None, stem_stride=stem_stride)
    if not blocks:
        raise ValueError("blocks must name at least one stage, got none")
    from flax import nnx  # late: it takes a third of a second

    from jedit.models._residual import ResNet

    sizes = (image_shape[-1], num_classes, width, blocks, stem_stride)
    return to_pure(ResNet(*sizes, dtype, nnx.Rngs(key)))

"""A small diffusion model of small images, conditioned on the number of a prompt."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jedit.core.batch import Apply
from jedit.core.checks import COUNT, check_numbers
from jedit.models.functional import to_pure


def denoiser(
    *,
    key: Key[Array, ""],
    num_pixels: int,
    num_prompts: int,
    width: int,
    num_layers: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a denoiser as a pure function: it says which noise is in an image.

    The flat image is read into a residual stream, which feed-forward blocks of four times the width
    write to; what enters a block is scaled and shifted by the condition, the sum of the step's
    sines and of the prompt's embedding. Parameters are "prompts/embedding", "time/kernel",
    "read/kernel", "blocks/<i>/{gain,shift}/kernel", "blocks/<i>/ffn/{up,down}/kernel",
    "blocks/<i>/norm/scale", "norm/scale", "write/kernel", and the biases.

    Args:
        key: for the initial parameters.
        num_pixels: number of pixels of an image.
        num_prompts: number of prompts, the empty one, which is number 0, included.
        width: width of the residual stream.
        num_layers: number of blocks.
        dtype: dtype of the parameters; the computation follows the parameters given to `apply`.

    Returns:
        `(apply, params)`, with `apply(params, inputs) -> noise` of shape `(batch, num_pixels)`, for
        `inputs` a `jedit.core.batch.NoisedImages`. Its likelihood is `Gaussian`.
    """
    check_numbers(COUNT, num_pixels=num_pixels, num_prompts=num_prompts)
    check_numbers(COUNT, width=width, num_layers=num_layers)
    from flax import nnx  # late: it takes a third of a second

    from jedit.models._denoising import Denoiser

    rngs = nnx.Rngs(key)
    return to_pure(Denoiser(num_pixels, num_prompts, width, num_layers, dtype, rngs))

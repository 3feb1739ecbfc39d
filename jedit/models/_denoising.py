"""The network that `denoiser` makes, as a Flax NNX module; it stands apart as `_networks` does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jedit.core.batch import NoisedImages
from jedit.models._networks import LayerNorm, Perceptron

NUM_FREQUENCIES = 16


class ConditionedBlock(nnx.Module):
    """A residual feed-forward block whose normalised input the condition shifts and scales."""

    def __init__(self, width: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, param_dtype)
        self.gain = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.shift = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.ffn = Perceptron(width, param_dtype, rngs)

    def __call__(
        self, x: Float[Array, "batch width"], condition: Float[Array, "batch width"]
    ) -> Float[Array, "batch width"]:
        h = self.norm(x) * (1 + self.gain(condition)) + self.shift(condition)
        return x + self.ffn(h)


class Denoiser(nnx.Module):
    def __init__(
        self,
        num_pixels: int,
        num_prompts: int,
        width: int,
        num_layers: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def linear(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(d_in, d_out, param_dtype=param_dtype, rngs=rngs)

        small = jax.nn.initializers.normal(0.02)
        self.prompts = nnx.Embed(
            num_prompts, width, embedding_init=small, param_dtype=param_dtype, rngs=rngs
        )
        self.prompts.dtype = None  # else it casts to the dtype it was made in
        self.time = linear(2 * NUM_FREQUENCIES, width)
        self.read = linear(num_pixels, width)
        self.blocks = nnx.List(
            ConditionedBlock(width, param_dtype, rngs) for _ in range(num_layers)
        )
        self.norm = LayerNorm(width, param_dtype)
        self.write = linear(width, num_pixels)

    def __call__(self, inputs: NoisedImages) -> Float[Array, "batch pixels"]:
        images, steps, prompts = inputs
        condition = jax.nn.silu(self.time(_waves(steps, images.dtype)) + self.prompts(prompts))
        x = self.read(images)
        for block in self.blocks:
            x = block(x, condition)
        return self.write(self.norm(x))


def _waves(steps: Int[Array, " batch"], dtype: DTypeLike) -> Float[Array, "batch waves"]:
    """Return sines and cosines of the step at periods from 2π to some 1,240 times as long."""
    rates = np.exp(-math.log(2000.0) * np.arange(NUM_FREQUENCIES) / NUM_FREQUENCIES)
    angles = steps[:, None].astype(jnp.float32) * jnp.asarray(rates[None], jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)

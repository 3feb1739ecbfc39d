"""The networks that `cnn`, `gpt` and `mlp` make, as Flax NNX modules.

They stand apart from those functions, which import them when they are called: Flax takes a third of
a second to import.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jedit.core.batch import PackedTokens
from jedit.models._mixture import Mixture
from jedit.models.experts import Experts

Cache = tuple[Array, Array]  # keys and values, each (batch, heads, positions, width of a head)


class Mlp(nnx.Module):
    def __init__(
        self, sizes: Sequence[int], activation: Callable, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.layers = nnx.List(
            nnx.Linear(d_in, d_out, param_dtype=param_dtype, rngs=rngs)
            for d_in, d_out in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, x: Float[Array, "batch *features"]) -> Float[Array, "batch d_out"]:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Cnn(nnx.Module):
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
    """Return the largest of each two by two square."""
    # A reshape and a maximum, because the derivative of a windowed maximum is a scatter: a training
    # step of this network takes a quarter longer with one.
    batch, height, width, d = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, d).max(axis=(2, 4))


class LayerNorm(nnx.Module):
    """Layer norm with a gain and a shift.

    `flax.nnx.LayerNorm` multiplies the gain into the reciprocal deviation; here it multiplies the
    normalised activation, which is what a curvature of the gain has to see. The moments are taken
    in float32 or wider, in two passes.
    """

    def __init__(self, width: int, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normalised = (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)
        lead = (None,) * (x.ndim - 1)
        return normalised * self.scale[lead] + self.bias[lead]


class Attention(nnx.Module):
    """Causal self-attention; query, key and value are separate kernels that read one array."""

    def __init__(self, width: int, num_heads: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch seq width"], segments: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch seq width"]:
        seq = x.shape[1]
        query, key, value = self._split(x)
        is_seen = jnp.tril(jnp.ones((seq, seq), bool))[None, None]
        if segments is not None:
            is_seen &= (segments[:, :, None] == segments[:, None, :])[:, None]
        return self.out(_attend(query, key, value, is_seen))

    def step(self, x: Float[Array, "batch 1 width"], position: Array, cache: Cache):
        """Attend from one position to those before it; `cache` holds their keys and values."""
        query, key, value = self._split(x)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=2)
            for old, new in zip(cache, (key, value), strict=True)
        )
        places = jnp.arange(keys.shape[2], dtype=position.dtype)
        is_past = (places <= position)[None, None, None]
        return self.out(_attend(query, keys, values, is_past)), (keys, values)

    def _split(self, x: Float[Array, "batch seq width"]) -> Iterator[Array]:
        batch, seq, width = x.shape
        heads = (batch, seq, self.num_heads, width // self.num_heads)
        # Heads before positions: XLA multiplies a batch of matrices on a CPU up to six times as
        # fast so as with einsum on the layout that the reshape leaves.
        return (jnp.moveaxis(p(x).reshape(heads), 1, 2) for p in (self.query, self.key, self.value))


def _attend(query: Array, keys: Array, values: Array, is_seen: Array) -> Array:
    batch, heads, seq, width = query.shape
    scores = query @ jnp.swapaxes(keys, 2, 3) / math.sqrt(width)
    weights = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf), axis=-1)
    return jnp.moveaxis(weights @ values, 1, 2).reshape(batch, seq, heads * width)


class Perceptron(nnx.Module):
    def __init__(
        self,
        width: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        activation: Callable = jax.nn.gelu,
    ):
        self.activation = activation
        self.up = nnx.Linear(width, 4 * width, param_dtype=param_dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.down(self.activation(self.up(x)))


class Block(nnx.Module):
    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp: Experts | Callable,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attn_norm = LayerNorm(width, param_dtype)
        self.attn = Attention(width, num_heads, param_dtype, rngs)
        self.mlp_norm = LayerNorm(width, param_dtype)
        if isinstance(mlp, Experts):
            self.mlp = Mixture(width, mlp, param_dtype, rngs)
        else:
            self.mlp = Perceptron(width, param_dtype, rngs, mlp)

    def __call__(
        self, x: Float[Array, "batch seq width"], segments: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch seq width"]:
        x = x + self.attn(self.attn_norm(x), segments)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Float[Array, "batch 1 width"], position: Array, cache: Cache):
        mixed, cache = self.attn.step(self.attn_norm(x), position, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Gpt(nnx.Module):
    def __init__(
        self,
        vocab: int,
        width: int,
        num_layers: int,
        num_heads: int,
        max_len: int,
        mlp: Experts | Callable,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        small = jax.nn.initializers.normal(0.02)
        self.embed = nnx.Embed(
            vocab, width, embedding_init=small, param_dtype=param_dtype, rngs=rngs
        )
        # Else it casts to the dtype it was made in, and all that follows is computed in that one.
        self.embed.dtype = None
        self.positions = nnx.Param(small(rngs.params(), (max_len, width), param_dtype))
        self.blocks = nnx.List(
            Block(width, num_heads, mlp, param_dtype, rngs) for _ in range(num_layers)
        )
        self.norm = LayerNorm(width, param_dtype)
        self.head = nnx.Linear(width, vocab, use_bias=False, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, inputs: Int[Array, "batch seq"] | PackedTokens
    ) -> Float[Array, "batch seq vocab"]:
        if isinstance(inputs, PackedTokens):
            tokens, segments, positions = inputs
            # Beyond the last position is not known before it runs; what is filled in is not finite.
            here = jnp.take(self.positions[...], positions, axis=0, mode="fill")
            x = self.embed(tokens) + here
        else:
            seq, segments = inputs.shape[-1], None
            check_length(seq, self.positions.shape[0])
            x = self.embed(inputs)
            x = x + jnp.broadcast_to(self.positions[:seq][None], x.shape)
        for block in self.blocks:
            x = block(x, segments)
        return self.head(self.norm(x))

    def step(
        self, tokens: Int[Array, " batch"], position: Int[Array, ""], caches: Sequence[Cache]
    ) -> tuple[Float[Array, "batch vocab"], tuple[Cache, ...]]:
        x = self.embed(tokens[:, None])
        here = jax.lax.dynamic_slice_in_dim(self.positions[...], position, 1)
        x = x + jnp.broadcast_to(here[None], x.shape)
        found = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, position, cache)
            found.append(cache)
        return self.head(self.norm(x))[:, 0], tuple(found)


def check_length(seq: int, max_len: int) -> None:
    """Refuse sequences that are longer than the model has positions.

    Raises:
        ValueError: the sequences are longer.
    """
    if seq > max_len:
        raise ValueError(
            f"the sequences are {seq} tokens long, but the model has {max_len} positions: cut "
            "them, or make the model with a larger max_len."
        )

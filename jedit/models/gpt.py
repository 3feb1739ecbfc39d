"""A small decoder-only transformer language model."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jedit.models.functional import Apply, to_pure


class _LayerNorm(nnx.Module):
    """Layer norm with a gain and a shift.

    `flax.nnx.LayerNorm` multiplies the gain into the reciprocal deviation; here it multiplies the
    normalised activation, which is what a curvature of the gain has to see. The moments are taken
    in float32 or wider, in two passes.
    """

    def __init__(self, width: int, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normalised = (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)
        return normalised * self.scale[None, None] + self.bias[None, None]


class _Attention(nnx.Module):
    """Causal self-attention; query, key and value are separate kernels that read one array."""

    def __init__(self, width: int, num_heads: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        batch, seq, width = x.shape
        heads = (batch, seq, self.num_heads, width // self.num_heads)
        query, key, value = (p(x).reshape(heads) for p in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(heads[-1])
        causal = jnp.tril(jnp.ones((seq, seq), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(mixed.reshape(batch, seq, width))


class _Mlp(nnx.Module):
    def __init__(self, width: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, 4 * width, param_dtype=param_dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return self.down(jax.nn.gelu(self.up(x)))


class _Block(nnx.Module):
    def __init__(self, width: int, num_heads: int, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.attn_norm = _LayerNorm(width, param_dtype)
        self.attn = _Attention(width, num_heads, param_dtype, rngs)
        self.mlp_norm = _LayerNorm(width, param_dtype)
        self.mlp = _Mlp(width, param_dtype, rngs)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class _Gpt(nnx.Module):
    def __init__(
        self,
        vocab: int,
        width: int,
        num_layers: int,
        num_heads: int,
        max_len: int,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        small = jax.nn.initializers.normal(0.02)
        self.embed = nnx.Embed(
            vocab, width, embedding_init=small, param_dtype=param_dtype, rngs=rngs
        )
        self.positions = nnx.Param(small(rngs.params(), (max_len, width), param_dtype))
        self.blocks = nnx.List(
            _Block(width, num_heads, param_dtype, rngs) for _ in range(num_layers)
        )
        self.norm = _LayerNorm(width, param_dtype)
        self.head = nnx.Linear(width, vocab, use_bias=False, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        seq, max_len = tokens.shape[-1], self.positions.shape[0]
        if seq > max_len:
            raise ValueError(
                f"the sequences are {seq} tokens long, but the model has {max_len} positions: cut "
                "them, or make the model with a larger max_len."
            )
        x = self.embed(tokens)
        x = x + jnp.broadcast_to(self.positions[:seq][None], x.shape)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(
    *,
    key: Key[Array, ""],
    vocab: int,
    width: int,
    num_layers: int,
    num_heads: int,
    max_len: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Apply, dict[str, Any]]:
    """Make a decoder-only language model as a pure function.

    Layer norms stand before the attention and before the GELU perceptron of four times the width;
    positions are learned; the head is not tied to the embedding and has no bias. A token sees
    itself and what stands left of it, so right padding changes nothing to its left. Parameters are
    "embed/embedding", "positions", "blocks/<i>/attn_norm/scale",
    "blocks/<i>/attn/{query,key,value,out}/kernel", "blocks/<i>/mlp/{up,down}/kernel", "norm/scale",
    "head/kernel", and the biases; every kernel is `(d_in, d_out)`.

    Args:
        key: for the initial parameters.
        vocab: number of tokens, and of logits.
        width: of the residual stream.
        num_layers: number of blocks.
        num_heads: number of attention heads; divides the width.
        max_len: number of learned positions, the longest sequence that `apply` takes.
        dtype: of the parameters; the computation follows the parameters given to `apply`.

    Returns:
        `(apply, params)`, with `apply(params, tokens (batch, seq)) -> logits (batch, seq, vocab)`.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}.")
    rngs = nnx.Rngs(key)
    return to_pure(_Gpt(vocab, width, num_layers, num_heads, max_len, dtype, rngs))

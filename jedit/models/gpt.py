"""A small decoder-only transformer language model."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from jedit.core.batch import PackedTokens
from jedit.core.checks import COUNT, check_numbers
from jedit.models.decoding import Stepper
from jedit.models.functional import Apply, to_pure, to_pure_method


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


Cache = tuple[Array, Array]  # keys and values, each (batch, heads, positions, width of a head)


class _Attention(nnx.Module):
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

    def __call__(
        self, x: Float[Array, "batch seq width"], segments: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch seq width"]:
        x = x + self.attn(self.attn_norm(x), segments)
        return x + self.mlp(self.mlp_norm(x))

    def step(self, x: Float[Array, "batch 1 width"], position: Array, cache: Cache):
        mixed, cache = self.attn.step(self.attn_norm(x), position, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


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
        # Else it casts to the dtype it was made in, and all that follows is computed in that one.
        self.embed.dtype = None
        self.positions = nnx.Param(small(rngs.params(), (max_len, width), param_dtype))
        self.blocks = nnx.List(
            _Block(width, num_heads, param_dtype, rngs) for _ in range(num_layers)
        )
        self.norm = _LayerNorm(width, param_dtype)
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
            _check_length(seq, self.positions.shape[0])
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


def _check_length(seq: int, max_len: int) -> None:
    if seq > max_len:
        raise ValueError(
            f"the sequences are {seq} tokens long, but the model has {max_len} positions: cut "
            "them, or make the model with a larger max_len."
        )


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
        Instead of the tokens it takes `PackedTokens`, whose sequences may be longer than `max_len`;
        their rows may not, else the sequence's logits are NaN.

    Raises:
        ValueError: the heads do not divide the width.
    """
    sizes = {"vocab": vocab, "width": width, "num_heads": num_heads, "max_len": max_len}
    check_numbers(COUNT, **sizes, num_layers=num_layers)
    if width % num_heads:
        raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}.")
    rngs = nnx.Rngs(key)
    return to_pure(_Gpt(vocab, width, num_layers, num_heads, max_len, dtype, rngs))


def gpt_stepper(*, num_layers: int, num_heads: int) -> Stepper:
    """Make the same model's one-position step, with a cache of keys and values.

    For `cached_decode`; the parameters are those of `gpt`, and what they do not tell of it are the
    arguments here.
    """
    check_numbers(COUNT, num_layers=num_layers, num_heads=num_heads)

    def init(params: PyTree, batch: int, num_positions: int) -> tuple[Cache, ...]:
        (max_len, width), dtype = params["positions"].shape, params["positions"].dtype
        _check_length(num_positions, max_len)
        zeros = jnp.zeros((batch, num_heads, num_positions, width // num_heads), dtype)
        return ((zeros, zeros),) * num_layers

    def step(params: PyTree, tokens: Array, position: Array, caches: Sequence[Cache]):
        vocab, width = params["embed"]["embedding"].shape
        max_len, dtype = len(params["positions"]), params["positions"].dtype
        module = nnx.eval_shape(
            lambda: _Gpt(vocab, width, num_layers, num_heads, max_len, dtype, nnx.Rngs(0))
        )
        return to_pure_method(module, "step")(params, tokens, position, caches)

    return Stepper(init, step)

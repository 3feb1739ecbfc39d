"""A decoder for the families that tunix lacks: GPT-2, GPT-NeoX, Phi and OLMo 2.

Names and cache are those of tunix's models, so that nothing else has to know which is which.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# Mesh axes by tunix's names: over "fsdp" weights are split for memory, over "tp" for the work.
INTO, OUT_OF = ("fsdp", "tp"), ("tp", "fsdp")


class Settings(NamedTuple):
    """What the families differ in.

    Attributes:
        order: where the norms stand: "sequential", before attention and then before the perceptron;
            "parallel", both on the block's input; "parallel, one norm", the same with one norm;
            "norms after", behind each.
        norm: the kind of all norms.
        activation: a name in `ACTIVATIONS`.
        has_gate: whether the perceptron's hidden layer is multiplied by a gate, which the
            activation is then of.
        num_rotated: number of coordinates of a head that turn with the position; 0: none.
        num_positions: number of learned positions; 0: none.
        has_query_norm: whether queries and keys are normalised, over all heads together.
        bias: whether matrices have biases; `attention_bias` and `head_bias` say so of attention's
            and of the last layer's.
        remat: whether a layer is computed anew in the backward pass, of what enters it.
    """

    num_layers: int
    vocab_size: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    order: Literal["sequential", "parallel", "parallel, one norm", "norms after"]
    norm: Literal["layer", "rms"]
    activation: str
    has_gate: bool
    num_rotated: int
    rope_theta: float
    num_positions: int
    has_query_norm: bool
    bias: bool
    attention_bias: bool
    head_bias: bool
    is_tied: bool
    dtype: Any
    remat: bool = False


class Dense(nnx.Module):
    """`y[..., out] = Σ_in x[..., in] kernel[in, out] + bias[out]`, `in` and `out` any axes."""

    def __init__(
        self,
        d_in: tuple[int, ...],
        d_out: tuple[int, ...],
        split: tuple[str | None, ...],
        *,
        bias: bool,
        dtype: Any,
    ):
        self.num_in = len(d_in)
        self.kernel = _split(jnp.zeros((*d_in, *d_out), dtype), split)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.tensordot(x, self.kernel[...], axes=self.num_in)
        return y if self.bias is None else y + self.bias[...]


class Attention(nnx.Module):
    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width, inner = (settings.embed_dim,), settings.head_dim
        given = {"bias": settings.attention_bias, "dtype": settings.dtype}
        keys = (settings.num_kv_heads, inner)
        self.q_proj = Dense(width, (settings.num_heads, inner), (*INTO, None), **given)
        self.k_proj = Dense(width, keys, (*INTO, None), **given)
        self.v_proj = Dense(width, keys, (*INTO, None), **given)
        self.o_proj = Dense((settings.num_heads, inner), width, ("tp", None, "fsdp"), **given)
        normed = settings.has_query_norm
        self.q_norm = _norm(settings, settings.num_heads * inner, rngs) if normed else None
        self.k_norm = _norm(settings, settings.num_kv_heads * inner, rngs) if normed else None
        self.num_rotated, self.theta = settings.num_rotated, settings.rope_theta

    def __call__(
        self,
        x: Float[Array, "batch seq width"],
        positions: Int[Array, "batch seq"],
        cache: dict[str, Array] | None,
        mask: Bool[Array, "batch seq keys"],
    ) -> tuple[Float[Array, "batch seq width"], dict[str, Array] | None]:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query.reshape(*x.shape[:2], -1)).reshape(query.shape)
            key = self.k_norm(key.reshape(*x.shape[:2], -1)).reshape(key.shape)
        query, key = self._rotated(query, positions), self._rotated(key, positions)
        if cache is not None:
            place = (0, cache["end_index"][0], 0, 0)
            key = jax.lax.dynamic_update_slice(cache["k"], key, place)
            value = jax.lax.dynamic_update_slice(cache["v"], value, place)
            cache = {"k": key, "v": value, "end_index": cache["end_index"] + x.shape[1]}
        found = jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], implementation="xla"
        )
        return self.o_proj(found), cache

    def _rotated(
        self, x: Float[Array, "batch seq heads width"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq heads width"]:
        """Turn the first coordinates of each head, in pairs half of them apart."""
        half = self.num_rotated // 2
        if not half:
            return x
        frequencies = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = (positions[..., None] * frequencies)[:, :, None]
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return jnp.concatenate(turned, axis=-1)


class Perceptron(nnx.Module):
    def __init__(self, settings: Settings):
        width, hidden = (settings.embed_dim,), (settings.hidden_dim,)
        given = {"bias": settings.bias, "dtype": settings.dtype}
        self.activation = settings.activation
        self.gate_proj = Dense(width, hidden, INTO, **given) if settings.has_gate else None
        self.up_proj = Dense(width, hidden, INTO, **given)
        self.down_proj = Dense(hidden, width, OUT_OF, **given)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        activation = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x)))
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        self.order = settings.order
        self.attn = Attention(settings, rngs)
        self.mlp = Perceptron(settings)
        self.attention_norm = _norm(settings, settings.embed_dim, rngs)
        has_two = settings.order != "parallel, one norm"
        self.mlp_norm = _norm(settings, settings.embed_dim, rngs) if has_two else None

    def __call__(
        self,
        x: Float[Array, "batch seq width"],
        positions: Int[Array, "batch seq"],
        cache: dict[str, Array] | None,
        mask: Bool[Array, "batch seq keys"],
    ) -> tuple[Float[Array, "batch seq width"], dict[str, Array] | None]:
        if self.order == "norms after":
            attended, cache = self.attn(x, positions, cache, mask)
            x = x + self.attention_norm(attended)
            return x + self._mlp_norm(self.mlp(x)), cache
        normed = self.attention_norm(x)
        attended, cache = self.attn(normed, positions, cache, mask)
        if self.order == "sequential":
            x = x + attended
            return x + self.mlp(self._mlp_norm(x)), cache
        return x + attended + self.mlp(self._mlp_norm(x) if self.mlp_norm else normed), cache

    def _mlp_norm(self, x: Array) -> Array:
        assert self.mlp_norm is not None
        return self.mlp_norm(x)


class Embedder(nnx.Module):
    def __init__(self, settings: Settings):
        def table(rows: int) -> nnx.Param:
            zeros = jnp.zeros((rows, settings.embed_dim), settings.dtype)
            return _split(zeros, OUT_OF)

        self.input_embedding = table(settings.vocab_size)
        places = settings.num_positions
        self.position_embedding = table(places) if places else None

    def __call__(
        self, tokens: Int[Array, "batch seq"], positions: Int[Array, "batch seq"]
    ) -> Float[Array, "batch seq width"]:
        x = self.input_embedding[...][tokens]
        if self.position_embedding is None:
            return x
        return x + self.position_embedding[...][positions]


class Decoder(nnx.Module):
    """The whole model, called as tunix's are."""

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
        self.remat = settings.remat
        self.embedder = Embedder(settings)
        self.layers = nnx.List(Block(settings, rngs) for _ in range(settings.num_layers))
        self.final_norm = _norm(settings, settings.embed_dim, rngs)
        width, vocab = (settings.embed_dim,), (settings.vocab_size,)
        given = {"bias": settings.head_bias, "dtype": settings.dtype}
        self.lm_head = None if settings.is_tied else Dense(width, vocab, INTO, **given)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: dict[str, dict[str, Array]] | None,
        mask: Bool[Array, "batch seq keys"],
    ) -> tuple[Float[Array, "batch seq vocab"], dict[str, Any] | None]:
        x, kept = self.embedder(tokens, positions), {}
        run = nnx.remat(Block.__call__) if self.remat else Block.__call__
        for i, layer in enumerate(self.layers):
            name = f"layer_{i}"
            x, kept[name] = run(layer, x, positions, None if cache is None else cache[name], mask)
        x = self.final_norm(x)
        if self.lm_head is None:
            logits = jnp.tensordot(x, self.embedder.input_embedding[...].T, axes=1)
        else:
            logits = self.lm_head(x)
        return logits, None if cache is None else kept


def _split(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """Make a parameter that says how it is split, and is not by being made."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _norm(settings: Settings, width: int, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    given = {"epsilon": settings.norm_eps, "param_dtype": settings.dtype, "rngs": rngs}
    kind = nnx.LayerNorm if settings.norm == "layer" else nnx.RMSNorm
    return kind(width, dtype=settings.dtype, use_fast_variance=False, **given)

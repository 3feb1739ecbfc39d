"""Gemma 1, 2 and 3, as tunix has them."""

import functools
import re
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jedit.models._optional import optional
from jedit.models.families.architecture import (
    Architecture,
    Tensors,
    by_table,
    expect,
    linear_rope,
    sizes,
    theta_of,
    with_globals,
)
from jedit.models.weight_files import Stack

SIZES = ("num_layers", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")


def gemma(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Gemma 1's configuration."""
    del dtype  # the computation follows the parameters
    expect(config, hidden_act=("gelu_pytorch_tanh",))
    kind = _gemma(config, ["GLOBAL"] * config.num_hidden_layers, final_logit_softcap=None)

    def convert(tensors: Tensors) -> dict[str, Any]:
        # tunix's table is Gemma 2's. In Gemma 1 this name is the norm before the perceptron.
        ours = {
            name.replace("post_attention_layernorm", "pre_feedforward_layernorm"): value
            for name, value in tensors.items()
        }
        return kind.convert(ours)

    return kind._replace(convert=convert)


def gemma2(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Gemma 2's configuration."""
    del dtype  # the computation follows the parameters
    expect(config, hidden_activation=("gelu_pytorch_tanh",))
    kinds = {"sliding_attention": "LOCAL_SLIDING", "full_attention": "GLOBAL"}
    return _gemma(
        config,
        [kinds[kind] for kind in config.layer_types],
        scale=config.head_dim / config.query_pre_attn_scalar,
        final_logit_softcap=config.final_logit_softcapping,
        attn_logits_soft_cap=config.attn_logit_softcapping,
        sliding_window_size=config.sliding_window,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
    )


def _gemma(config: Any, kinds: list[str], *, scale: float = 1.0, **settings: Any) -> Architecture:
    """Return tunix's first Gemma, whose layers are of these kinds.

    Args:
        config: the configuration.
        kinds: for each layer the name of its kind of attention.
        scale: by how much more than 1 / head_dim the squares of queries are multiplied.
        settings: further settings of tunix's.

    Raises:
        ValueError: a setting that it has as a constant is another.
    """
    expect(
        config,
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        tie_word_embeddings=(True,),
        use_bidirectional_attention=(False, None),
    )
    if theta_of(config) != 10_000:
        raise ValueError(f"tunix's Gemma has rope_theta 10000, not {theta_of(config)}.")
    model = optional("tunix.models.gemma.model")
    params = optional("tunix.models.gemma.params_safetensors")
    found = sizes(config)
    made = model.ModelConfig(
        **{name: found[name] for name in SIZES},
        num_embed=found["vocab_size"],
        attention_types=tuple(model.AttentionType[kind] for kind in kinds),
        **{"use_post_attn_norm": False, "use_post_ffw_norm": False, **settings},
    )
    table = params._get_key_and_transform_mapping(made)

    def finish(module: Any) -> None:
        for layer in module.layers:
            layer.attn.__class__ = _attention(model, scale**0.25)

    return Architecture(model.Gemma, made, _joined(by_table(table), made), True, finish=finish)


def gemma3(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Gemma 3's configuration, without its images."""
    expect(
        config,
        hidden_activation=("gelu_pytorch_tanh",),
        attention_bias=(False,),
        rms_norm_eps=(1e-6,),
        final_logit_softcapping=(None,),
        attn_logit_softcapping=(None,),
        use_bidirectional_attention=(False, None),
        tie_word_embeddings=(True,),
    )
    model = optional("tunix.models.gemma3.model")
    params = optional("tunix.models.gemma3.params_safetensors")
    kinds = {"LOCAL_SLIDING": "sliding_attention", "GLOBAL": "full_attention"}
    cycle = [kinds[kind.name] for kind in model.GEMMA3_ATTENTION_PATTERN]
    pattern = [cycle[i % len(cycle)] for i in range(config.num_hidden_layers)]
    # tunix has the pattern as a constant; a model with another one would load and compute wrongly.
    expect(config, layer_types=(pattern,))
    (local_theta, local_scale), (theta, scale) = (
        linear_rope(config, kind) for kind in ("sliding_attention", "full_attention")
    )
    found = sizes(config)
    norms = model.QueryPreAttentionNormalisation
    scalars = {
        found["embed_dim"] // found["num_heads"]: (norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS),
        found["head_dim"]: norms.BY_ONE_OVER_SQRT_HEAD_DIM,
    }
    expect(config, query_pre_attn_scalar=tuple(scalars))
    settings = model.ModelConfig(
        **{name: found[name] for name in SIZES},
        num_embed=found["vocab_size"],
        sliding_window_size=config.sliding_window,
        local_base_frequency=local_theta,
        global_base_frequency=theta,
        local_scale_factor=local_scale,
        global_scale_factor=scale,
        query_pre_attn_norm=scalars[config.query_pre_attn_scalar],
        param_dtype=dtype,
    )
    table = params._get_key_and_transform_mapping(settings)
    return Architecture(model.Gemma3, settings, _joined(by_table(table), settings), True)


def _joined(convert: Callable[[Tensors], dict[str, Any]], settings: Any) -> Callable:
    """Put queries, keys and values together as tunix's Gemmas have them."""
    is_one = settings.num_heads == settings.num_kv_heads

    def joined(tensors: Tensors) -> dict[str, Any]:
        found = convert(tensors)
        for path in list(found):
            if not (match := re.fullmatch(r"tmp\.(layers\.\d+\.attn)\.q", path)):
                continue
            # Each (width, heads, width of a head) in the table.
            names = [f"tmp.{match[1]}.{name}" for name in "qkv"]
            query, *rest = (found.pop(n).transpose((1, 0, 2)) for n in names if n in found)
            if is_one:
                found[f"{match[1]}.qkv_einsum.w"] = Stack((query, *rest))
            else:
                found[f"{match[1]}.q_einsum.w"] = query
                found[f"{match[1]}.kv_einsum.w"] = Stack(tuple(rest))
        return found

    return joined


@functools.cache
def _attention(model: types.ModuleType, factor: float) -> type:
    """Make a class of tunix's attention whose window is counted in positions.

    tunix 0.1.7 counts it from the first column, which in packed rows is another row's. And it has
    the queries' scale as a constant; where Gemma 2 27B has another, queries and keys, which both
    are rotated, take the same factor.
    """

    def mask(positions: jax.Array, *, cache_len: int, sliding_window_size: int) -> jax.Array:
        keys = positions if positions.shape[1] == cache_len else jnp.arange(cache_len)[None]
        return positions[:, :, None] - keys[:, None, :] < sliding_window_size

    def apply_rope(inputs: jax.Array, positions: jax.Array, head_dim: int) -> jax.Array:
        return model.apply_rope(inputs, positions, head_dim=head_dim) * factor

    names = {"apply_rope": apply_rope} if factor != 1.0 else {}
    return with_globals(model.Attention, "block", _create_sliding_mask=mask, **names)

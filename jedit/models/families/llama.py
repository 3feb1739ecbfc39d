"""Llama 2 and 3, and what tunix's Llama computes beside them: Mistral, Zephyr and Phi-3."""

import functools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from jedit.models._optional import optional
from jedit.models.families.architecture import (
    Architecture,
    Tensors,
    by_table,
    expect,
    rope_bases,
    rotary,
    sizes,
    with_globals,
)


def llama(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Llama's configuration."""
    del dtype  # the computation follows the parameters
    expect(config, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    model = optional("tunix.models.llama3.model")
    params = optional("tunix.models.llama3.params")
    settings = model.ModelConfig(**sizes(config), weight_tying=config.tie_word_embeddings)
    bases = rope_bases(config, settings.head_dim)
    return Architecture(
        model.Llama3,
        settings,
        by_table(params._get_key_and_transform_mapping(settings)),
        config.tie_word_embeddings,
        finish=lambda module: rotate(module, model, bases),
    )


def mistral(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Mistral's configuration: a Llama with a window, or without."""
    return llama(config, dtype)._replace(window=config.sliding_window)


def phi3(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Phi-3's configuration: a Llama whose matrices lie in one tensor.

    Raises:
        ValueError: positions rotate a part of a head alone, or are stretched.
    """
    rotated = rotary(config).get("partial_rotary_factor", 1.0)
    expect(config, partial_rotary_factor=(1.0,))
    if rotated != 1.0:
        raise ValueError(f"phi3 that rotates {rotated} of a head is not supported, only all of it.")
    kind = llama(config, dtype)
    queries = kind.config.num_heads * kind.config.head_dim
    keys = kind.config.num_kv_heads * kind.config.head_dim
    hidden = kind.config.hidden_dim
    cuts = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": (0, queries),
            "self_attn.k_proj": (queries, queries + keys),
            "self_attn.v_proj": (queries + keys, queries + 2 * keys),
        },
        "mlp.gate_up_proj": {"mlp.gate_proj": (0, hidden), "mlp.up_proj": (hidden, 2 * hidden)},
    }

    def convert(tensors: Tensors) -> dict[str, Any]:
        found = dict(tensors)
        for name, value in tensors.items():
            for joined, parts in cuts.items():
                if f".{joined}." in name:
                    del found[name]
                    for part, (begin, end) in parts.items():
                        found[name.replace(joined, part)] = value[begin:end]
        return kind.convert(found)

    return kind._replace(convert=convert, window=config.sliding_window)


@functools.cache
def _rotating_attention(model: types.ModuleType, bases: tuple[float, ...]) -> type:
    """Make a class of tunix's attention that rotates with the base of the configuration.

    tunix 0.1.7 leaves the base out where Llama 3 and Qwen 3 rotate, which makes it 1,000,000
    whatever the configuration says: 500,000 for Llama 3, 5,000,000 for Qwen 3 4B.
    """

    def apply_rope(inputs: Any, positions: Any, head_dim: int, **_: Any) -> Any:
        base = jnp.asarray(np.asarray(bases, np.float32))
        return model.apply_rope(inputs, positions, head_dim=head_dim, rope_theta=base)

    return with_globals(model.Attention, "block", apply_rope=apply_rope)


def rotate(module: Any, model: types.ModuleType, bases: tuple[float, ...]) -> None:
    """Let a module of tunix's rotate with these bases."""
    for layer in module.layers:
        # The class is changed on the loaded module: its parameters, and their paths, stay as they
        # are.
        layer.attn.__class__ = _rotating_attention(model, bases)

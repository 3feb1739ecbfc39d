"""Qwen 2, Qwen 3 and Qwen 3's mixtures of experts, as tunix has them."""

import re
from collections.abc import Mapping
from typing import Any

from jedit.models._optional import optional
from jedit.models.families.architecture import (
    Architecture,
    Tensors,
    by_table,
    expect,
    rope_bases,
    sizes,
    theta_of,
)
from jedit.models.families.llama import rotate
from jedit.models.weight_files import Stack


def qwen2(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Qwen 2's configuration."""
    expect(config, hidden_act=("silu",), use_sliding_window=(False,))
    theta_of(config)
    model = optional("tunix.models.qwen2.model")
    params = optional("tunix.models.qwen2.params")
    tied = config.tie_word_embeddings
    settings = model.ModelConfig(
        **sizes(config), use_tied_embedding=tied, dtype=dtype, param_dtype=dtype
    )
    table = params._get_key_and_transform_mapping(settings)
    return Architecture(model.Qwen2, settings, by_table(table), tied)


def qwen3(config: Any, dtype: Any, **further: Any) -> Architecture:
    """Return the model of a Qwen 3's configuration; `further` are settings of tunix's."""
    expect(config, hidden_act=("silu",), use_sliding_window=(False,), attention_bias=(False,))
    model = optional("tunix.models.qwen3.model")
    params = optional("tunix.models.qwen3.params")
    tied = config.tie_word_embeddings
    settings = model.ModelConfig(
        **{**sizes(config), **further}, use_tied_embedding=tied, dtype=dtype, param_dtype=dtype
    )
    bases = rope_bases(config, settings.head_dim)
    return Architecture(
        model.Qwen3,
        settings,
        by_table(params._get_key_and_transform_mapping(settings)),
        tied,
        finish=lambda module: rotate(module, model, bases),
    )


def qwen3_moe(config: Any, dtype: Any) -> Architecture:
    """Return the model of a configuration of Qwen 3 with experts, in every layer."""
    expect(config, norm_topk_prob=(True,), decoder_sparse_step=(1,), mlp_only_layers=([],))
    kind = qwen3(
        config,
        dtype,
        hidden_dim=config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )

    def convert(tensors: Tensors) -> dict[str, Any]:
        return _stacked(kind.convert(tensors))

    return kind._replace(convert=convert)


def _stacked(found: Mapping[str, Any]) -> dict[str, Any]:
    """Put the experts' matrices one on top of the other, in the order of their numbers."""
    stacked: dict[str, Any] = {}
    parts: dict[str, dict[int, Any]] = {}
    for path, value in found.items():
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.kernel", path):
            parts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = value
        else:
            stacked[path] = value
    for path, experts in parts.items():
        stacked[path] = Stack(tuple(experts[i] for i in sorted(experts)))
    return stacked

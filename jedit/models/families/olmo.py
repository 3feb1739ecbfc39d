"""OLMo 2: norms behind attention and perceptron, and one over all queries and all keys."""

from typing import Any

from jedit.models.families._decoder import Decoder, Settings
from jedit.models.families.architecture import Architecture, by_table, expect, sizes, theta_of


def olmo2(config: Any, dtype: Any) -> Architecture:
    """Return the model of an OLMo 2's configuration."""
    expect(config, hidden_act=("silu",), attention_bias=(False,))
    found, theta = sizes(config), theta_of(config)
    settings = Settings(
        **{**found, "rope_theta": theta},
        order="norms after",
        norm="rms",
        activation="silu",
        has_gate=True,
        num_rotated=found["head_dim"],
        num_positions=0,
        has_query_norm=True,
        bias=False,
        attention_bias=False,
        head_bias=False,
        is_tied=config.tie_word_embeddings,
        dtype=dtype,
    )
    width, inner = settings.embed_dim, settings.head_dim
    stem, to = r"model\.layers\.([0-9]+)", r"layers.\1"
    heads = {"q": settings.num_heads, "k": settings.num_kv_heads, "v": settings.num_kv_heads}
    table: dict[str, Any] = {
        rf"{stem}\.self_attn\.{name}_proj\.weight": (
            rf"{to}.attn.{name}_proj.kernel",
            ((1, 0), (width, number, inner)),
        )
        for name, number in heads.items()
    }
    table |= {
        rf"{stem}\.self_attn\.o_proj\.weight": (
            rf"{to}.attn.o_proj.kernel",
            ((1, 0), (settings.num_heads, inner, width)),
        ),
        rf"{stem}\.self_attn\.(q|k)_norm\.weight": (rf"{to}.attn.\2_norm.scale", None),
        rf"{stem}\.mlp\.(gate|up|down)_proj\.weight": (
            rf"{to}.mlp.\2_proj.kernel",
            ((1, 0), None),
        ),
        rf"{stem}\.post_attention_layernorm\.weight": (rf"{to}.attention_norm.scale", None),
        rf"{stem}\.post_feedforward_layernorm\.weight": (rf"{to}.mlp_norm.scale", None),
        r"model\.norm\.weight": ("final_norm.scale", None),
        r"model\.embed_tokens\.weight": ("embedder.input_embedding", None),
        r"lm_head\.weight": ("lm_head.kernel", ((1, 0), None)),
    }
    return Architecture(Decoder, settings, by_table(table), settings.is_tied)

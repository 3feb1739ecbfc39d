"""GPT-2, GPT-NeoX (Pythia) and Phi 1, 1.5 and 2: layer norms, biases, a perceptron without gate."""

from typing import Any

from jedit.models.families._decoder import ACTIVATIONS, Decoder, Settings
from jedit.models.families.architecture import (
    Architecture,
    Tensors,
    by_table,
    expect,
    rotary,
    theta_of,
)


def gpt2(config: Any, dtype: Any) -> Architecture:
    """Return the model of a GPT-2's configuration."""
    expect(
        config,
        activation_function=tuple(ACTIVATIONS),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
        tie_word_embeddings=(True,),
    )
    width, heads = config.n_embd, config.n_head
    inner = width // heads
    settings = _settings(
        num_layers=config.n_layer,
        vocab_size=config.vocab_size,
        embed_dim=width,
        hidden_dim=config.n_inner or 4 * width,
        num_heads=heads,
        norm_eps=config.layer_norm_epsilon,
        order="sequential",
        activation=config.activation_function,
        num_positions=config.n_positions,
        is_tied=True,
        dtype=dtype,
    )
    names = {
        r"attn\.query\.weight": ("attn.q_proj.kernel", (None, (width, heads, inner))),
        r"attn\.query\.bias": ("attn.q_proj.bias", (None, (heads, inner))),
        r"attn\.key\.weight": ("attn.k_proj.kernel", (None, (width, heads, inner))),
        r"attn\.key\.bias": ("attn.k_proj.bias", (None, (heads, inner))),
        r"attn\.value\.weight": ("attn.v_proj.kernel", (None, (width, heads, inner))),
        r"attn\.value\.bias": ("attn.v_proj.bias", (None, (heads, inner))),
        r"attn\.c_proj\.weight": ("attn.o_proj.kernel", (None, (heads, inner, width))),
        r"attn\.c_proj\.bias": ("attn.o_proj.bias", None),
        r"mlp\.c_fc\.weight": ("mlp.up_proj.kernel", None),
        r"mlp\.c_fc\.bias": ("mlp.up_proj.bias", None),
        r"mlp\.c_proj\.weight": ("mlp.down_proj.kernel", None),
        r"mlp\.c_proj\.bias": ("mlp.down_proj.bias", None),
        r"ln_1\.weight": ("attention_norm.scale", None),
        r"ln_1\.bias": ("attention_norm.bias", None),
        r"ln_2\.weight": ("mlp_norm.scale", None),
        r"ln_2\.bias": ("mlp_norm.bias", None),
    }
    root = r"(?:transformer\.)?"  # the files on the hub lack it
    table = {
        rf"{root}h\.([0-9]+)\.{name}$": (rf"layers.\1.{path}", how)
        for name, (path, how) in names.items()
    }
    table |= {
        rf"{root}wte\.weight$": ("embedder.input_embedding", None),
        rf"{root}wpe\.weight$": ("embedder.position_embedding", None),
        rf"{root}ln_f\.weight$": ("final_norm.scale", None),
        rf"{root}ln_f\.bias$": ("final_norm.bias", None),
    }
    from_table = by_table(table)

    def convert(tensors: Tensors) -> dict[str, Any]:
        found = dict(tensors)
        for name, value in tensors.items():
            if ".c_attn." in name:
                del found[name]
                for i, part in enumerate(("query", "key", "value")):
                    cut = value[..., i * width : (i + 1) * width]
                    found[name.replace("c_attn", part)] = cut
        return from_table(found)

    return Architecture(Decoder, settings, convert, True)


def gpt_neox(config: Any, dtype: Any) -> Architecture:
    """Return the model of a GPT-NeoX's configuration, such as a Pythia's."""
    expect(
        config,
        hidden_act=tuple(ACTIVATIONS),
        attention_bias=(True,),
        tie_word_embeddings=(False,),
    )
    width, heads = config.hidden_size, config.num_attention_heads
    inner = width // heads
    settings = _settings(
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        embed_dim=width,
        hidden_dim=config.intermediate_size,
        num_heads=heads,
        norm_eps=config.layer_norm_eps,
        order="parallel" if config.use_parallel_residual else "sequential",
        activation=config.hidden_act,
        num_rotated=int(inner * _rotated_part(config, "rotary_pct", 0.25)),
        rope_theta=theta_of(config),
        dtype=dtype,
    )
    # Queries, keys and values lie interleaved, head by head; `convert` tells them apart.
    names = {f"attention.{part}": f"attn.{part[0]}_proj" for part in ("query", "key", "value")}
    table = {}
    for name, path in names.items():
        stem = rf"gpt_neox\.layers\.([0-9]+)\.{name}"
        table[rf"{stem}\.weight$"] = (rf"layers.\1.{path}.kernel", ((2, 0, 1), None))
        table[rf"{stem}\.bias$"] = (rf"layers.\1.{path}.bias", None)
    stem = r"gpt_neox\.layers\.([0-9]+)"
    table |= _dense(rf"{stem}\.attention\.dense", r"layers.\1.attn.o_proj", (heads, inner, width))
    table |= _dense(rf"{stem}\.mlp\.dense_h_to_4h", r"layers.\1.mlp.up_proj")
    table |= _dense(rf"{stem}\.mlp\.dense_4h_to_h", r"layers.\1.mlp.down_proj")
    table |= _norm(rf"{stem}\.input_layernorm", r"layers.\1.attention_norm")
    table |= _norm(rf"{stem}\.post_attention_layernorm", r"layers.\1.mlp_norm")
    table |= _norm(r"gpt_neox\.final_layer_norm", "final_norm")
    table[r"gpt_neox\.embed_in\.weight$"] = ("embedder.input_embedding", None)
    table[r"embed_out\.weight$"] = ("lm_head.kernel", ((1, 0), None))
    from_table = by_table(table)

    def convert(tensors: Tensors) -> dict[str, Any]:
        found = dict(tensors)
        for name, value in tensors.items():
            if ".query_key_value." in name:
                del found[name]
                by_head = value.reshape((heads, 3, inner, *value.shape[1:]))
                for i, part in enumerate(("query", "key", "value")):
                    found[name.replace("query_key_value", part)] = by_head[:, i]
        return from_table(found)

    return Architecture(Decoder, settings, convert, False)


def phi(config: Any, dtype: Any) -> Architecture:
    """Return the model of a Phi 1's, 1.5's or 2's configuration."""
    expect(
        config,
        hidden_act=tuple(ACTIVATIONS),
        qk_layernorm=(False,),
        tie_word_embeddings=(False,),
    )
    width, heads = config.hidden_size, config.num_attention_heads
    keys, inner = config.num_key_value_heads or heads, width // heads
    settings = _settings(
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        embed_dim=width,
        hidden_dim=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=keys,
        norm_eps=config.layer_norm_eps,
        order="parallel, one norm",
        activation=config.hidden_act,
        num_rotated=int(inner * _rotated_part(config, "partial_rotary_factor", 0.5)),
        rope_theta=theta_of(config),
        head_bias=True,
        dtype=dtype,
    )
    stem, to = r"model\.layers\.([0-9]+)", r"layers.\1"
    table = {r"model\.embed_tokens\.weight$": ("embedder.input_embedding", None)}
    for name, number in (("q", heads), ("k", keys), ("v", keys)):
        table |= _dense(
            rf"{stem}\.self_attn\.{name}_proj",
            rf"{to}.attn.{name}_proj",
            (width, number, inner),
            (number, inner),
        )
    table |= _dense(rf"{stem}\.self_attn\.dense", rf"{to}.attn.o_proj", (heads, inner, width))
    table |= _dense(rf"{stem}\.mlp\.fc1", rf"{to}.mlp.up_proj")
    table |= _dense(rf"{stem}\.mlp\.fc2", rf"{to}.mlp.down_proj")
    table |= _norm(rf"{stem}\.input_layernorm", rf"{to}.attention_norm")
    table |= _norm(r"model\.final_layernorm", "final_norm")
    table |= _dense(r"lm_head", "lm_head")
    return Architecture(Decoder, settings, by_table(table), False)


def _settings(*, embed_dim: int, num_heads: int, **given: Any) -> Settings:
    """Return settings that these families share, and the given ones."""
    shared = {
        "num_kv_heads": num_heads,
        "head_dim": embed_dim // num_heads,
        "norm": "layer",
        "has_gate": False,
        "num_rotated": 0,
        "rope_theta": 10_000.0,
        "num_positions": 0,
        "has_query_norm": False,
        "bias": True,
        "attention_bias": True,
        "head_bias": False,
        "is_tied": False,
    }
    return Settings(embed_dim=embed_dim, num_heads=num_heads, **{**shared, **given})


def _rotated_part(config: Any, name: str, default: float) -> float:
    """Return the part of a head that is rotated, by the names of transformers 5 and before."""
    found = rotary(config).get("partial_rotary_factor")
    return found if found is not None else getattr(config, name, default)


def _dense(
    name: str,
    path: str,
    kernel: tuple[int, ...] | None = None,
    bias: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Return the rows of a table for PyTorch's linear layer, (out, in)."""
    return {
        rf"{name}\.weight$": (f"{path}.kernel", ((1, 0), kernel)),
        rf"{name}\.bias$": (f"{path}.bias", (None, bias)),
    }


def _norm(name: str, path: str) -> dict[str, Any]:
    return {
        rf"{name}\.weight$": (f"{path}.scale", None),
        rf"{name}\.bias$": (f"{path}.bias", None),
    }

"""Tiny random models of the supported families, written as Hugging Face folders without PyTorch."""

import json

import numpy as np
import transformers
from safetensors.numpy import save_file

COMMON = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SLIDING = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON, rope_theta=10000.0, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**COMMON, rope_theta=1000000.0, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=6, rope_theta=5000000.0),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=6,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[],
    ),
    "gemma": transformers.GemmaConfig(**{**COMMON, "num_key_value_heads": 1}, head_dim=6),
    "gemma2": transformers.Gemma2Config(
        **COMMON, head_dim=6, query_pre_attn_scalar=6, sliding_window=5
    ),
    # Six layers are one round of its pattern: five that slide, and one that sees everything.
    "gemma3": transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 6},
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=5,
        rope_parameters=SLIDING,
    ),
}


def write_random(name, folder, *, seed=0):
    """A folder with config.json and model.safetensors, in float32."""
    return write_config(CONFIGS[name], folder, seed=seed)


def write_config(config, folder, *, seed=0, scale=0.5):
    """The same of a configuration; entries of the matrices are of the scale."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tensors = {
        path: ((len(shape) == 1) + scale * rng.normal(size=shape)).astype("<f4")
        for path, shape in shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def shapes(config):
    """Each tensor's shape by its name."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    if config.model_type == "qwen3_moe":
        layer = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")}
        layer["mlp.gate"] = (config.num_experts, width)
        inner = config.moe_intermediate_size
        for i in range(config.num_experts):
            layer |= {f"mlp.experts.{i}.{n}_proj": (inner, width) for n in ("gate", "up")}
            layer[f"mlp.experts.{i}.down_proj"] = (width, inner)
    if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    if config.model_type in ("gemma2", "gemma3_text"):
        layer |= {f"{side}_feedforward_layernorm": (width,) for side in ("pre", "post")}
    found = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    for i in range(config.num_hidden_layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if config.model_type == "qwen2":
            sizes = {"q": queries, "k": keys, "v": keys}
            found |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (s,) for n, s in sizes.items()}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    return found


def write_tokenizer(folder):
    """A token for each character of plain text, as many as the vocabulary has room for."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = "abcdefghijklmnopqrstuvwxyz .,?:'\n"
    names = ["<unk>", "<s>", "</s>", *characters]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(str(folder))
    return folder

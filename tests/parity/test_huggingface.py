"""jedit's view of a Hugging Face folder against transformers' own, both ways.

Tiny random models, written by transformers; every norm's gain and every bias is random too, and no
two widths are equal, so that nothing can be left out or transposed unseen.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from numpy.testing import assert_allclose

import jedit
from jedit.models import cached_decode, load_model, load_stepper, save_model
from tests.llm.random_folder import COMMON, SLIDING
from tests.llm.test_load_stepper import stepwise_logits

TOLERANCE = 1e-4
LLAMA3_POSITIONS = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_WITHOUT_GROUPS = {name: value for name, value in COMMON.items() if "key_value" not in name}
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON, rope_theta=10000.0, rms_norm_eps=1e-5),
    "llama 3.2": transformers.LlamaConfig(
        **COMMON, head_dim=6, rope_parameters=LLAMA3_POSITIONS, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(**COMMON, rope_theta=1000000.0, tie_word_embeddings=False),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=6, rope_theta=5000000.0),
    "qwen3 tied": transformers.Qwen3Config(
        **COMMON, head_dim=6, rope_theta=1000000.0, tie_word_embeddings=True
    ),
    "qwen3 experts": transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=6,
        rope_theta=1000000.0,
        moe_intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "mistral": transformers.MistralConfig(**COMMON, head_dim=6, sliding_window=4),
    "mistral, no window": transformers.MistralConfig(**COMMON, head_dim=6, sliding_window=None),
    "phi3": transformers.Phi3Config(**COMMON, sliding_window=5, pad_token_id=0),
    "phi": transformers.PhiConfig(**COMMON, partial_rotary_factor=0.5),
    "gpt2": transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_inner=20, n_positions=64
    ),
    "pythia": transformers.GPTNeoXConfig(**_WITHOUT_GROUPS, rotary_pct=0.5),
    "pythia, one after the other": transformers.GPTNeoXConfig(
        **_WITHOUT_GROUPS, rotary_pct=1.0, use_parallel_residual=False
    ),
    "olmo2": transformers.Olmo2Config(**COMMON),
    "gemma2": transformers.Gemma2Config(
        **{**COMMON, "num_hidden_layers": 3},
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=4,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma2, as many keys": transformers.Gemma2Config(
        **{**COMMON, "num_key_value_heads": 4},
        head_dim=6,
        query_pre_attn_scalar=9,  # as the model of 27 billion, whose scale is no width of a head
        sliding_window=4,
    ),
    "gemma": transformers.GemmaConfig(**{**COMMON, "num_key_value_heads": 1}, head_dim=6),
    "gemma3": transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 7},
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=5,
        rope_parameters=SLIDING,
    ),
    "gemma3, as many keys": transformers.Gemma3TextConfig(
        **{**COMMON, "num_key_value_heads": 4},
        head_dim=6,
        query_pre_attn_scalar=4,
        sliding_window=5,
        rope_parameters=SLIDING,
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 11))


def write(name, folder, *, dtype=torch.float32, **options):
    """A random model of that configuration in a folder, with a file beside it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.25 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn_like(parameter) + 0.1)
    model.to(dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


def torch_logits(folder, tokens=TOKENS, dtype="auto"):
    # Its fast attention leaves Gemma 2's soft caps out.
    given = {"dtype": dtype, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def perturbed(params):
    """Every parameter changed by an edit of its own."""
    rng = np.random.default_rng(1)
    blocks = {path: 0.1 * rng.normal(size=p.shape) for path, p in paths(params).items()}
    blocks = {path: jnp.asarray(block, jnp.float32) for path, block in blocks.items()}
    return jedit.apply_edit(params, jedit.Edit(blocks))


def assert_same(a, b):
    assert a.shape == b.shape
    assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_there_and_back(name, tmp_path):
    source = write(name, tmp_path / "source")
    apply, params, config = load_model(source)
    assert config.vocab_size == 37
    before = np.asarray(jax.jit(apply)(params, TOKENS))
    assert_same(before, torch_logits(source))
    assert not jedit.find_sites(apply, params, TOKENS).uncovered

    edited = perturbed(params)
    folder = save_model(edited, tmp_path / "edited", source=source)
    after = np.asarray(jax.jit(apply)(edited, TOKENS))
    assert np.abs(after - before).max() > 0.1
    assert_same(after, torch_logits(folder))
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()}
    assert (folder / "tokenizer.json").read_text() == '{"a": "tokenizer"}'
    _, again, _ = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, edited, again)
    assert_same(torch_logits(source), before)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_generation_with_a_cache(name, tmp_path):
    folder = write(name, tmp_path / "source")
    _, params, _ = load_model(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = torch.tensor(TOKENS[:, :7])
    # Nothing ends a row early, and no token is left out.
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    stepper = load_stepper(folder)
    got = cached_decode(stepper, params, TOKENS[:, :7], 9)
    np.testing.assert_array_equal(got, out[:, 7:].numpy())
    # Random models repeat themselves, which needs no cache: so its logits too.
    assert_same(np.asarray(stepwise_logits(stepper, params, TOKENS)), torch_logits(folder))


def test_positions_of_llama_3_2_at_its_real_size():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from jedit.models.families.architecture import rope_bases

    real = {**LLAMA3_POSITIONS, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(head_dim=64, rope_parameters={**real, "factor": 32.0})
    want = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    exponents = np.arange(32, dtype=np.float32) / 32
    got = np.asarray(rope_bases(config, 64), np.float32) ** -exponents
    assert_allclose(got, want, rtol=2e-6)


def test_several_files(tmp_path):
    source = write("llama", tmp_path / "source", max_shard_size="4KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    apply, params, _ = load_model(source)
    assert_same(np.asarray(jax.jit(apply)(params, TOKENS)), torch_logits(source))
    edited = perturbed(params)
    folder = save_model(edited, tmp_path / "edited", source=source)
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()}
    assert_same(np.asarray(jax.jit(apply)(edited, TOKENS)), torch_logits(folder))


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3 experts",
        "gemma2",
        "gemma3",
        "gpt2",
        "phi",
        "olmo2",
    ],
)
def test_half_precision(name, tmp_path):
    source = write(name, tmp_path / "source", dtype=torch.bfloat16)
    apply, params, _ = load_model(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = np.asarray(jax.jit(apply)(params, TOKENS))
    assert logits.dtype == np.float32
    want = torch_logits(source, dtype=torch.float32)
    assert_allclose(logits, want, rtol=0, atol=0.1 * np.abs(want).max())
    wide, wide_params, _ = load_model(source, dtype=jnp.float32)
    assert_same(np.asarray(jax.jit(wide)(wide_params, TOKENS)), want)

    folder = save_model(params, tmp_path / "same", source=source)
    assert (folder / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    # An edit of weights that were widened is saved wide, and the configuration says so.
    edited = perturbed(wide_params)
    folder = save_model(edited, tmp_path / "wide", source=source)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert_same(np.asarray(jax.jit(wide)(edited, TOKENS)), torch_logits(folder))


def test_a_mixture_of_dtypes_in_one_file(tmp_path):
    from safetensors.torch import load_file, save_file

    source = write("qwen3", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in list(tensors)[::2]:
        tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    apply, params, _ = load_model(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert_same(
        np.asarray(jax.jit(apply)(params, TOKENS)), torch_logits(source, dtype=torch.float32)
    )


def test_tied_weights_that_are_in_the_file_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    source = write("llama 3.2", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["something.else"] = torch.arange(3.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    _, params, _ = load_model(source)
    edited = perturbed(params)
    folder = save_model(edited, tmp_path / "edited", source=source)
    saved = load_file(folder / "model.safetensors")
    embedding = np.asarray(edited["embedder"]["input_embedding"])
    np.testing.assert_array_equal(saved["lm_head.weight"].numpy(), embedding)
    np.testing.assert_array_equal(saved["model.embed_tokens.weight"].numpy(), embedding)
    np.testing.assert_array_equal(saved["something.else"].numpy(), np.arange(3.0))


def test_llama2c_in_transformers(shared_data, tmp_path):
    from jedit.models import convert_llama2c

    stories = shared_data / "tinystories260k"
    folder = convert_llama2c(
        stories / "checkpoint_legacy.bin", stories / "tokenizer.bin", tmp_path / "hf"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    begin = torch.tensor([[tokenizer.bos_token_id]])
    out = model.generate(begin, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    apply, params, _ = load_model(folder)
    tokens = out.numpy()
    assert_same(np.asarray(jax.jit(apply)(params, tokens)), torch_logits(folder, tokens))

"""Adapters in PEFT's form, made by hand: a module's matrix changes by `scale * B A`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import jedit
from jedit.models import load_adapter, load_model, save_adapter
from tests.llm.random_folder import write_random

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 9))
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "rank_pattern": {}}
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")


def write_adapter(source, folder, modules=MODULES, **config):
    """Random adapters of modules in both layers; returns the change of each matrix too."""
    rng = np.random.default_rng(1)
    weights = load_file(source / "model.safetensors")
    tensors, changes = {}, {}
    for layer in (0, 1):
        for module in modules:
            name = f"model.layers.{layer}.{module}"
            out, into = weights[f"{name}.weight"].shape
            a, b = (rng.normal(size=s).astype(np.float32) for s in ((3, into), (out, 3)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            changes[f"{name}.weight"] = 2.0 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder, changes


def merged(source, folder, changes):
    """The folder with the changes added to its matrices."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors = {n: value + changes.get(n, np.float32(0)) for n, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # whose keys and values are one parameter
def test_an_adapter_there_and_back(family, tmp_path):
    source = write_random(family, tmp_path / "source")
    modules = (*MODULES, "self_attn.v_proj") if family == "gemma2" else MODULES
    folder, changes = write_adapter(source, tmp_path / "adapter", modules)
    apply, params, _ = load_model(source)
    adapted = load_adapter(folder, apply, params, source=source)
    other, expected, _ = load_model(merged(source, tmp_path / "merged", changes))
    want = np.asarray(other(expected, TOKENS))
    assert np.abs(want - np.asarray(apply(params, TOKENS))).max() > 1
    got = np.asarray(adapted.apply(adapted.params, TOKENS))
    assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=0, atol=1e-4),
        adapted.merge(adapted.params),
        expected,
    )

    given = {"apply": apply, "adapter": folder, "source": source}
    same = save_adapter(adapted.params, tmp_path / "same", **given)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, same))
    assert set(before) == set(after)
    for name in before:
        assert_array_equal(after[name], before[name])

    # The adapters alone, by their own curvature, and back.
    assert not jedit.find_sites(adapted.apply, adapted.params, TOKENS, "^lora/").uncovered
    noise = np.random.default_rng(2)
    moved = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype), adapted.params["lora"]
    )
    moved = {**adapted.params, "lora": moved}
    edited = save_adapter(moved, tmp_path / "edited", **given)
    again = load_adapter(edited, apply, params, source=source)
    want = np.asarray(adapted.apply(moved, TOKENS))
    assert np.abs(want - got).max() > 0.1
    got = np.asarray(again.apply(again.params, TOKENS))
    assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


def test_scales_of_some_modules(tmp_path):
    source = write_random("llama", tmp_path / "source")
    pattern = {"alpha_pattern": {"layers.1.mlp.down_proj": 12}, "use_rslora": True}
    folder, changes = write_adapter(source, tmp_path / "adapter", **pattern)
    for name in changes:
        alpha = 12 if name == "model.layers.1.mlp.down_proj.weight" else 6
        changes[name] *= alpha / np.sqrt(3) / 2
    apply, params, _ = load_model(source)
    adapted = load_adapter(folder, apply, params, source=source)
    other, expected, _ = load_model(merged(source, tmp_path / "merged", changes))
    want = np.asarray(other(expected, TOKENS))
    got = np.asarray(adapted.apply(adapted.params, TOKENS))
    assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())
    given = {"apply": apply, "adapter": folder, "source": source}
    again = load_adapter(
        save_adapter(adapted.params, tmp_path / "same", **given), apply, params, source=source
    )
    assert_allclose(again.apply(again.params, TOKENS), got, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ],
)
def test_other_kinds_of_adapters(change, message, tmp_path):
    source = write_random("llama", tmp_path / "source")
    folder, _ = write_adapter(source, tmp_path / "adapter", **change)
    apply, params, _ = load_model(source)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, apply, params, source=source)


def test_a_part_of_a_parameter(tmp_path):
    source = write_random("gemma2", tmp_path / "source")
    folder, _ = write_adapter(source, tmp_path / "adapter", ("self_attn.v_proj",))
    apply, params, _ = load_model(source)
    with pytest.raises(ValueError, match=r"kv_einsum.w is one parameter of 2 modules.* only 1"):
        load_adapter(folder, apply, params, source=source)


def test_what_is_no_adapter_of_the_model(tmp_path):
    source = write_random("llama", tmp_path / "source")
    apply, params, _ = load_model(source)
    with pytest.raises(ValueError, match="no adapter of PEFT"):
        load_adapter(source, apply, params, source=source)
    folder, _ = write_adapter(source, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new, message in (
        ("layers.0", "layers.7", "is no module of"),
        ("lora_A.weight", "lora_embedding_A", "no matrix of plain LoRA"),
    ):
        renamed = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(renamed, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, apply, params, source=source)
    with pytest.raises(ValueError, match="a folder of their own"):
        save_adapter(params, folder, apply=apply, adapter=folder, source=source)

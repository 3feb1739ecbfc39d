"""Adapters that PEFT made, in jedit, and edited ones back in PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from jedit.models import load_adapter, load_model, save_adapter
from tests.parity.test_huggingface import TOKENS, assert_same, write

MODULES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],  # several parameters in one module
    "gemma2": ["k_proj", "v_proj", "gate_proj"],  # several modules in one parameter
    "pythia": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "mlp.c_proj"],  # matrices (in, out)
}


def torch_logits(source, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", list(MODULES))
def test_there_and_back(name, tmp_path):
    source = write(name, tmp_path / "source")
    if name == "gpt2":  # as it lies on the hub, without the model's own name
        tensors = load_file(source / "model.safetensors")
        tensors = {n.removeprefix("transformer."): value for n, value in tensors.items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=MODULES[name],
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        alpha_pattern={MODULES[name][0]: 2},
        use_rslora=name == "llama",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    apply, params, _ = load_model(source)
    adapted = load_adapter(tmp_path / "adapter", apply, params, source=source)
    before = np.asarray(jax.jit(adapted.apply)(adapted.params, TOKENS))
    assert np.abs(before - np.asarray(apply(params, TOKENS))).max() > 0.1
    assert_same(before, torch_logits(source, tmp_path / "adapter"))

    rng = np.random.default_rng(2)
    lora = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapted.params["lora"]
    )
    edited = {**adapted.params, "lora": lora}
    given = {"apply": apply, "adapter": tmp_path / "adapter", "source": source}
    folder = save_adapter(edited, tmp_path / "edited", **given)
    after = np.asarray(jax.jit(adapted.apply)(edited, TOKENS))
    assert np.abs(after - before).max() > 0.1
    assert_same(after, torch_logits(source, folder))

"""Folders as they lie on the hub: other names, buffers beside weights, older files in the way."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

from jedit.models import load_model, load_stepper, save_model
from tests.conftest import ROOT
from tests.llm.random_folder import write_random

TOKENS = np.array([[3, 1, 4, 1, 5]])


def write_gpt2(folder, prefix="", dtype=np.float16):
    """A random GPT-2, in half precision, with the masks that old versions stored."""
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=6)
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (11, 8), "wpe.weight": (6, 8)}
    shapes |= {"ln_f.weight": (8,), "ln_f.bias": (8,)}
    layer = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32)}
    for name, shape in {**layer, "mlp.c_proj": (32, 8)}.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    for name in ("ln_1", "ln_2"):
        shapes |= {f"h.0.{name}.weight": (8,), f"h.0.{name}.bias": (8,)}
    tensors = {prefix + n: rng.normal(size=shape).astype(dtype) for n, shape in shapes.items()}
    tensors[prefix + "h.0.attn.bias"] = np.tri(6, dtype=np.uint8)[None, None]
    tensors[prefix + "h.0.attn.masked_bias"] = np.asarray(-1e4, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def test_masks_beside_the_weights_and_names_without_a_prefix(tmp_path):
    apply, params, _ = load_model(write_gpt2(tmp_path / "hub"))
    # Neither the mask nor its value says what the weights are.
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    other, same, _ = load_model(write_gpt2(tmp_path / "named", "transformer."))
    assert_array_equal(other(same, TOKENS), apply(params, TOKENS))
    cache = load_stepper(tmp_path / "hub").init(params, 1, 3)
    assert cache["layer_0"]["k"].dtype == jnp.float16
    saved = save_model(params, tmp_path / "saved", source=tmp_path / "hub")
    assert (saved / "model.safetensors").read_bytes() == (
        tmp_path / "hub" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(ValueError, match="7 tokens are more than the model's 6 positions"):
        apply(params, np.ones((1, 7), int))


def test_weights_that_are_no_floats(tmp_path):
    with pytest.raises(ValueError, match="is stored as int8, which is not supported"):
        load_model(write_gpt2(tmp_path / "int8", dtype=np.int8))


@pytest.mark.parametrize("place", ["nullcontext()", "jax.set_mesh(mesh)"])
def test_it_is_the_first_model_of_a_process(place, tmp_path):
    folder = write_gpt2(tmp_path / "hub")
    program = f"""
import contextlib, jax
from contextlib import nullcontext
from jedit.models import load_model
mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
with {place}:
    apply, params, _ = load_model({str(folder)!r}, mesh=mesh)
    print(apply(params, jax.numpy.ones((1, 3), int)).shape)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "(1, 3, 11)" in run.stdout


def test_an_older_folder_is_replaced_and_what_it_was_linked_to_stays(tmp_path):
    source = write_random("llama", tmp_path / "source")
    _, params, _ = load_model(source)
    before = (source / "model.safetensors").read_bytes()
    linked = tmp_path / "linked"
    linked.mkdir()
    os.link(source / "model.safetensors", linked / "model.safetensors")
    (linked / "model.safetensors.index.json").write_text("{}")  # of another folder
    save_model(jax.tree.map(lambda x: 2 * x, params), linked, source=source)
    assert (source / "model.safetensors").read_bytes() == before
    doubled = load_file(linked / "model.safetensors")
    for name, value in load_file(source / "model.safetensors").items():
        assert_array_equal(doubled[name], 2 * value)

"""Layers that the backward pass computes anew: the same numbers and sites, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from numpy.testing import assert_allclose

import jedit
from jedit.models import huggingface, load_model
from jedit.models.families.architecture import with_remat
from jedit.objectives import GA
from tests.llm.random_folder import COMMON, write_random
from tests.llm.test_hub_folders import write_gpt2

TOKENS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
WRITE = {
    "gpt2": lambda folder: write_gpt2(folder, dtype=np.float32),
    **{name: functools.partial(write_random, name) for name in ("qwen2", "qwen3_moe", "gemma2")},
}


@pytest.mark.parametrize("name", WRITE)
def test_the_same_numbers_and_sites(name, tmp_path):
    folder = WRITE[name](tmp_path / name)
    batch = jedit.Batch(jnp.asarray(TOKENS), jnp.asarray((TOKENS + 1) % 11))
    found = {}
    for remat in (False, True):
        apply, params, _ = load_model(folder, remat=remat)
        gradient = jax.jit(jax.grad(lambda p, apply=apply: GA()(apply, p, batch)[0]))(params)
        sites = jedit.find_sites(apply, params, batch.inputs)
        found[remat] = gradient, {(s.path, s.kind) for s in sites.values()}, sites.uncovered
    assert found[True][1:] == found[False][1:]
    for one, other in zip(*(jax.tree.leaves(found[r][0]) for r in (False, True)), strict=True):
        assert_allclose(other, one, rtol=2e-4, atol=1e-5 * float(jnp.max(jnp.abs(one))))


CONFIGS = {
    "llama": transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 8}),
    "olmo2": transformers.Olmo2Config(**{**COMMON, "num_hidden_layers": 8}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gradient_keeps_one_array_a_layer(name):
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def memory(change):
        kind = change(huggingface.family_of(CONFIGS[name], jnp.float32))
        apply, params = huggingface.pure_model(kind, huggingface.abstract_module(kind))
        # What `load_model` says of a CPU: the barriers that keep a layer from being computed early,
        # and kept, have to be there until that is decided.
        step = jax.jit(
            jax.grad(lambda params, tokens: jnp.sum(apply(params, tokens) ** 2)),
            compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
        )
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return step.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    # Attention's weights of a layer, (2, 4, 256, 256) in float32, are 2 MiB.
    assert memory(with_remat) < 0.5 * memory(lambda kind: kind)

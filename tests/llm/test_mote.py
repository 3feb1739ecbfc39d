"""MoTE on a Qwen 3 with experts as tunix has it: each expert is a site of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from tunix.models.qwen3 import model

from jedit.core.batch import Batch
from jedit.edits import apply_edit
from jedit.models import load_model
from jedit.steering import (
    Expert,
    expert_layers,
    expert_use,
    fold,
    steered,
    switch_experts,
)
from jedit.tracing.entering import Entering
from tests.llm.random_folder import write_random

pytestmark = pytest.mark.usefixtures("standard_promotion")
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


def used_by_the_layer_itself(apply, params, layer):
    """Tunix's own layer, each expert in turn the only one that answers: its answer over E_e(x)."""
    kernel = f"{layer}/router/kernel"
    x = Entering(kernel)(apply, params, TOKENS)
    leaves = params["layers"][layer.split("/")[1]]["mlp"]
    number, width, inner = leaves["gate_proj"].shape
    # Other sizes of a configuration are no matter of this layer.
    config = model.ModelConfig(
        num_layers=1, vocab_size=1, embed_dim=width, hidden_dim=inner, num_heads=1, head_dim=1,
        num_kv_heads=1, rope_theta=1, norm_eps=1e-6, num_experts=number, num_experts_per_tok=2,
    )  # fmt: skip
    module = model.MoELayer(config, rngs=nnx.Rngs(0))
    module.router.kernel[...] = leaves["router"]["kernel"]
    for name in ("gate_proj", "up_proj"):
        getattr(module, name)[...] = leaves[name]
    means = []
    for e in range(number):
        gate, up, down = (leaves[f"{name}_proj"][e] for name in ("gate", "up", "down"))
        module.down_proj[...] = jnp.zeros_like(leaves["down_proj"]).at[e].set(down)
        alone = np.asarray((jax.nn.silu(x @ gate) * (x @ up)) @ down)
        answer = np.asarray(module(x, use_megablox=False))
        means.append(((answer * alone).sum(-1) / (alone**2).sum(-1)).mean())
    return np.array(means)


def test_an_expert_that_is_switched_off_is_one_without_a_last_matrix(tmp_path):
    apply, params, *_ = load_model(write_random("qwen3_moe", tmp_path / "moe"))
    layers = expert_layers(apply, params, TOKENS, chosen=2)
    assert list(layers) == ["layers/0/mlp", "layers/1/mlp"]
    assert [site.experts for site in layers["layers/1/mlp"].down] == [(0,), (1,), (2,), (3,)]
    used = expert_use(apply, params, layers, Batch(TOKENS))
    for layer, part in used.items():
        assert_allclose(part, used_by_the_layer_itself(apply, params, layer), atol=1e-5)
    experts = [
        Expert("layers/0/mlp", 2),
        Expert("layers/1/mlp", int(np.argmax(used["layers/1/mlp"]))),
    ]
    steering = switch_experts(layers, experts)
    edited = apply_edit(params, fold(apply, params, TOKENS, steering))
    for layer, number in experts:
        matrix = edited["layers"][layer.split("/")[1]]["mlp"]["down_proj"]
        assert np.flatnonzero(~np.asarray(matrix != 0).any((1, 2))).tolist() == [number]
    got, plain = steered(apply, steering)(params, TOKENS), apply(params, TOKENS)
    scale = np.abs(np.asarray(plain)).max()
    assert np.abs(np.asarray(got - plain)).max() > 1e-2 * scale
    assert_allclose(got, apply(edited, TOKENS), atol=2e-5 * scale)

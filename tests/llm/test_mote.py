"""MoTE on a Qwen 3 with experts as tunix has it: each expert is a site of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

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
from tests.llm.random_folder import write_random

pytestmark = pytest.mark.usefixtures("standard_promotion")
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


def test_an_expert_that_is_switched_off_is_one_without_a_last_matrix(tmp_path):
    apply, params, *_ = load_model(write_random("qwen3_moe", tmp_path / "moe"))
    layers = expert_layers(apply, params, TOKENS, chosen=2)
    assert list(layers) == ["layers/0/mlp", "layers/1/mlp"]
    assert [site.experts for site in layers["layers/1/mlp"].down] == [(0,), (1,), (2,), (3,)]
    used = expert_use(apply, params, layers, Batch(TOKENS))
    for part in used.values():
        assert_allclose(part.sum(), 1, rtol=1e-5)
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

"""Attention weights of tunix's language models: grouped heads, rotary positions, scanned or not."""

import jax.numpy as jnp
import numpy as np
import pytest

from jedit.tracing import attention_weights, find_attention
from tests.llm.test_tunix import MODELS, SIZES, TOKENS, model

NAMES = [name for name in MODELS if "experts" not in name][:3]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_found_and_removing_a_token_removes_it(name):
    apply, params = model(*MODELS[name]("NONE"))
    found = find_attention(apply, params, TOKENS)
    assert (len(found), found.unseen) == (SIZES["num_layers"], ())
    run = attention_weights(apply, params, TOKENS)
    np.testing.assert_array_equal(run.outputs, apply(params, TOKENS))
    for one in found.values():
        weights = run.weights[one.name]
        assert np.prod(one.shape) == 2 * SIZES["num_heads"] * 5 * 5
        assert (weights.shape[one.queries], weights.shape[one.examples]) == (5, 2)
        np.testing.assert_allclose(np.sum(weights, axis=one.keys), 1, rtol=1e-5)
        # Causal: nothing lies above the diagonal of (queries, keys).
        square = np.moveaxis(np.asarray(weights), (one.queries, one.keys), (-2, -1))
        assert not np.any(np.triu(square, 1))

    def without_third(one):
        shape = [1] * len(one.shape)
        shape[one.keys] = 5
        kept = jnp.asarray([1, 1, 0, 1, 1], jnp.float32).reshape(shape)
        # Anew to a sum of one: what is left was divided by a sum that knew the third.
        return lambda p: p * kept / jnp.sum(p * kept, axis=one.keys, keepdims=True)

    replace = {one.name: without_third(one) for one in found.values()}
    other = np.array(TOKENS)
    other[:, 2] = (other[:, 2] + 1) % SIZES["vocab_size"]
    outputs = [
        attention_weights(apply, params, t, replace=replace).outputs for t in (TOKENS, other)
    ]
    # Nobody but the third position itself can tell which token stands there.
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(outputs[0][:, others], outputs[1][:, others], atol=1e-5)
    assert np.max(np.abs(outputs[0][:, 2] - outputs[1][:, 2])) > 1e-2

"""Packed rows through tunix's models: what each row's tokens see is the padded row's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from numpy.testing import assert_allclose

import jedit
from jedit.core.batch import Batch
from jedit.data import batches, pack
from jedit.metrics import answer_nll_per_row, nll, output_kl
from jedit.models import huggingface, to_pure
from jedit.models.families import architecture
from tests.llm.random_folder import COMMON
from tests.tracing.oracle import filled

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=3),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=6),
    "gemma": lambda: transformers.GemmaConfig(**{**COMMON, "num_key_value_heads": 1}, head_dim=6),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, head_dim=6, query_pre_attn_scalar=6, sliding_window=3
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=4),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    # The window is shorter than the rows; the sixth layer has none.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 6},
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=3,
    ),
}
SIZES = [3, 7, 1, 5, 2, 6]


def rows(vocab, width):
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, vocab, (2, len(SIZES), 7))
    tokens = jnp.asarray(np.pad(tokens, ((0, 0), (0, 0), (0, width - 7)), constant_values=1))
    valid = jnp.asarray(np.arange(width)[None] < np.asarray(SIZES)[:, None], jnp.float32)
    return Batch(tokens[0], tokens[1], None, valid)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_of_every_architecture(name):
    kind = architecture(CONFIGS[name](), jnp.float32)
    module = nnx.eval_shape(lambda: kind.model_class(kind.config, rngs=nnx.Rngs(0)))
    kind.finish(module)
    apply, shapes = to_pure(module, partial(huggingface._causal, kind.window, 0))
    apply = huggingface._by_the_usual_rules(apply)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), filled(shapes))
    padded = rows(37, 7)
    packing = pack(padded, 13)
    assert len(packing.batch.valid) == 2
    got = packing.unpack(jax.jit(apply)(params, packing.batch.inputs))
    want = jnp.where(padded.valid[..., None] > 0, jax.jit(apply)(params, padded.inputs), 0)
    assert_allclose(got, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))
    # These models see distances alone, so where a row starts could be lost and nothing seen of it.
    stretched = packing.batch.inputs._replace(positions=3 * packing.batch.inputs.positions)
    moved = packing.unpack(jax.jit(apply)(params, stretched))
    assert float(jnp.abs(moved - want)[:, 2:].max()) > 1e-3


def test_a_pretrained_model(stories_model, key):
    apply, params, _ = stories_model
    padded = rows(512, 9)
    packed = pack(padded, 13).batch
    other = jax.tree.map(lambda x: 0.98 * x, params)
    for metric in (
        lambda data: nll(apply, params, data),
        lambda data: output_kl(apply, params, other, data),
        lambda data: answer_nll_per_row(apply, params, data),
    ):
        want = metric(padded)
        assert_allclose(metric(packed), want, rtol=2e-5)
        assert_allclose(metric(batches(packed, 1)), want, rtol=2e-5)
    likelihood = jedit.likelihoods.Categorical()
    estimator = jedit.kfac(apply, likelihood, select="layers/1/.*_proj", fisher="empirical")
    first, second = (jedit.estimate(estimator, params, [b], key=key) for b in (padded, packed))
    for name in first.blocks:
        pairs = zip(jedit.factors(first, name), jedit.factors(second, name), strict=True)
        for want, got in pairs:
            assert_allclose(got, want, rtol=0, atol=5e-5 * float(jnp.abs(want).max()))

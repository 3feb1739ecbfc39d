"""Generation with tunix's cache against whole passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose, assert_array_equal

from jedit.models import cached_decode, greedy_decode, load_model, load_stepper
from tests.llm.random_folder import CONFIGS, write_random
from tests.llm.test_llama2c import BEGINNING

PROMPTS = np.array([[3, 1, 30, 7, 7, 21, 4], [9, 2, 0, 0, 0, 0, 0], [5, 36, 8, 12, 0, 0, 0]])
LENGTHS = np.array([7, 2, 4])


@functools.partial(jax.jit, static_argnums=0)
def stepwise_logits(stepper, params, tokens):
    """The logits of every position, each from one step."""

    def step(cache, xs):
        token, position = xs
        logits, cache = stepper.step(params, token, position, cache)
        return cache, logits

    batch, seq = tokens.shape
    positions = jnp.arange(seq, dtype=jnp.int32)
    _, logits = jax.lax.scan(step, stepper.init(params, batch, seq), (tokens.T, positions))
    return jnp.moveaxis(logits, 0, 1)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_cache_changes_nothing(name, tmp_path):
    folder = write_random(name, tmp_path / name)
    apply, params, _ = load_model(folder)
    stepper = load_stepper(folder)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 37, (2, 11)), jnp.int32)
    want = np.asarray(apply(params, tokens))
    got = np.asarray(stepwise_logits(stepper, params, tokens))
    assert got.dtype == np.float32
    # Sums of float32 in another order, up to six layers deep.
    assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())

    added = cached_decode(stepper, params, PROMPTS, 9, prompt_lengths=LENGTHS)
    assert_array_equal(added, greedy_decode(apply, params, PROMPTS, 9, prompt_lengths=LENGTHS))
    assert len(np.unique(added)) > 4, added  # else no cache would be needed


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision(name, tmp_path):
    folder = write_random(name, tmp_path / name)
    apply, params, _ = load_model(folder, dtype=jnp.bfloat16)
    stepper = load_stepper(folder, dtype=jnp.bfloat16)
    assert stepper.init(params, 1, 3)["layer_0"]["k"].dtype == jnp.bfloat16
    tokens = jnp.asarray(PROMPTS[:1], jnp.int32)
    want = np.asarray(apply(params, tokens))
    got = np.asarray(stepwise_logits(stepper, params, tokens))
    assert_allclose(got, want, rtol=0, atol=0.03 * np.abs(want).max())


def test_the_documented_story(stories_folder, stories_model):
    _, params, _ = stories_model
    added = cached_decode(load_stepper(stories_folder), params, np.array([[1]]), 60)
    tokenizer = tokenizers.Tokenizer.from_file(str(stories_folder / "tokenizer.json"))
    assert tokenizer.decode(np.asarray(added)[0].tolist()).startswith(BEGINNING)


def test_no_folder_of_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        load_stepper(tmp_path / "empty")

"""The mixture of experts against plain NumPy, token by token, and what tracing sees of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jedit.core.batch import Batch
from jedit.curvature import ekfac, estimate, factors, kfac, trace
from jedit.curvature.likelihoods import Categorical
from jedit.models import Experts, cached_decode, gpt, gpt_stepper, greedy_decode, routed
from jedit.tracing import capture
from tests.curvature.references import score_rows
from tests.models.test_models import numpy_gelu, numpy_gpt, numpy_tree, randomised
from tests.tracing.oracle import check_capture

SIZE = Experts(number=5, chosen=2, width=6)


def small(key, dtype=None, size=SIZE):
    """A GPT of two blocks of experts, no bias zero and no gain one."""
    apply, params = gpt(
        key=jax.random.fold_in(key, 0),
        vocab=11,
        width=8,
        num_layers=2,
        num_heads=2,
        max_len=7,
        mlp=size,
        dtype=jnp.zeros(()).dtype if dtype is None else dtype,
    )
    return apply, randomised(params, jax.random.fold_in(key, 1))


def numpy_mixture(mlp, h, chosen):
    """Each token by itself: its experts in turn, the likeliest first."""
    found = np.zeros_like(h)
    for t, row in enumerate(h):
        scores = row @ mlp["router"]["kernel"]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[:chosen]
        weights = np.exp(scores[best] - scores[best].max())
        for weight, e in zip(weights / weights.sum(), best, strict=True):
            found[t] += weight * (numpy_gelu(row @ mlp["up"][e]) @ mlp["down"][e])
    return found


def tokens_of(key, batch=3, seq=6):
    return jax.random.randint(key, (batch, seq), 0, 11)


def test_it_equals_numpy(key, tolerance):
    apply, params = small(key)
    tokens = tokens_of(jax.random.fold_in(key, 2))
    want = numpy_gpt(numpy_tree(params), tokens, 2, lambda m, h: numpy_mixture(m, h, 2))
    tolerance.check(jax.jit(apply)(params, tokens), want)


def test_with_one_expert_it_is_a_perceptron_without_biases(key, tolerance):
    apply, params = small(key, size=Experts(1, 1, 6))
    tokens = tokens_of(jax.random.fold_in(key, 2))
    by_hand = numpy_gpt(
        numpy_tree(params), tokens, 2, lambda m, h: numpy_gelu(h @ m["up"][0]) @ m["down"][0]
    )
    tolerance.check(apply(params, tokens), by_hand)


def test_weights_of_the_chosen_sum_to_one_and_of_equal_scores_the_first_is_taken():
    scores = jnp.asarray([[1.0, 3.0, 3.0, 3.0], [0.0, -1.0, 2.0, -5.0]])
    got = np.asarray(routed(scores, 2))
    assert_allclose(got[0], [0, 0.5, 0.5, 0])
    assert_allclose(got[1], [1 / (1 + np.exp(2)), 0, 1 / (1 + np.exp(-2)), 0], rtol=1e-6)
    assert routed(scores.astype(jnp.bfloat16), 3).dtype == jnp.bfloat16
    # Softmax over all, then the chosen ones divided by their sum: Qwen's order, the same number.
    whole = np.asarray(jax.nn.softmax(scores[1]))
    assert_allclose(got[1, 2], whole[2] / (whole[0] + whole[2]), rtol=1e-6)


def test_tokens_one_at_a_time_give_the_same_logits_and_the_same_words(key, tolerance):
    apply, params = small(key)
    stepper = gpt_stepper(num_layers=2, num_heads=2, mlp=SIZE)
    tokens = tokens_of(jax.random.fold_in(key, 2), 2, 4)
    cache, found = stepper.init(params, 2, 4), []
    for position in range(4):
        logits, cache = stepper.step(params, tokens[:, position], jnp.asarray(position), cache)
        found.append(logits)
    tolerance.check(jnp.stack(found, axis=1), apply(params, tokens))
    assert_array_equal(
        cached_decode(stepper, params, tokens, 3), greedy_decode(apply, params, tokens, 3)
    )


def test_every_parameter_is_seen_and_each_expert_is_a_layer_of_its_site(key):
    apply, params = small(key)
    tokens = tokens_of(jax.random.fold_in(key, 2))
    sites = check_capture(apply, params, tokens)
    assert not sites.uncovered
    for name, d_in, d_out in (("up", 8, 6), ("down", 6, 8)):
        weight = sites[f"blocks/1/mlp/{name}"].weight
        assert (weight.layers, weight.d_in, weight.d_out) == (5, d_in, d_out)
    _, activations, _ = capture(apply, params, tokens)
    # What enters an expert is zero for the tokens that were sent elsewhere.
    sent = np.any(np.asarray(activations["blocks/0/mlp/up"]) != 0, axis=-1)
    assert_array_equal(sent.sum(0), np.full((3, 6), SIZE.chosen))


def test_a_k_fac_block_is_short_of_the_share_of_tokens_that_its_expert_is_sent(key, tolerance):
    """Where an expert's tokens are all alike, K-FAC is exact but for that share; EK-FAC has it."""
    apply, params = small(key, size=Experts(3, 1, 4))
    # Words that differ more than the position they share, so that they go to several experts.
    params["embed"]["embedding"] = 10 * params["embed"]["embedding"]
    path = "blocks/0/mlp/up"
    words = jnp.arange(11)[:, None]
    _, activations, _ = capture(apply, params, words, path)
    sent = np.any(np.asarray(activations[path]) != 0, -1)[..., 0]
    expert = int(np.flatnonzero(sent.any(1))[0])
    first, other = (int(np.flatnonzero(x)[0]) for x in (sent[expert], ~sent[expert]))
    batch = Batch(jnp.asarray([[first], [other], [other], [other]]))
    found = estimate(
        kfac(apply, Categorical(), select=path, fisher="exact"), params, [batch], key=key
    )
    a, g = factors(found, path)

    def of_one(up, tokens):
        blocks = params["blocks"] | {
            "0": params["blocks"]["0"] | {"mlp": params["blocks"]["0"]["mlp"] | {"up": up}}
        }
        return apply(params | {"blocks": blocks}, tokens)

    up = params["blocks"]["0"]["mlp"]["up"]
    rows, number = score_rows(of_one, Categorical(), up, batch)
    exact = np.square(rows.reshape(len(rows), 3, 8, 4)[:, expert]).sum() / number
    share = 1 / 4
    tolerance.check(np.trace(a[expert]) * np.trace(g[expert]), share * exact, "contraction")
    scaled = estimate(ekfac(apply, Categorical(), found, fisher="exact"), params, [batch], key=key)
    tolerance.check(trace(scaled), np.square(rows).sum() / number, "contraction")


def test_bfloat16_stays_bfloat16(key):
    apply, params = small(key, jnp.bfloat16)
    outputs = jax.jit(apply)(params, tokens_of(jax.random.fold_in(key, 2)))
    assert outputs.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(outputs, np.float32)).all()


def test_impossible_mixtures_are_refused(key):
    with pytest.raises(ValueError, match="3 experts cannot be chosen of 2"):
        small(key, size=Experts(2, 3, 4))
    with pytest.raises(ValueError, match=r"experts\.width must be at least 1, got 0"):
        gpt_stepper(num_layers=1, num_heads=1, mlp=Experts(2, 1, 0))

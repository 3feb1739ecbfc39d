"""Refusal tokens against loops in NumPy: what is read off, what is decided, what is said then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.data import decode_answers, encode_rows, prompts_of, train_tokenizer
from jedit.models import cached_decode, gpt, gpt_stepper, greedy_decode
from jedit.steering import (
    RefusalTokens,
    add_refusal_tokens,
    begin_answers,
    mark_answers,
    refusal_probabilities,
    refuse_by_bias,
    refuse_by_category,
    refuse_by_sum,
)

TOKENS = RefusalTokens(("poem", "novel", "play"), (7, 5, 9), 3)
SIZES = {"num_layers": 1, "num_heads": 2}


def drawn(number=60):
    """Probabilities of three refusals, an answer, and all other words together."""
    rng = np.random.default_rng(1)
    return rng.dirichlet(np.full(5, 0.5), number)[:, :4]


def check(decision, expected):
    """Compare with a list of names of categories, None for an answer."""
    index = [-1 if name is None else TOKENS.categories.index(name) for name in expected]
    assert_array_equal(decision.categories, index)
    numbers = [TOKENS.respond if i < 0 else TOKENS.refuse[i] for i in index]
    assert_array_equal(decision.tokens, numbers)
    assert_array_equal(decision.refused, [name is not None for name in expected])


@pytest.mark.parametrize("thresholds", [{}, {"novel": 0.2}, {"play": 0.9, "poem": 0.05}])
def test_by_category_is_the_released_rule(thresholds):
    expected = []
    for row in drawn():
        by_name = dict(zip(TOKENS.categories, row[:3], strict=True))
        likeliest = max(by_name, key=lambda name: by_name[name])
        if likeliest in thresholds:
            refused = by_name[likeliest] >= thresholds[likeliest]
        else:
            refused = by_name[likeliest] > row[3]
        expected.append(likeliest if refused else None)
    assert 0 < sum(name is None for name in expected) < len(expected)
    check(refuse_by_category(jnp.asarray(drawn()), TOKENS, thresholds), expected)


def test_a_threshold_of_one_category_moves_no_question_that_another_would_refuse():
    probabilities = jnp.asarray(drawn())
    low, high = (
        refuse_by_category(probabilities, TOKENS, {"novel": t}).categories for t in (0.0, 1.0)
    )
    moved = np.asarray(low != high)
    assert moved.any()
    novel = np.argmax(drawn()[:, :3], axis=1) == TOKENS.categories.index("novel")
    assert_array_equal(moved, novel)


@pytest.mark.parametrize(
    ("threshold", "names"), [(0.4, None), (0.3, ["poem", "play"]), (0.0, None)]
)
def test_by_sum_is_one_switch_for_the_categories_named(threshold, names):
    expected = []
    for row in drawn():
        mine = {n: p for n, p in zip(TOKENS.categories, row[:3], strict=True)}
        mine = {n: p for n, p in mine.items() if names is None or n in names}
        refused = sum(mine.values()) >= threshold
        expected.append(max(mine, key=lambda n: mine[n]) if refused else None)
    check(refuse_by_sum(jnp.asarray(drawn()), TOKENS, threshold, categories=names), expected)


@pytest.mark.parametrize("biases", [{}, {"poem": 1.5, "play": -2.0}, {"novel": 30.0}])
def test_by_bias_is_the_likeliest_after_logits_are_raised(biases):
    expected = []
    for row in drawn():
        raised = [
            p * np.exp(biases.get(n, 0.0)) for n, p in zip(TOKENS.categories, row, strict=False)
        ]
        best = int(np.argmax(raised))
        expected.append(TOKENS.categories[best] if raised[best] > row[3] else None)
    check(refuse_by_bias(jnp.asarray(drawn()), TOKENS, biases), expected)


def test_with_one_category_a_bias_is_a_threshold_of_the_two_tokens():
    """b and 1 / (1 + e^b), on the probabilities of the two tokens alone."""
    one = RefusalTokens(("poem",), (7,), 3)
    pairs = drawn()[:, [0, 3]]
    among = pairs / pairs.sum(1, keepdims=True)
    for bias in (-1.7, 0.0, 0.8):
        by_bias = refuse_by_bias(jnp.asarray(pairs), one, {"poem": bias})
        by_threshold = refuse_by_category(jnp.asarray(among), one, {"poem": 1 / (1 + np.exp(bias))})
        assert_array_equal(by_bias.tokens, by_threshold.tokens)


def test_rules_run_under_jit():
    probabilities = jnp.asarray(drawn(), jnp.float32)
    found = jax.jit(lambda p: refuse_by_category(p, TOKENS, {"poem": 0.3}))(probabilities)
    assert_array_equal(
        found.tokens, refuse_by_category(probabilities, TOKENS, {"poem": 0.3}).tokens
    )


def small(key, vocab=11):
    return gpt(key=key, vocab=vocab, width=8, max_len=8, dtype=jnp.zeros(()).dtype, **SIZES)


def test_probabilities_are_the_softmax_behind_each_question(key, tolerance):
    apply, params = small(key)
    params["head"]["kernel"] = 5 * params["head"]["kernel"]
    prompts = jnp.asarray([[3, 1, 4], [5, 9, 0], [2, 0, 0]])
    lengths = np.array([3, 2, 1])
    got = refusal_probabilities(apply, params, TOKENS, prompts, lengths)
    for row, tokens, length in zip(got, prompts, lengths, strict=True):
        logits = np.asarray(apply(params, tokens[None, :length])[0, -1], np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        tolerance.check(row, p[[7, 5, 9, 3]])
    # What stands behind a question is not read.
    other = refusal_probabilities(apply, params, TOKENS, prompts.at[2, 1:].set(8), lengths)
    tolerance.check(other[2], got[2])


def test_no_rule_is_asked_about_a_model_that_is_destroyed_or_a_question_that_is_none(key):
    apply, params = small(key)
    prompts = jnp.asarray([[3, 1, 4], [5, 9, 0]])
    for lengths in ([0, 2], [3, 4]):
        with pytest.raises(ValueError, match="prompt_lengths must be from 1 to 3"):
            refusal_probabilities(apply, params, TOKENS, prompts, np.array(lengths))
    broken = jax.tree.map(lambda p: p * jnp.nan, params)
    with pytest.raises(FloatingPointError, match="outputs are no numbers"):
        refusal_probabilities(apply, broken, TOKENS, prompts, np.array([3, 2]))


def test_an_answer_goes_on_behind_the_token_that_was_decided(key):
    apply, params = small(key)
    prompts, lengths = jnp.asarray([[3, 1, 4], [5, 9, 0]]), np.array([3, 2])
    decision = refuse_by_category(jnp.asarray(drawn()[:2]), TOKENS, {"poem": 0.0, "play": 0.0})
    longer, ends = begin_answers(prompts, lengths, decision)
    got = cached_decode(gpt_stepper(**SIZES), params, longer, 3, prompt_lengths=ends)
    for i, length in enumerate(lengths):
        begun = [*np.asarray(prompts)[i, :length], int(decision.tokens[i])]
        assert_array_equal(greedy_decode(apply, params, jnp.asarray([begun]), 3)[0], got[i])


def test_the_tokens_are_the_first_of_an_answer_and_no_part_of_its_text():
    rows = [("Who wrote it?", "Nobody knows."), ("What is it?", "I cannot say.")]
    plain = train_tokenizer([" ".join(row) for row in rows], 300)
    tokenizer, tokens = add_refusal_tokens(plain, ["poem", "play"])
    assert plain.get_vocab_size() + 3 == tokenizer.get_vocab_size()
    assert tokens.categories == ("poem", "play")
    marked = mark_answers(rows, [None, "play"])
    assert marked[1] == ("What is it?", "[refuse: play] I cannot say.")
    batch = encode_rows(tokenizer, marked)
    prompts = prompts_of(batch)
    first = np.asarray(batch.targets)[np.arange(2), prompts.lengths - 1]
    assert_array_equal(first, [tokens.respond, tokens.refuse[1]])
    # The question has the tokens it had, and the answer's text comes back without the token.
    before = prompts_of(encode_rows(plain, rows))
    assert_array_equal(prompts.lengths, before.lengths)
    answers = np.where(np.asarray(batch.mask) > 0, np.asarray(batch.targets), 0)
    said = decode_answers(tokenizer, answers)  # padding is left out of texts as well
    assert said == ["Nobody knows.", "I cannot say."]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: refuse_by_category(p, TOKENS, {"essay": 0.1}), "names .'essay'., which have no"),
        (lambda p: refuse_by_category(p, TOKENS, {"poem": 1.1}), "thresholds must be from 0 to 1"),
        (lambda p: refuse_by_sum(p, TOKENS, 0.1, categories=["essay"]), "names .'essay'."),
        (lambda p: refuse_by_bias(p, TOKENS, {"poem": np.inf}), "biases must be a finite number"),
        (lambda _: mark_answers([("a", "b")], []), "one category per row, got 0 for 1"),
        (lambda _: add_refusal_tokens(None, ["poem", "poem"]), "must be different names"),
    ],
)
def test_mistakes_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(jnp.asarray(drawn()))

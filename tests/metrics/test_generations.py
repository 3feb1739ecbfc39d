"""Scores of texts and of answers to choose from: MUSE, multiple choice, fluency, CounterFact."""

import itertools

import jax
import jax.numpy as jnp
import nltk
import numpy as np
import pytest
import scipy.stats

from jedit import metrics
from jedit.metrics import AnswerLosses
from jedit.metrics.ngram_entropy import split_words
from tests.metrics.rows import apply, make_problem, numpy_rows, split


def longest_common(a, b):
    """The length of the longest common subsequence, by trying all of the shorter one's."""
    for length in range(min(len(a), len(b)), 0, -1):
        ofa, ofb = (set(itertools.combinations(x, length)) for x in (a, b))
        if ofa & ofb:
            return length
    return 0


TRUE = ["the cats sat on a mat", "born in Lima in 1950", "red"]
SAID = ["a cat sat on the mat", "He was born 1950 in Lima", "blue"]


def test_verbmem_is_the_mean_f1_of_words_as_they_stand():
    f1 = []
    for true, said in zip(TRUE, SAID, strict=True):
        true, said = true.lower().split(), said.lower().split()
        common = longest_common(true, said)
        f1.append(2 * common / (len(true) + len(said)))
    assert f1 == [6 / 12, 6 / 11, 0]  # sat on mat; born in Lima
    assert metrics.verbmem(TRUE, SAID) == pytest.approx(100 * np.mean(f1), rel=1e-12)
    assert metrics.verbmem(["cats"], ["cat"]) == 0  # with stems it would be 100


def test_knowmem_reads_an_answer_up_to_its_end():
    said = ["Paris\n\nRome", "Paris\nQuestion: and of Italy?", "Paris Question: x", "Paris\nRome"]
    for text, expected in zip(said, (100, 100, 100, 200 / 3), strict=True):
        assert metrics.knowmem(["Paris"], [text]) == pytest.approx(expected, rel=1e-12)
    assert metrics.knowmem(["Paris"], ["Paris; Rome"], stops=[";"]) == 100
    assert metrics.verbmem(["Paris"], ["Paris\n\nRome"]) == pytest.approx(200 / 3, rel=1e-12)
    for score in (metrics.verbmem, metrics.knowmem):
        with pytest.raises(ValueError, match="expected at least one text"):
            score([], [])
        with pytest.raises(ValueError, match="one generation per answer, got 1 for 2"):
            score(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="got a string; put it in a list"):
            score(["a"], "a")


def test_choices_by_hand():
    """The right option is the likeliest in one question, per token in another, a tie in a third."""
    summed = [[2.0, 3.0, 9.0], [4.0, 3.0, 5.0], [1.0, 1.0, np.inf]]
    tokens = [[1, 1, 1], [4, 1, 2], [1, 1, 1]]
    assert metrics.multiple_choice_accuracy(summed, [0, 0, 1]) == pytest.approx(1 / 3)
    assert metrics.normalized_choice_accuracy(summed, tokens, [0, 0, 1]) == pytest.approx(2 / 3)
    assert metrics.multiple_choice_accuracy(summed, jnp.array([0, 1, 0])) == 1
    assert metrics.normalized_choice_accuracy(summed, np.ones((3, 3)), [0, 1, 0]) == 1


def test_choices_from_a_model(tolerance):
    """Five questions of two options each, in one batch: their losses are those of `numpy_rows`."""
    params, data = make_problem(jax.random.key(4))
    data = jax.tree.map(lambda x: x[:10], data)
    rows = numpy_rows(params, data)
    losses = [-log_p[np.arange(len(y)), y].sum() for log_p, y in rows]
    lengths = np.array([len(y) for _, y in rows]).reshape(5, 2)
    found = metrics.answer_nll_sum_per_row(apply, params, split(data, 4)).reshape(5, 2)
    tolerance.check(found, np.reshape(losses, (5, 2)))
    is_second = [losses[2 * i + 1] < losses[2 * i] for i in range(5)]
    right = np.ones(5, int)
    assert metrics.multiple_choice_accuracy(found, right) == np.mean(is_second)
    per_token = np.reshape(losses, (5, 2)) / lengths
    expected = np.mean(per_token[:, 1] < per_token[:, 0])
    assert metrics.normalized_choice_accuracy(found, lengths, right) == expected


def test_bad_choices_get_a_sentence():
    good = np.zeros((2, 3))
    for losses, answers in ((np.zeros(2), [0, 0]), (good, [0]), (np.zeros((0, 3)), [])):
        with pytest.raises(ValueError, match=r"losses of shape \(n, k\) and answers of shape"):
            metrics.multiple_choice_accuracy(losses, answers)
    with pytest.raises(ValueError, match=r"answers must be from 0 to 2, got \[0, 3\]"):
        metrics.multiple_choice_accuracy(good, [0, 3])
    with pytest.raises(ValueError, match="answers must be indices of options, got float64"):
        metrics.multiple_choice_accuracy(good, [0.0, 1.0])
    with pytest.raises(ValueError, match="option_loss has 1 NaN"):
        metrics.multiple_choice_accuracy([[np.nan, 1.0]], [0])
    for lengths in (np.ones((2, 2)), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="lengths must be above 0 and of the losses' shape"):
            metrics.normalized_choice_accuracy(good, lengths, [0, 1])


def test_entropy_by_hand():
    # 2-grams ab, ba, ab: frequencies 2/3, 1/3; 3-grams aba, bab. One word repeated: nothing new.
    two = -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    found = metrics.ngram_entropy(["a b a b", "a a a a a", "a b", "a", ""])
    np.testing.assert_allclose(found, [(2 / 3 * two + 4 / 3) / 2, 0, 0, 0, 0], atol=1e-12)
    # All different: log2 of the number.
    text = " ".join("abcdefghi")
    expected = (2 / 3 * np.log2(8) + 4 / 3 * np.log2(7)) / 2
    np.testing.assert_allclose(metrics.ngram_entropy([text]), [expected], rtol=1e-12)
    assert metrics.ngram_entropy([]).shape == (0,)
    assert split_words("It's 1.5, naïve!") == ["It", "'", "s", "1", ".", "5", ",", "naïve", "!"]
    with pytest.raises(ValueError, match="got a string; put it in a list"):
        metrics.ngram_entropy("a b")


def test_entropy_is_that_of_nltk_and_scipy():
    text = "to be or not to be, that is the question: to be or not, said he, and said he not."

    def words(text):
        return nltk.word_tokenize(text, preserve_line=True)

    entropies = [
        scipy.stats.entropy(list(nltk.FreqDist(nltk.ngrams(words(text), m)).values()), base=2)
        for m in (2, 3)
    ]
    expected = np.mean(np.array([2 / 3, 4 / 3]) * entropies)
    found = metrics.ngram_entropy([text, "x"], words=words)
    np.testing.assert_allclose(found, [expected, 0], rtol=1e-12)


def p(*rows):
    """Losses of given probabilities."""
    return -np.log(np.array(rows))


def test_preferences_by_hand():
    scores = metrics.preference_scores(
        AnswerLosses(p(0.5, 0.1, 0.2, 0.9), p(0.1, 0.2, 0.2, 0.05)),
        AnswerLosses(p([0.6, 0.3], [0.1, 0.4]), p([0.2, 0.1], [0.4, 0.2])),
        AnswerLosses(p([0.1, 0.3, 0.2]), p([0.4, 0.1, 0.8])),
    )
    expected = {
        "efficacy_success": 2 / 4,  # the tie is none
        "efficacy_magnitude": (0.4 - 0.1 + 0.0 + 0.85) / 4,
        "paraphrase_success": 3 / 4,
        "paraphrase_magnitude": (0.4 + 0.2 - 0.3 + 0.2) / 4,
        "neighbourhood_success": 2 / 3,
        "neighbourhood_magnitude": (0.3 - 0.2 + 0.6) / 3,
        "score": 3 / (2 + 4 / 3 + 3 / 2),
    }
    found = scores._asdict()
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_record_weighs_one_however_many_its_prompts():
    new, old = p([0.6, np.nan], [0.1, 0.4]), p([0.2, np.nan], [0.4, 0.2])
    losses = AnswerLosses(new, old)
    scores = metrics.preference_scores(losses, losses, AnswerLosses(old, new))
    assert scores.efficacy_success == scores.neighbourhood_success == 0.75
    assert scores.paraphrase_magnitude == pytest.approx((0.4 + (-0.3 + 0.2) / 2) / 2, rel=1e-12)


def test_no_success_has_no_score():
    good, bad = AnswerLosses([0.1], [2.0]), AnswerLosses([2.0], [0.1])
    assert metrics.preference_scores(good, good, bad).score == 1
    assert metrics.preference_scores(good, good, good).score == 0


def test_accuracies_are_means_over_prompts():
    params, data = make_problem(jax.random.key(4))
    parts = [jax.tree.map(lambda x, s=s: x[s], data) for s in np.split(np.arange(11), (3, 7))]
    expected = [
        np.mean([np.mean(log_p.argmax(-1) == y) for log_p, y in numpy_rows(params, part)])
        for part in parts
    ]
    found = metrics.accuracy_scores(apply, params, *(list(split(part, 2)) for part in parts))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(expected)) == 3
    assert (
        found.neighbourhood_accuracy == metrics.exact_memorization(apply, params, parts[2]).mean()
    )
    with pytest.raises(ValueError, match="no output of paraphrase counts"):
        metrics.accuracy_scores(apply, params, parts[0], [], parts[2])


def test_bad_losses_get_a_sentence():
    good = AnswerLosses([0.1, 0.2], [0.3, 0.4])
    scalar = AnswerLosses(np.zeros(()), np.zeros(()))
    for bad in (AnswerLosses([0.1], [0.1, 0.2]), scalar, AnswerLosses([], [])):
        with pytest.raises(ValueError, match=r"paraphrase must have losses of one shape \(rec"):
            metrics.preference_scores(good, bad, good)
    for bad in (AnswerLosses([0.1, np.nan], [0.1, 0.2]), AnswerLosses([np.nan], [np.nan])):
        with pytest.raises(ValueError, match="neighbourhood must have NaN in the same places"):
            metrics.preference_scores(good, good, bad)

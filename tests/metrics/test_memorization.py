"""Exact memorization and extraction strength, by hand and against loops over prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.core.batch import Batch
from tests.metrics.rows import VOCAB, apply, make_problem, numpy_rows, split

BOTH = (metrics.exact_memorization, metrics.extraction_strength)


def from_hits(hits, mask=None):
    """A batch and params whose predictions are right (1) or wrong (0) as given."""
    inputs = jnp.asarray(hits, jnp.int32)
    targets = jnp.zeros_like(inputs)
    params = jnp.array([[0.0, 1.0], [1.0, 0.0]])  # input 1 predicts class 0, the target
    return params, Batch(inputs, targets, None if mask is None else jnp.asarray(mask))


def test_by_hand():
    params, data = from_hits([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    memorized = metrics.exact_memorization(apply, params, data)
    np.testing.assert_array_equal(memorized, [1, 1 / 2, 3 / 4, 0, 3 / 4])
    # Nothing extracted is 0, not the 1/4 of a loop that ends on its last k.
    strength = metrics.extraction_strength(apply, params, data)
    np.testing.assert_array_equal(strength, [1, 1 / 2, 0, 0, 1 / 2])


def test_an_answer_of_one_token_is_extracted_or_not():
    params, data = from_hits([[1], [0]])
    for metric in BOTH:
        np.testing.assert_array_equal(metric(apply, params, data), [1, 0])


def test_what_does_not_count_is_passed_over_wherever_it_stands():
    hits = [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]
    mask = [[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]
    params, data = from_hits(hits, mask)
    np.testing.assert_array_equal(metrics.exact_memorization(apply, params, data), [1, 2 / 3])
    np.testing.assert_array_equal(metrics.extraction_strength(apply, params, data), [1, 1 / 3])


def by_loops(params, data):
    """Both numbers row by row; the prefix is lengthened until the rest is predicted."""
    memorized, strength = [], []
    for log_p, targets in numpy_rows(params, data):
        predicted = log_p.argmax(-1)
        memorized.append(np.mean(predicted == targets))
        k = 0
        while k < len(targets) and not np.array_equal(predicted[k:], targets[k:]):
            k += 1
        strength.append(1 - k / len(targets))
    return np.array(memorized), np.array(strength)


@pytest.fixture
def problem():
    """Half of the targets are the model's own, so that runs of all lengths occur."""
    key = jax.random.key(3)
    params, data = make_problem(key)
    is_own = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.6, data.targets.shape)
    own = jnp.argmax(params, axis=-1)[data.inputs].astype(data.targets.dtype)
    return params, data._replace(targets=jnp.where(is_own, own, data.targets))


@pytest.mark.parametrize("size", [3, 4, 11])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 2), (1, 4)])
def test_values_are_those_of_loops_in_any_split_and_padding(problem, size, padding):
    params, data = problem
    expected = by_loops(params, data)
    assert 0 < np.mean(expected[1]) < np.mean(expected[0])
    batches = list(split(data, size, left=padding[0], right=padding[1]))
    for metric, values in zip(BOTH, expected, strict=True):
        np.testing.assert_allclose(metric(apply, params, batches), values, rtol=1e-12)


def test_accuracy_is_exact_memorization_weighed_by_length(problem):
    params, data = problem
    shares = metrics.exact_memorization(apply, params, data)
    lengths = np.asarray(data.mask).sum(1)
    accuracy = metrics.accuracy(apply, params, data)
    assert accuracy == pytest.approx(np.average(shares, weights=lengths), rel=1e-12)
    assert accuracy != pytest.approx(shares.mean(), rel=1e-3)


def test_greedy_decoding_from_the_prefix_is_what_strength_says(problem):
    """A table model's next token depends on the last one alone, so decoding it is a short loop."""
    params, _ = problem
    table = np.asarray(params)
    rng = np.random.default_rng(0)
    for _ in range(20):
        answer = [int(rng.integers(VOCAB))]
        while len(answer) < 6:
            is_own = rng.random() < 0.7
            answer.append(int(table[answer[-1]].argmax() if is_own else rng.integers(VOCAB)))
        batch = Batch(jnp.array([answer[:-1]]), jnp.array([answer[1:]]))
        (strength,) = metrics.extraction_strength(apply, params, batch)
        shortest = None
        for k in range(6):  # k given tokens of the five that are asked for
            text = answer[: k + 1]
            while len(text) < 6:
                text.append(int(table[text[-1]].argmax()))
            if text == answer:
                shortest = k
                break
        assert strength == pytest.approx(1 - shortest / 5, rel=1e-12)


def test_batches_of_one_shape_are_compiled_once(problem):
    params, data = problem
    num_traces = 0

    def counting(params, inputs):
        nonlocal num_traces
        num_traces += 1
        return params[inputs]

    for metric in BOTH:
        metric(counting, params, split(data, 3))
        metric(counting, params + 1, split(data, 3))
    assert num_traces == 3  # one for the number of classes


def test_summed_losses_are_the_mean_ones_times_the_tokens(problem, tolerance):
    params, data = problem
    sums = [-log_p[np.arange(len(y)), y].sum() for log_p, y in numpy_rows(params, data)]
    for size in (4, 11):
        tolerance.check(
            metrics.answer_nll_sum_per_row(apply, params, split(data, size)), np.array(sums)
        )


def test_without_targets_there_is_a_sentence(problem):
    params, data = problem
    for metric in BOTH:
        assert metric(apply, params, []).shape == (0,)
        with pytest.raises(ValueError, match=r"batch\.targets has shape None, expected one label"):
            metric(apply, params, data._replace(targets=None))

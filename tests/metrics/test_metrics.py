"""Metrics against NumPy on whole arrays, and against TOFU's own evaluation logs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit import metrics
from jedit.core.batch import Batch
from tests.metrics.rows import ROWS, SEQ, VOCAB, apply, make_problem, split


@pytest.fixture
def problem():
    k_params, k_other = jax.random.split(jax.random.key(5))
    (params, data), (other, _) = make_problem(k_params), make_problem(k_other)
    return params, other, data


def numpy_log_p(params, data):
    return scipy.special.log_softmax(np.asarray(params, np.float64)[np.asarray(data.inputs)], -1)


@pytest.mark.parametrize("size", [3, 4, 11])
def test_values_are_those_of_the_whole_set_in_any_split(problem, tolerance, size):
    params, other, data = problem
    log_p, log_q = numpy_log_p(params, data), numpy_log_p(other, data)
    mask, targets = np.asarray(data.mask), np.asarray(data.targets)
    picked = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    per_row = (picked * mask).sum(1) / mask.sum(1)
    expected = {
        "nll": picked[mask].mean(),
        "accuracy": (log_p.argmax(-1) == targets)[mask].mean(),
        "output_kl": kl[mask].mean(),
    }
    actual = {
        "nll": metrics.nll(apply, params, split(data, size)),
        "accuracy": metrics.accuracy(apply, params, split(data, size)),
        "output_kl": metrics.output_kl(apply, params, other, split(data, size)),
    }
    assert all(isinstance(value, float) for value in actual.values())
    tolerance.check(actual, expected)
    tolerance.check(metrics.answer_nll_per_row(apply, params, split(data, size)), per_row)


def test_one_batch_by_itself_is_taken_as_one(problem):
    params, other, data = problem
    assert metrics.nll(apply, params, data) == metrics.nll(apply, params, [data])
    assert metrics.output_kl(apply, params, other, data) > 0
    np.testing.assert_allclose(metrics.output_kl(apply, params, params, data), 0, atol=1e-9)


def test_a_classifier_is_judged_per_example(problem, tolerance):
    params, _, _ = problem
    data = Batch(jnp.array([0, 1, 2, 3]), jnp.argmax(params, axis=-1)[:4].at[1].add(1) % VOCAB)
    assert metrics.accuracy(apply, params, data) == 0.75
    assert metrics.accuracy(apply, params, data._replace(mask=jnp.array([1, 1, 0, 0]))) == 0.5
    rows = metrics.answer_nll_per_row(apply, params, data)
    tolerance.check(np.asarray(metrics.nll(apply, params, data)), rows.mean())


def test_batches_of_one_shape_are_compiled_once(problem):
    params, other, data = problem
    num_traces = 0

    def counting(params, inputs):
        nonlocal num_traces
        num_traces += 1
        return params[inputs]

    for model in (params, other):
        metrics.nll(counting, model, split(data, 3))
    assert num_traces == 2  # one for the number of classes
    for _ in range(2):
        metrics.output_kl(counting, params, other, split(data, 3))
    assert num_traces == 4  # the two models of one trace


def test_nothing_to_count_is_an_error(problem):
    params, _, data = problem
    for empty in ([], data._replace(mask=jnp.zeros((ROWS, SEQ)))):
        with pytest.raises(ValueError, match="no output counts"):
            metrics.nll(apply, params, empty)
    assert metrics.answer_nll_per_row(apply, params, []).shape == (0,)
    with pytest.raises(ValueError, match=r"batch\.targets has shape None"):
        metrics.accuracy(apply, params, data._replace(targets=None))


def test_truth_ratio_by_hand():
    ratio = metrics.truth_ratio(np.array([0.5, 2.0]), np.array([[1.0, 3.0], [2.0, 0.5]]))
    np.testing.assert_allclose(ratio, np.exp([-1.5, 0.75]), rtol=1e-12)
    for bad in (np.zeros((3, 2)), np.zeros(2), np.zeros((2, 0))):
        with pytest.raises(ValueError, match=r"\(n,\) and \(n, k\)"):
            metrics.truth_ratio(np.zeros(2), bad)


def test_forget_quality_by_hand():
    same = np.linspace(0.1, 1.0, 10)
    assert metrics.forget_quality(same, same) == 1.0
    # Two disjoint samples of n: of all ways to choose n out of 2n, two are as extreme.
    apart = metrics.forget_quality(same, same + 5)
    np.testing.assert_allclose(apart, 2 / scipy.special.comb(20, 10), rtol=1e-9)
    assert metrics.forget_quality(jnp.asarray(same), list(same[:7])) > 0.5
    for bad in (np.zeros(0), np.array([np.nan, 1.0]), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="retain_truth_ratio must be finite"):
            metrics.forget_quality(same, bad)


def test_tofu_golden_values(shared_data):
    folder = shared_data / "tofu_reference_eval"
    if not folder.is_dir():
        pytest.skip(f"needs TOFU's evaluation logs: {folder} is absent")
    ratios = {}
    for run in ("full", "retain90"):
        name = f"ft_epoch5_lr1e-05_llama2-7b_{run}_wd0.01.eval_log_aggregated.json"
        log = json.loads((folder / name).read_text())["eval_log_forget.json"]
        right, wrong = log["avg_paraphrased_loss"], log["average_perturb_loss"]
        assert list(right) == list(wrong)
        ratios[run] = metrics.truth_ratio(
            np.array(list(right.values())), np.array(list(wrong.values()))
        )
        assert ratios[run].shape == (300,)
    quality = metrics.forget_quality(ratios["full"], ratios["retain90"])
    np.testing.assert_allclose(quality, 1.834066410994743e-21, rtol=1e-9)

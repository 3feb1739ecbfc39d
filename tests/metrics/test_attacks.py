"""Attacks on a language model against loops in NumPy, and areas against scikit-learn's."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from jedit import metrics
from jedit.core.batch import Batch
from tests.metrics.rows import apply, make_problem, numpy_rows, split

SCORES = (metrics.min_k_scores, metrics.min_k_plus_plus_scores, metrics.gradient_norm_scores)


@pytest.fixture
def problem():
    return make_problem(jax.random.key(8))


def lowest(values, share):
    return np.mean(sorted(values)[: max(1, int(len(values) * share))])


@pytest.mark.parametrize("share", [0.4, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(("size", "padding"), [(11, (0, 0)), (4, (0, 2)), (3, (2, 1))])
def test_min_k_is_a_loop_over_rows(problem, tolerance, share, size, padding):
    params, data = problem
    plain, normalized = [], []
    for log_p, targets in numpy_rows(params, data):
        picked = log_p[np.arange(len(targets)), targets]
        mean = (np.exp(log_p) * log_p).sum(-1)
        variance = (np.exp(log_p) * log_p**2).sum(-1) - mean**2
        plain.append(-lowest(picked, share))
        normalized.append(-lowest((picked - mean) / np.sqrt(variance), share))
    batches = list(split(data, size, left=padding[0], right=padding[1]))
    found = metrics.min_k_scores(apply, params, batches, share=share)
    tolerance.check(found, np.array(plain))
    found = metrics.min_k_plus_plus_scores(apply, params, batches, share=share)
    tolerance.check(found, np.array(normalized))


def test_min_k_by_hand():
    """Of four tokens of probability 1/2, 1/4, 1/8 and 1: two at 0.5, one at 0.4 and at 0.2."""
    p = np.array([[[0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [1.0, 0.0]]])
    batch = Batch(jnp.arange(4)[None], jnp.zeros((1, 4), jnp.int32))
    params = jnp.log(jnp.asarray(p[0]))  # a table: input s has the distribution p_s
    log2 = np.log(2)
    for share, expected in ((0.5, 2.5 * log2), (0.4, 3 * log2), (0.2, 3 * log2), (1.0, 1.5 * log2)):
        found = metrics.min_k_scores(apply, params, batch, share=share)
        np.testing.assert_allclose(found, [expected], rtol=1e-6)
    # z of the third: (log 1/8 - μ) / σ, where 7/8 · 1/8 · (log 7)² is the variance of two values;
    # of the first: there log p does not vary, and neither does it where the model is certain.
    z = -(7 / 8 * np.log(7)) / np.sqrt(7 / 64 * np.log(7) ** 2)
    found = metrics.min_k_plus_plus_scores(apply, params, batch, share=0.2)
    np.testing.assert_allclose(found, [-z], rtol=1e-6)
    first = metrics.min_k_plus_plus_scores(apply, params, batch._replace(mask=jnp.eye(4)[:1]))
    np.testing.assert_allclose(first, [0], atol=1e-3)
    last = metrics.min_k_plus_plus_scores(apply, params, batch._replace(mask=jnp.eye(4)[3:]))
    np.testing.assert_allclose(last, [0], atol=1e-6)


def test_a_share_of_one_is_the_loss(problem, tolerance):
    params, data = problem
    found = metrics.min_k_scores(apply, params, data, share=1.0)
    tolerance.check(found, metrics.answer_nll_per_row(apply, params, data))


def test_arrays_by_hand():
    texts = ["a" * 200, "naïve, and not repeated much"]
    scores = metrics.zlib_scores([3.0, 4.0], texts)
    sizes = [len(zlib.compress(bytes(text, "utf-8"))) for text in texts]
    assert sizes[0] < sizes[1]
    np.testing.assert_allclose(scores, [3 / sizes[0], 4 / sizes[1]], rtol=1e-12)
    np.testing.assert_allclose(metrics.reference_scores([3.0, 1.0], [1.0, 2.5]), [2, -1.5])


def two_tensors(params, inputs):
    return params["table"][inputs] + params["bias"][None, None]


def expected_gradients(params, data):
    """Softmax less the label, row by row: the gradient of cross-entropy in a table of logits."""
    for (log_p, targets), inputs, mask in zip(
        numpy_rows(params, data), np.asarray(data.inputs), np.asarray(data.mask), strict=True
    ):
        residual = np.exp(log_p)
        residual[np.arange(len(targets)), targets] -= 1
        table = np.zeros(np.shape(params))
        np.add.at(table, inputs[mask], residual / len(targets))
        yield np.concatenate([table.ravel(), residual.mean(0)])


@pytest.mark.parametrize("order", [1.0, 2.0, np.inf])
@pytest.mark.parametrize(("size", "padding"), [(11, (0, 0)), (4, (1, 2))])
def test_gradient_norms_are_of_all_parameters_in_one(problem, tolerance, order, size, padding):
    table, data = problem
    expected = [np.linalg.norm(g, order) for g in expected_gradients(table, data)]
    params = {"table": table, "bias": jnp.zeros(table.shape[1], table.dtype)}
    batches = list(split(data, size, left=padding[0], right=padding[1]))
    found = metrics.gradient_norm_scores(two_tensors, params, batches, order=float(order))
    tolerance.check(found, np.array(expected))


def test_gradient_norms_of_narrow_parameters_are_summed_in_wide_ones(problem):
    table, data = problem
    params = {"table": table, "bias": jnp.zeros(table.shape[1], table.dtype)}
    wide = metrics.gradient_norm_scores(two_tensors, params, data)
    narrow_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow = metrics.gradient_norm_scores(two_tensors, narrow_params, data)
    np.testing.assert_allclose(narrow, wide, rtol=0.05)


def test_rows_that_count_nothing_are_left_out(problem):
    params, data = problem
    mask = data.mask.at[2].set(False)
    kept = np.delete(np.arange(len(mask)), 2)
    for score in SCORES:
        some = score(apply, params, data._replace(mask=mask))
        np.testing.assert_array_equal(some, score(apply, params, data)[kept])
        assert score(apply, params, []).shape == (0,)


def test_batches_of_one_shape_are_compiled_once(problem):
    params, data = problem
    num_traces = 0

    def counting(params, inputs):
        nonlocal num_traces
        num_traces += 1
        return params[inputs]

    for count, score in enumerate(SCORES, 1):
        for model in (params, params + 1):
            score(counting, model, split(data, 3))
        assert num_traces == 1 + count  # one for the number of classes


def test_areas_by_hand():
    # Of six pairs: 1 below both of 2 and 3, 2 ties and is below 3, 4 is below none.
    assert metrics.membership_auc([1.0, 2.0, 4.0], [3.0, 2.0]) == pytest.approx(3.5 / 6, rel=1e-12)
    assert metrics.membership_auc([-np.inf, 0.0], [1.0, np.inf]) == 1
    assert metrics.membership_auc([2.0, 3.0], [1.0]) == 0
    assert metrics.membership_auc([1.0, 1.0], [1.0, 1.0, 1.0]) == 0.5


@pytest.mark.parametrize("sizes", [(20, 30), (41, 7)])
def test_areas_are_those_of_scikit_learn(sizes):
    rng = np.random.default_rng(0)
    forget = rng.integers(0, 12, sizes[0]) / 2
    holdout = rng.integers(3, 15, sizes[1]) / 2  # with ties, within and between
    labels = np.repeat([0, 1], sizes)
    expected = sklearn.metrics.roc_auc_score(labels, np.concatenate([forget, holdout]))
    assert metrics.membership_auc(forget, holdout) == pytest.approx(expected, rel=1e-12)
    assert 0.5 < expected < 1


def test_privleak_by_hand():
    # MUSE's own: (AUC - AUC_retrain) / AUC_retrain in percent, its AUC being one less ours.
    assert metrics.privleak(0.6, 0.5) == pytest.approx(100 * (0.4 - 0.5) / 0.5, rel=1e-12)
    assert metrics.privleak(1.0, 0.5228) == -100  # untouched, against MUSE News' retrained model
    assert metrics.privleak(0.0, 0.5228) == pytest.approx(100 * 0.5228 / 0.4772, rel=1e-12)
    assert metrics.privleak(0.53, 0.53) == 0


def test_bad_input_gets_a_sentence(problem):
    params, data = problem
    for share in (0.0, 1.5, np.nan):
        for score in SCORES[:2]:
            with pytest.raises(
                ValueError, match="share must be (above 0 and at most 1|a finite number), got"
            ):
                score(apply, params, data, share=share)
    with pytest.raises(ValueError, match=r"order must be 1, 2 or infinity, got 3\.0"):
        metrics.gradient_norm_scores(apply, params, data, order=3.0)
    for score in SCORES:
        with pytest.raises(ValueError, match=r"batch\.targets has shape None"):
            score(apply, params, data._replace(targets=None))
    with pytest.raises(ValueError, match=r"list of n texts, got \(2,\) and 1 texts"):
        metrics.zlib_scores([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="and a string"):
        metrics.zlib_scores([1.0, 2.0], "ab")
    with pytest.raises(ValueError, match=r"two losses of one shape \(n,\), got \(2,\) and \(1,\)"):
        metrics.reference_scores([1.0, 2.0], [1.0])
    for bad in ([], [[0.5]], [np.nan]):
        with pytest.raises(ValueError, match="holdout must be numbers of shape"):
            metrics.membership_auc([1.0], bad)
    with pytest.raises(ValueError, match=r"auc must be from 0 to 1, got 1\.5"):
        metrics.privleak(1.5, 0.5)
    with pytest.raises(ValueError, match="retrained_auc must be below 1"):
        metrics.privleak(0.5, 1.0)

"""Open-unlearning's definitions, row by row in NumPy as its documentation and code state them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedit import metrics
from jedit.metrics import open_unlearning
from tests.metrics.rows import apply, make_problem, numpy_rows, split


def by_loops(params, data, share=0.4):
    """Memorization, extraction and both Min-K of the rows without their last token."""
    found = []
    for log_p, targets in numpy_rows(params, data):
        log_p, targets = log_p[:-1], targets[:-1]
        n = len(targets)
        if n == 0:
            found.append((np.nan, 0, 0, 0))
            continue
        hits = log_p.argmax(-1) == targets
        for k in range(n):
            if hits[k:].all():
                break
        picked = log_p[np.arange(n), targets]
        mean = (np.exp(log_p) * log_p).sum(-1)
        variance = (np.exp(log_p) * log_p**2).sum(-1) - mean**2
        z = (picked - mean) / np.sqrt(np.maximum(variance, 1e-6))
        number = max(1, int(n * share))
        lowest = [-np.mean(sorted(x)[:number]) for x in (picked, z)]
        found.append((hits.mean(), 1 - k / n, *lowest))
    return np.array(found).T


@pytest.fixture
def problem():
    """Half of the targets are the model's own; some rows have one token."""
    key = jax.random.key(3)
    params, data = make_problem(key)
    is_own = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.6, data.targets.shape)
    own = jnp.argmax(params, axis=-1)[data.inputs].astype(data.targets.dtype)
    return params, data._replace(targets=jnp.where(is_own, own, data.targets))


def test_token_scores_are_those_of_loops(problem):
    params, data = problem
    lengths = np.asarray(data.mask).sum(1)
    assert 1 in lengths
    expected = by_loops(params, data)
    assert np.isnan(expected[0]).sum() == (lengths == 1).sum()
    # Its loop never says that nothing comes: where jedit's is 0, the strength is 1/T.
    assert np.any(expected[1][lengths > 1] == 1 / (lengths[lengths > 1] - 1))
    found = open_unlearning.token_scores(apply, params, split(data, 4, left=1, right=2))
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-6)
    theirs, ours = found.min_k[lengths > 2], metrics.min_k_scores(apply, params, data)[lengths > 2]
    assert not np.allclose(theirs, ours)


def test_gradient_norms_are_a_mean_over_tensors_without_the_last_token(problem):
    table, data = problem
    params = {"table": table, "bias": jnp.linspace(0, 1, table.shape[1], dtype=table.dtype)}
    two = lambda p, x: p["table"][x] + p["bias"][None, None]  # noqa: E731

    @jax.jit
    def loss(p, inputs, targets, mask):
        log_p = jax.nn.log_softmax(two(p, inputs[None])[0])
        picked = jnp.take_along_axis(log_p, targets[:, None], -1)[:, 0]
        return -jnp.mean(picked, where=mask)

    expected, gradient = [], jax.jit(jax.grad(loss))
    for inputs, targets, mask in zip(*map(np.asarray, data[:3]), strict=True):
        kept = mask & (np.cumsum(mask) < mask.sum())
        leaves = jax.tree.leaves(gradient(params, inputs, targets, kept))
        norms = [np.linalg.norm(leaf) for leaf in leaves]
        expected.append(np.mean(norms) if kept.any() else np.nan)  # a mean over no tokens
    assert np.isnan(expected).any()
    found = open_unlearning.gradient_norms(two, params, split(data, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    whole = metrics.gradient_norm_scores(two, params, data)
    assert not np.allclose(found[~np.isnan(found)], whole[~np.isnan(found)])


def test_ratios_and_shares_have_a_small_number_below():
    loss = np.array([1.0, 30.0])
    wrong = np.array([[2.0, 0.5], [29.0, 33.0]])
    p, q = np.exp(-loss), np.exp(-wrong)
    expected = np.exp(-wrong.mean(1)) / (p + 1e-10)
    np.testing.assert_allclose(open_unlearning.truth_ratio(loss, wrong), expected)
    share = p / (p + q.sum(1) + 1e-10)
    np.testing.assert_allclose(open_unlearning.normalized_probability(loss, wrong), share)
    # jedit's have none, so that an answer that has become unlikely is ranked all the same.
    assert metrics.truth_ratio(loss, wrong)[1] > 0.3 > 1e-2 > expected[1]
    values = np.array([0.0, 0.5, 4.0])
    assert open_unlearning.forget_truth_ratio(values) == pytest.approx((0 + 0.5 + 0.25) / 3)
    assert open_unlearning.privleak(0.9, 0.4) == pytest.approx(100 * (0.1 - 0.6) / 0.6)
    assert open_unlearning.privleak(0.5, 1.0) == pytest.approx(100 * 0.5 / 1e-10)


def test_without_targets_there_is_a_sentence(problem):
    params, data = problem
    for metric in (open_unlearning.token_scores, open_unlearning.gradient_norms):
        assert np.size(metric(apply, params, [])) == 0
        with pytest.raises(ValueError, match=r"batch\.targets has shape None, expected one label"):
            metric(apply, params, data._replace(targets=None))

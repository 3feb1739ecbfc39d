"""Membership scores and attack, and the scores of unlearning, against NumPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jedit import metrics
from jedit.core.batch import Batch
from jedit.metrics import UnlearningScores

KINDS = ("confidence", "entropy", "modified_entropy", "correctness")


def identity(params, inputs):
    return params * inputs


def scores(logits, targets, kind, **counted):
    batch = Batch(jnp.asarray(logits), jnp.asarray(targets), **counted)
    return metrics.membership_scores(identity, jnp.ones((), batch.inputs.dtype), batch, kind=kind)


def numpy_scores(logits, targets, kind):
    """Row by row and class by class, by the formula; 1 - p as the sum of the other p."""
    found = []
    for row, y in zip(np.asarray(logits, np.float64), targets, strict=True):
        p = scipy.special.softmax(row)
        if kind == "confidence":
            found.append(p[y])
        elif kind == "correctness":
            found.append(float(np.all(p <= p[y])))
        elif kind == "entropy":
            found.append(scipy.special.entr(p).sum())
        else:
            rest = [np.delete(p, i).sum() for i in range(len(p))]
            terms = [
                rest[i] * np.log(p[i]) if i == y else p[i] * np.log(rest[i]) for i in range(len(p))
            ]
            found.append(-np.sum(terms))
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_scores_are_the_formulas(key, kind, scale, tolerance):
    k_logits, k_targets = jax.random.split(key)
    logits = scale * jax.random.normal(k_logits, (40, 6))
    targets = np.asarray(jax.random.randint(k_targets, (40,), 0, 6))
    tolerance.check(scores(logits, targets, kind), numpy_scores(logits, targets, kind))


def test_scores_by_hand():
    """p = (1/2, 1/4, 1/4), the label first likely, then not."""
    logits = np.log(np.array([[2.0, 1.0, 1.0]] * 2)).astype(np.float32)
    log2, log3 = np.log(2), np.log(3)
    expected = {
        "confidence": [0.5, 0.25],
        "entropy": [1.5 * log2] * 2,
        "correctness": [1, 0],
        # 1/2 log 2 - 2 · 1/4 log(3/4), and 3/4 log 4 - 1/2 log(1/2) - 1/4 log(3/4).
        "modified_entropy": [1.5 * log2 - 0.5 * log3, 2.5 * log2 - 0.25 * log3],
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(scores(logits, [0, 2], kind), values, rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize("margin", [30.0, 200.0, np.inf])
def test_a_certain_answer_gives_numbers(margin):
    """exp(-30) and less: in float32 1 - p is nothing, and log(1 - p) still is."""
    logits = np.array([[0.0, -margin, -margin]] * 2, np.float32)
    right, wrong = scores(logits, [0, 1], "modified_entropy")
    assert right == pytest.approx(0, abs=1e-11)
    # -(1 - p_1) log p_1 - p_0 log(1 - p_0): the margin, twice, less log 2.
    assert wrong == pytest.approx(2 * margin - np.log(2), rel=1e-6)
    assert scores(logits, [0, 1], "entropy") == pytest.approx([0, 0], abs=1e-10)
    assert scores(logits, [0, 1], "confidence") == pytest.approx([1, 0], abs=1e-12)


def test_only_what_counts_is_scored_and_in_order(key):
    logits = jax.random.normal(key, (5, 3))
    targets = np.array([0, 2, -100, 1, 2])
    valid = jnp.array([1, 1, 0, 1, 1])
    some = scores(logits, targets, "confidence", valid=valid)
    chosen = np.flatnonzero(valid)
    np.testing.assert_array_equal(some, scores(logits[chosen], targets[chosen], "confidence"))
    parts = [Batch(logits[i : i + 2], jnp.asarray(targets[i : i + 2])) for i in (0, 3)]
    split = metrics.membership_scores(identity, jnp.ones((), logits.dtype), parts)
    np.testing.assert_array_equal(split, some)
    with pytest.raises(ValueError, match="kind must be one of confidence, entropy, mod"):
        scores(logits, targets, "loss")


def test_an_attack_by_hand():
    """Members at 3, 5, 8 and non-members at 1, 2, 4, 6."""
    sets = [3, 8, 5], [6, 1, 4, 2], [2.9, 3, 3, 10, -np.inf]
    # The best is 3, with 3/3 and 2/4 right.
    best = metrics.MembershipAttack(2 / 5, 3.0, 0.75)
    assert metrics.membership_attack(*sets, rule="best") == best
    # The means are 16/3 and 13/4: 2/3 and 3/4 are on their sides of the middle.
    middle = metrics.membership_attack(*sets)
    assert middle == pytest.approx((4 / 5, (16 / 3 + 13 / 4) / 2, (2 / 3 + 3 / 4) / 2), rel=1e-12)


def test_an_attack_on_what_cannot_be_told_apart_is_chance():
    same = np.linspace(0, 1, 7)
    attack = metrics.membership_attack(same, same, [0.5, 2.0], rule="best")
    assert attack == metrics.MembershipAttack(0.0, 0.0, 0.5)  # the lowest: all are members
    assert metrics.membership_attack(same, same, [0.4, 2.0])[:2] == pytest.approx((0.5, 0.5))
    assert metrics.membership_attack([1.0], [1.0], [0.5]).efficacy == 1.0


@pytest.mark.parametrize("sizes", [(50, 50), (200, 30)])
def test_no_threshold_is_better(key, sizes):
    keys = jax.random.split(key, 3)
    members, others, forget = (
        np.asarray(shift + jax.random.normal(k, (n,)), np.float64)
        for k, n, shift in zip(keys, (*sizes, 70), (1.0, 0.0, 0.5), strict=True)
    )
    attack = metrics.membership_attack(members, others, forget, rule="best")

    def balanced(threshold):
        return (np.mean(members >= threshold) + np.mean(others < threshold)) / 2

    assert attack.balanced_accuracy == pytest.approx(balanced(attack.threshold), rel=1e-12)
    tried = [balanced(t) for t in np.linspace(-4, 5, 5_000)]
    assert attack.balanced_accuracy >= max(tried)
    assert attack.efficacy == np.mean(forget < attack.threshold)


def test_bad_scores_get_a_sentence():
    for bad in (np.zeros(0), np.zeros((2, 2)), np.array([0.1, np.nan])):
        with pytest.raises(ValueError, match="nonmembers must be numbers of shape"):
            metrics.membership_attack([1.0], bad, [1.0])
    with pytest.raises(ValueError, match="rule must be one of midpoint, best, got 'worst'"):
        metrics.membership_attack([1.0], [1.0], [1.0], rule="worst")


def test_gaps_by_hand():
    retrained = UnlearningScores(0.06, 1.0, 0.94, 0.13)
    scores = UnlearningScores(0.01, 0.99, 0.96, 0.05)
    # 5, 1, 2 and 8 points.
    assert metrics.average_gap(scores, retrained) == pytest.approx(4.0)
    assert metrics.tug_of_war(scores, retrained) == pytest.approx(0.95 * 0.99 * 0.98)
    assert metrics.average_gap(retrained, retrained) == 0
    assert metrics.tug_of_war(retrained, retrained) == 1

"""Stability: worked by hand, and windows by going through all pairs."""

import itertools

import numpy as np
import pytest

from jedit import metrics

# Two tasks over four measurements: one dips and recovers, one falls slowly.
SCORES = np.array([[1.0, 0.9], [0.4, 0.8], [1.0, 0.7], [0.9, 0.6]])


def test_the_worst_moment_counts_and_not_the_first():
    assert metrics.minimum_accuracy(SCORES) == pytest.approx((0.4 + 0.6) / 2)
    # The value before the first request is no step.
    assert metrics.minimum_accuracy([[0.1], [0.5], [0.7]]) == pytest.approx(0.5)


def test_the_newest_request_weighs_as_one_task():
    assert metrics.worst_case_accuracy(SCORES, 0.8) == pytest.approx(0.8 / 3 + 2 / 3 * 0.5)


@pytest.mark.parametrize("window", [2, 3, 4, 9])
def test_windows_by_all_pairs(window):
    scores = np.random.default_rng(0).random((7, 3))
    falls = [
        max(
            scores[t, i] - scores[u, i]
            for t, u in itertools.combinations(range(7), 2)
            if u - t < window
        )
        for i in range(3)
    ]
    assert metrics.windowed_forgetting(scores, window) == pytest.approx(np.mean(falls))


def test_a_wider_window_sees_a_slow_fall():
    assert metrics.windowed_forgetting(SCORES, 2) == pytest.approx((0.6 + 0.1) / 2)
    assert metrics.windowed_forgetting(SCORES, 4) == pytest.approx((0.6 + 0.3) / 2)
    assert metrics.windowed_forgetting([[0.1], [0.2], [0.3]], 2) == 0


def test_tasks_that_are_learnt_in_turn_count_from_when_they_were_learnt():
    """Against De Lange et al.'s released bookkeeping: a minimum and a window kept step by step."""
    rng = np.random.default_rng(1)
    scores = rng.random((13, 3))
    begun, learnt, window = [0, 4, 8], [4, 8, 12], 3
    lowest, falls, rises = {}, [0.0] * 3, [0.0] * 3
    windows = [[], [], []]
    for t, row in enumerate(scores):
        now = max(i for i in range(3) if begun[i] < t or not i)  # the task that is being learnt
        for i in range(3):
            if t < begun[i]:
                continue
            if i < now:
                lowest[i] = min(lowest.get(i, np.inf), row[i])
            windows[i] = [*windows[i], row[i]][-window:]
            pairs = list(itertools.combinations(windows[i], 2))
            falls[i] = max([falls[i], *(a - b for a, b in pairs)])
            rises[i] = max([rises[i], *(b - a for a, b in pairs)])
    assert sorted(lowest) == [0, 1]
    minimum = np.mean(list(lowest.values()))
    assert metrics.minimum_accuracy(scores, learnt) == pytest.approx(minimum)
    assert metrics.worst_case_accuracy(scores, scores[-1, 2], learnt) == pytest.approx(
        np.mean([scores[-1, 2], *lowest.values()])
    )
    assert metrics.windowed_forgetting(scores, window, begun) == pytest.approx(np.mean(falls))
    assert metrics.windowed_plasticity(scores, window, begun) == pytest.approx(np.mean(rises))


def test_rows_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"learnt must be one row .* from 0 to 3; got \[0, 4\]"):
        metrics.minimum_accuracy(SCORES, [0, 4])
    with pytest.raises(ValueError, match="begun must be one row"):
        metrics.windowed_forgetting(SCORES, 2, [0.5, 1.0])
    with pytest.raises(ValueError, match="no task was learnt before the last row, 3"):
        metrics.minimum_accuracy(SCORES, [3, 3])


def test_forgetting_and_keeping_are_one_score_seen_from_two_sides():
    before, after = [0.8, 0.4], [0.1, 0.2]
    assert metrics.retained_utility(before, after) == pytest.approx(0.25)
    assert metrics.forget_degree(before, after) == pytest.approx(0.75)
    assert metrics.forget_degree(before, before) == 0


def test_fits_scores_are_nearness_to_the_retrained_model():
    """As the paper has them; ours go by the model before, and do not mind too much forgetting."""
    retrained = (0.2, 0.4, 0.1)  # their geometric mean is 0.2
    assert metrics.fit_forget_degree((0.2, 0.4, 0.1), retrained) == pytest.approx(1)
    assert metrics.fit_forget_degree((0.1, 0.4, 0.025), retrained) == pytest.approx(0.5)
    assert metrics.fit_forget_degree((0.3, 0.6, 0.15), retrained) == pytest.approx(0.5)
    assert metrics.fit_forget_degree((0.9, 0.9, 0.9), retrained) == 0
    assert metrics.fit_forget_degree((0.0, 0.0, 0.0), retrained) == 0
    assert metrics.fit_retain_utility((0.72, 0.9, 0.8), (0.9, 0.9, 1.0)) == pytest.approx(
        (0.72 * 0.8 / 0.9) ** (1 / 3)
    )
    for bad in ((0.1, 0.2), (0.1, 0.2, 1.2), (0.1, 0.2, np.nan)):
        with pytest.raises(ValueError, match="expected probability, ROUGE and accuracy"):
            metrics.fit_forget_degree(bad, retrained)
    with pytest.raises(ValueError, match="relative to it"):
        metrics.fit_retain_utility(retrained, (0.1, 0.0, 0.1))


@pytest.mark.parametrize("scores", [[0.5, 0.4], [[0.5]], [[], []], [[0.5], [np.nan]]])
def test_scores_without_a_step_or_a_task_are_refused(scores):
    with pytest.raises(ValueError, match="steps"):
        metrics.minimum_accuracy(scores)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        metrics.windowed_forgetting(SCORES, 1)
    for before, after in (([1.0], [1.0, 0.5]), ([], []), ([0.0], [0.5])):
        with pytest.raises(ValueError, match="same rows"):
            metrics.forget_degree(before, after)

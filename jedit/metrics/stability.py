"""How well what is kept lasts while request after request is answered, or task after task learnt.

Of a_ti, the accuracy (or any score where more is better) on kept task i after request or update t,
t = 0 before the first one:

    min-ACC   mean_i min_{t>e_i} a_ti                      `minimum_accuracy`
    WC-ACC    1/k b + (1 - 1/k) min-ACC                    `worst_case_accuracy`
    WF^w      mean_i max_{t<u<t+w} (a_ti - a_ui)           `windowed_forgetting`; lower is better
    WP^w      mean_i max_{t<u<t+w} (a_ui - a_ti)           `windowed_plasticity`

e_i is when task i was learnt: 0, if it was there from the beginning (`learnt`); windows begin no
earlier than s_i, when it was begun (`begun`).  b is the score on the newest task, for requests how
well the newest one is forgotten, and k counts it with the kept ones.  They look at every step: an
average at the end hides a gap that has closed again.  De Lange et al. (arXiv 2205.13452); their
released code agrees with these formulas [code].

Against the model before, ours, with one and the same score s (a probability, an accuracy, ROUGE):

    forgotten share = 1 - s(forgotten, now) / s(forgotten, before)    `forget_degree`
    retained share  =     s(kept, now) / s(kept, before)              `retained_utility`

Against a *retrained* model, FIT's F.D. and R.U. (arXiv 2601.21682):

    F.D. = max(0, 1 - |F / F* - 1|)      `fit_forget_degree`
    R.U. = max(0, 1 - |R / R* - 1|)      `fit_retain_utility`

F and R the geometric means of probability, ROUGE and accuracy on the forgotten and the kept rows,
F* and R* the retrained model's.  1 is best for all four.  To forget more than the retrained model
makes our forgotten share larger and FIT's F.D. smaller.

Differences. De Lange et al. measure tasks that are learnt one after the other; where requests are
answered, kept tasks are all there from the beginning and none of e_i and s_i is given.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jedit.core.checks import FINITE, Range, check_numbers


def minimum_accuracy(scores: ArrayLike, learnt: ArrayLike | None = None) -> float:
    """Return min-ACC, the mean over the tasks of the lowest score after any request or update.

    Args:
        scores: one score for each task after each request or update, (steps + 1, tasks), the first
            row before any.
        learnt: (tasks,), the row at which a task was learnt; only later ones count, and a task that
            has none, as the newest, is left out. None: 0 for all.

    Raises:
        ValueError: another number of axes, fewer than two rows, no task, or NaN; rows that are
            none, or no task that has been learnt before the end.
    """
    # Without the row of `learnt`: a task that was bad before any request is no harm of theirs.
    return float(np.mean(_lowest(_checked(scores), learnt)))


def worst_case_accuracy(scores: ArrayLike, newest: float, learnt: ArrayLike | None = None) -> float:
    """Return WC-ACC, min-ACC with the score on the newest request, b, weighted as one task more.

    Args:
        scores: scores (steps + 1, tasks), the first row before any request.
        newest: b, for instance 1 less the accuracy on the rows forgotten last; for tasks learnt one
            after the other the newest one's last score.
        learnt: (tasks,), the row at which a task was learnt, as `minimum_accuracy` takes it.

    Raises:
        ValueError: scores that `minimum_accuracy` refuses.
    """
    check_numbers(FINITE, newest=newest)
    lowest = _lowest(_checked(scores), learnt)
    share = 1 / (len(lowest) + 1)
    return share * newest + (1 - share) * float(np.mean(lowest))


def windowed_forgetting(scores: ArrayLike, window: int, begun: ArrayLike | None = None) -> float:
    """Return WF^w: the deepest fall within so many steps in a row, mean over the tasks; 0 if none.

    Args:
        scores: scores (steps + 1, tasks), the first row before any request.
        window: w, the number of measurements in a window, at least 2.
        begun: (tasks,), the row at which a task was begun; windows lie after it. None: 0 for all.

    Raises:
        ValueError: scores that `minimum_accuracy` refuses, a window below 2, or rows that are none.
    """
    check_numbers(Range(2, is_whole=True), window=window)
    return _largest_falls(_checked(scores), window, begun)


def windowed_plasticity(scores: ArrayLike, window: int, begun: ArrayLike | None = None) -> float:
    """Return WP^w: the highest rise within so many steps in a row, mean over the tasks; 0 if none.

    Args:
        scores: scores (steps + 1, tasks), the first row before any update.
        window: w, the number of measurements in a window, at least 2.
        begun: (tasks,), the row at which a task was begun, as `windowed_forgetting` takes it.

    Raises:
        ValueError: what `windowed_forgetting` refuses.
    """
    check_numbers(Range(2, is_whole=True), window=window)
    return _largest_falls(-_checked(scores), window, begun)


def _lowest(values: np.ndarray, learnt: ArrayLike | None) -> np.ndarray:
    """Return the lowest score of each task that was learnt before the last row.

    Raises:
        ValueError: there is no such task.
    """
    after = _rows(values, learnt, "learnt")
    lowest = [np.min(values[e + 1 :, i]) for i, e in enumerate(after) if e + 1 < len(values)]
    if not lowest:
        raise ValueError(
            f"no task was learnt before the last row, {len(values) - 1}; got learnt={after}"
        )
    return np.asarray(lowest)


def _largest_falls(values: np.ndarray, window: int, begun: ArrayLike | None) -> float:
    found = []
    for i, first in enumerate(_rows(values, begun, "begun")):
        task = values[first:, i]
        # For each distance of two measurements in one window, the deepest fall.
        falls = [np.max(task[:-d] - task[d:]) for d in range(1, min(window, len(task)))]
        found.append(max([0.0, *falls]))
    return float(np.mean(found))


def _rows(values: np.ndarray, given: ArrayLike | None, name: str) -> list[int]:
    steps, tasks = values.shape
    rows = np.zeros(tasks, int) if given is None else np.asarray(given)
    is_whole = np.issubdtype(rows.dtype, np.integer)
    if rows.shape != (tasks,) or not is_whole or np.any((rows < 0) | (rows >= steps)):
        raise ValueError(
            f"{name} must be one row of the scores for each of {tasks} tasks, from 0 to "
            f"{steps - 1}; got {rows.tolist()}"
        )
    return rows.tolist()


def forget_degree(before: ArrayLike, after: ArrayLike) -> float:
    """Return the forgotten share of a score, ours: not FIT's F.D., which is `fit_forget_degree`.

    Args:
        before: (n,), each row's score under the first model.
        after: (n,), each row's score under the model now.

    Raises:
        ValueError: different shapes, no row, or scores before that sum to zero or less.
    """
    return 1 - retained_utility(before, after)


def retained_utility(before: ArrayLike, after: ArrayLike) -> float:
    """Return the retained share of a score, ours: not FIT's R.U., which is `fit_retain_utility`.

    Args:
        before: (n,), each row's score under the first model.
        after: (n,), each row's score under the model now.

    Raises:
        ValueError: different shapes, no row, or scores before that sum to zero or less.
    """
    first, now = (np.asarray(x, np.float64) for x in (before, after))
    if first.shape != now.shape or first.ndim != 1 or not first.sum() > 0:
        raise ValueError(
            "before and after must be scores of the same rows, (n,), those before with a sum above "
            f"zero; got shapes {first.shape} and {now.shape}, sum {first.sum():g}"
        )
    return float(now.sum() / first.sum())


def fit_forget_degree(scores: Sequence[float], retrained: Sequence[float]) -> float:
    """Return FIT's F.D., from 0 to 1: how near the retrained model is on the forgotten rows.

    Args:
        scores: mean probability, ROUGE and accuracy of the forgotten rows, the model now.
        retrained: mean probability, ROUGE and accuracy of the same rows, the model that never saw
            them.

    Raises:
        ValueError: not three scores each, one that is not from 0 to 1, or a retrained one of 0.
    """
    now, reference = (np.asarray(x, np.float64) for x in (scores, retrained))
    if any(x.shape != (3,) or not np.all((x >= 0) & (x <= 1)) for x in (now, reference)) or not (
        np.all(reference > 0)
    ):
        raise ValueError(
            "expected probability, ROUGE and accuracy, from 0 to 1, and the retrained model's "
            f"above 0: the score is relative to it; got {scores} and {retrained}"
        )
    # A ratio to the retrained model's score, two-sided: forgetting more than it never knew counts
    # against a model as much as forgetting less.
    ratio = np.cbrt(np.prod(now)) / np.cbrt(np.prod(reference))
    return float(max(0.0, 1 - abs(ratio - 1)))


def fit_retain_utility(scores: Sequence[float], retrained: Sequence[float]) -> float:
    """Return FIT's R.U., from 0 to 1: how near the retrained model is on the kept rows.

    Args:
        scores: mean probability, ROUGE and accuracy of the kept rows, the model now.
        retrained: mean probability, ROUGE and accuracy of the kept rows, the retrained model.

    Raises:
        ValueError: scores that `fit_forget_degree` refuses.
    """
    return fit_forget_degree(scores, retrained)


def _checked(scores: ArrayLike) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 2 or len(values) < 2 or values.shape[1] == 0 or np.any(np.isnan(values)):
        raise ValueError(
            "scores must be (steps + 1, tasks) with at least one step and one task and no NaN; got "
            f"shape {values.shape}"
        )
    return values

"""View batches: every recall interval counted by hand, and going on from any step."""

import jax
import numpy as np
import pytest

from jedit.data import view_batches, views_for


def visits(numbers, views):
    """By row, the steps at which it is seen, checked to be seen in all of its views at once."""
    found = {}
    for step, batch in enumerate(np.asarray(numbers)):
        seen = {}
        for number in batch.tolist():
            seen.setdefault(number // views, []).append(number % views)
        for row, of_row in seen.items():
            assert sorted(of_row) == [*range(views)] * (len(of_row) // views)
            found.setdefault(row, []).extend([step] * (len(of_row) // views))
    return found


def intervals(numbers, views):
    return [
        later - sooner
        for steps in visits(numbers, views).values()
        for sooner, later in zip(steps[:-1], steps[1:], strict=True)
    ]


@pytest.mark.parametrize(("rows", "batch", "views"), [(12, 6, 2), (12, 12, 4), (10, 5, 1)])
def test_with_one_order_every_row_rests_equally_long(key, rows, batch, views):
    """n V / B steps to the step, where whole steps make a round."""
    numbers = view_batches(
        rows, first=0, steps=40, batch_size=batch, views=views, key=key, is_fixed=True
    )
    assert numbers.shape == (40, batch)
    assert set(intervals(numbers, views)) == {rows * views // batch}


def test_where_no_whole_steps_make_a_round_it_is_within_one(key):
    found = intervals(
        view_batches(10, first=0, steps=60, batch_size=6, views=2, key=key, is_fixed=True), 2
    )
    assert set(found) == {3, 4}
    assert abs(np.mean(found) - 10 / 3) < 0.1


def test_a_new_order_each_round_rests_as_long_on_average(key):
    numbers = view_batches(12, first=0, steps=200, batch_size=6, views=2, key=key)
    found = intervals(numbers, 2)
    assert abs(np.mean(found) - 4) < 0.1
    assert min(found) == 1
    assert 5 <= max(found) <= 7
    rounds = np.asarray(numbers).reshape(-1, 24) // 2
    assert all(sorted(set(r.tolist())) == [*range(12)] for r in rounds)  # each row, each round
    assert len({tuple(r.tolist()) for r in rounds}) > 10


def test_more_views_are_a_longer_rest_at_the_same_number_of_updates(key):
    keys = jax.random.split(key, 3)
    means = [
        np.mean(intervals(view_batches(16, first=0, steps=64, batch_size=8, views=v, key=k), v))
        for v, k in zip((1, 2, 4), keys, strict=True)
    ]
    np.testing.assert_allclose(means, [2, 4, 8], rtol=0.1)


@pytest.mark.parametrize("is_fixed", [False, True])
def test_what_a_step_sees_depends_on_the_step_alone(key, is_fixed):
    given = {"batch_size": 6, "views": 2, "is_fixed": is_fixed}
    whole = view_batches(10, first=0, steps=30, key=key, **given)
    for first in (1, 3, 17):
        part = view_batches(10, first=first, steps=7, key=jax.random.clone(key), **given)
        np.testing.assert_array_equal(part, whole[first : first + 7])
    other = view_batches(10, first=0, steps=30, key=jax.random.fold_in(key, 1), **given)
    assert not np.array_equal(other, whole)


@pytest.mark.parametrize(
    ("interval", "views"), [(1.0, 1), (4.0, 1), (9.0, 2), (16.0, 4), (1000.0, 8)]
)
def test_the_number_of_views_for_an_interval(interval, views):
    """32 rows in batches of 8: an interval of 4 V."""
    assert views_for(interval, num_rows=32, batch_size=8) == views


def test_what_does_not_fit_gets_a_sentence(key):
    with pytest.raises(ValueError, match="batch_size must be a multiple of views"):
        view_batches(10, first=0, steps=1, batch_size=5, views=2, key=key)
    with pytest.raises(ValueError, match="hold no more rows than there are; got 30 for 10 rows"):
        view_batches(10, first=0, steps=1, batch_size=30, views=2, key=jax.random.clone(key))

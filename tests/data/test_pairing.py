"""Retain rows beside forget rows."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.data import pair_by_entity, pair_in_turn, pair_uniformly


def test_in_turn_every_row_is_seen_equally_often():
    seen = [pair_in_turn(4, 6, epoch=epoch) for epoch in range(3)]
    assert_array_equal(np.concatenate(seen)[:, 0], [*range(6), *range(6)])


@pytest.mark.reuses_keys
def test_uniform_draws_depend_on_the_epoch_and_reach_all(key):
    first, again, other = (pair_uniformly(500, 7, epoch=e, key=key) for e in (0, 0, 1))
    assert_array_equal(first, again)
    assert np.any(first != other)
    counts = np.bincount(first[:, 0], minlength=7)
    assert counts.shape == (7,)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - 500 / 7) < 5 * np.sqrt(500 * 6 / 49))


def test_an_entitys_rows_meet_all_its_neighbours():
    near = [{"x": [10, 11, 12], "y": [20]}, {"x": [30, 31], "y": [40, 41]}]
    entities = ["x", "y", "x", "x", "y"]
    assert_array_equal(
        pair_by_entity(entities, near, epoch=0), [[10, 30], [20, 41], [11, 31], [12, 30], [20, 40]]
    )
    assert_array_equal(
        pair_by_entity(entities, near, epoch=1), [[10, 31], [20, 41], [11, 30], [12, 31], [20, 40]]
    )
    with pytest.raises(ValueError, match="neighbour set 1 has no row for 'z'"):
        pair_by_entity(["z"], [{"z": [1]}, {"z": []}], epoch=0)


def test_empty_sets_are_refused():
    with pytest.raises(ValueError, match="num_forget must be at least 1, got 0"):
        pair_in_turn(0, 3, epoch=0)
    with pytest.raises(ValueError, match="num_retain must be at least 1, got 0"):
        pair_uniformly(3, 0, epoch=0, key=jax.random.key(0))

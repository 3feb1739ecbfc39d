"""Probes read out what is there, and nothing where nothing is."""

import numpy as np
import pytest

from jedit.attacks import linear_probe

pytest.importorskip("sklearn")


def states(rng, labels, shift, d=4):
    """Noise in all coordinates, and the label in one, on a scale and an offset of its own."""
    found = rng.normal(size=(len(labels), d))
    found[:, 2] += shift * labels
    return found * np.array([1, 100, 0.01, 1]) + np.array([0, 5, -3, 0])


def test_what_is_there_is_found_and_what_is_not_is_not():
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 2, 300), rng.integers(0, 2, 400)
    there = linear_probe(states(rng, labels, 8), labels, states(rng, test_labels, 8), test_labels)
    assert there.accuracy > 0.99
    assert there.chance == pytest.approx(max(np.mean(test_labels), 1 - np.mean(test_labels)))
    gone = linear_probe(states(rng, labels, 0), labels, states(rng, test_labels, 0), test_labels)
    # Five standard deviations of a coin thrown 400 times.
    assert abs(gone.accuracy - 0.5) < 5 * 0.5 / 20


def test_a_constant_coordinate_is_no_division_by_zero():
    labels = np.array([0, 0, 1, 1, 2, 2])
    x = np.stack([labels * 1.0, np.full(6, 7.0)], axis=1)
    assert linear_probe(x, labels, x, labels, strength=100.0).accuracy == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"states": np.ones((3, 2))}, "states must be"),
        ({"test_states": np.ones((4, 3))}, "width 2, test_states of 3"),
        ({"states": np.full((4, 2), np.nan)}, "8 numbers that are not finite"),
        ({"labels": np.ones(4)}, "two classes"),
    ],
)
def test_refusals(change, sentence):
    given = {
        "states": np.ones((4, 2)),
        "labels": np.array([0, 1, 0, 1]),
        "test_states": np.ones((4, 2)),
        "test_labels": np.array([0, 1, 0, 1]),
    }
    with pytest.raises(ValueError, match=sentence):
        linear_probe(**(given | change))

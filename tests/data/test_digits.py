"""The digits: whole, split without loss, and forget sets that are what they say."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.data import batches, forget_class, forget_cluster, load_digits, split_digits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def train(digits):
    return split_digits(digits, seed=0)[0]


def test_the_images_are_all_there(digits):
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.float32
    assert digits.labels.dtype == np.int32
    assert (digits.images.min(), digits.images.max()) == (0, 1)
    assert_array_equal(
        np.bincount(digits.labels), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )


def in_one_line(digits):
    """Each sample as one row of numbers, sorted, so that two sets of samples can be compared."""
    rows = np.column_stack([digits.labels, digits.images.reshape(len(digits.labels), -1)])
    return rows[np.lexsort(rows.T)]


def test_the_split_loses_nothing_and_keeps_the_classes_balanced(digits):
    train, test = split_digits(digits, seed=3, test_fraction=0.2)
    together = type(digits)(*(np.concatenate(pair) for pair in zip(train, test, strict=True)))
    assert_array_equal(in_one_line(together), in_one_line(digits))
    counts = np.bincount(digits.labels)
    assert_array_equal(np.bincount(test.labels), np.round(0.2 * counts))
    assert len(np.unique(train.labels[:20])) > 3
    again, _ = split_digits(digits, seed=3, test_fraction=0.2)
    other, _ = split_digits(digits, seed=4, test_fraction=0.2)
    assert_array_equal(train.images, again.images)
    assert np.any(train.images != other.images)


def test_a_class_is_forgotten_whole(train):
    forget, retain = forget_class(train, 4)
    assert np.all(train.labels[forget] == 4)
    assert not np.any(train.labels[retain] == 4)
    assert_array_equal(np.sort(np.concatenate([forget, retain])), np.arange(len(train.labels)))


@pytest.mark.parametrize("label", [3, 8])
def test_a_cluster_is_part_of_one_class_and_alike(train, label):
    forget, retain = forget_cluster(train, label, seed=1)
    assert 60 <= len(forget) <= 100
    assert np.all(train.labels[forget] == label)
    assert_array_equal(np.sort(np.concatenate([forget, retain])), np.arange(len(train.labels)))
    # Alike: nearer to their own mean than to that of the rest of the class, all but a few.
    pixels = train.images.reshape(len(train.labels), -1)
    others = retain[train.labels[retain] == label]
    own, other = (pixels[part].mean(0) for part in (forget, others))
    distance = [np.linalg.norm(pixels[forget] - mean, axis=1) for mean in (own, other)]
    assert np.mean(distance[0] < distance[1]) > 0.9


def test_a_cluster_depends_on_the_seed_alone_and_hardly_on_that(train):
    first, _ = forget_cluster(train, 3, seed=1)
    assert_array_equal(first, forget_cluster(train, 3, seed=1)[0])
    other, _ = forget_cluster(train, 3, seed=2)
    assert len(np.intersect1d(first, other)) / len(np.union1d(first, other)) > 0.9


def test_digits_make_batches(train):
    batch = next(batches(train.as_batch(), 32))
    assert batch.inputs.shape == (32, 8, 8, 1)
    assert_array_equal(batch.targets, train.labels[:32])
    assert_array_equal(batch.mask, np.ones(32))
    assert_array_equal(train.take(np.asarray([5, 2])).labels, train.labels[[5, 2]])


def test_failures_say_what_to_do(train):
    with pytest.raises(ValueError, match="there is no class 10; the classes are"):
        forget_class(train, 10)
    with pytest.raises(ValueError, match="size must be less than the 13. samples of class 3"):
        forget_cluster(train, 3, seed=0, size=500)
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1, got 1"):
        split_digits(train, seed=0, test_fraction=1.0)

"""Streams of tasks: every row where it belongs, every guise as it is said."""

import numpy as np
import pytest

from jedit.data import Images, by_class, by_domain


def made(n, seed):
    rng = np.random.default_rng(seed)
    images = rng.random((n, 4, 4, 1)).astype(np.float32)
    return Images(images, (np.arange(n) % 5).astype(np.int32))


TRAIN, TEST = made(53, 0), made(21, 1)


def rows_in(part, whole):
    """Row numbers of images that stand in `whole` as they are."""
    return [int(np.flatnonzero((whole.images == x).all(axis=(1, 2, 3)))[0]) for x in part.images]


def test_new_classes_come_in_every_task():
    tasks = by_class(TRAIN, TEST, size=2, seed=0)
    assert [sorted(set(t.train.labels.tolist())) for t in tasks] == [[0, 1], [2, 3]]
    assert [t.name for t in tasks] == ["classes 0, 1", "classes 2, 3"]
    for field, whole in (("train", TRAIN), ("test", TEST)):
        parts = [getattr(t, field) for t in tasks]
        assert len({len(part.labels) for part in parts}) == 1
        for part in parts:
            rows = rows_in(part, whole)
            assert len(set(rows)) == len(rows)
            assert np.array_equal(whole.labels[rows], part.labels)


def flat(part):
    """Images as rows, and their pixels sorted, by which an image is known in any order of them."""
    rows = part.images.reshape(len(part.images), -1)
    return rows, np.sort(rows, axis=1)


def place(pixels, whole):
    """Where an image with these sorted pixels stands in a set."""
    return int(np.flatnonzero((flat(whole)[1] == pixels).all(axis=1))[0])


def test_no_row_is_learnt_in_two_domains_and_each_has_one_order_of_pixels():
    tasks = by_domain(TRAIN, TEST, guise="permutation", number=3, seed=0)
    rows = [place(x, TRAIN) for task in tasks for x in flat(task.train)[1]]
    assert len(set(rows)) == len(rows) == 3 * (len(TRAIN.labels) // 3)
    orders = []
    for task in tasks:
        for part, whole in ((task.train, TRAIN), (task.test, TEST)):
            for row, pixels, label in zip(*flat(part), part.labels, strict=True):
                number = place(pixels, whole)
                assert whole.labels[number] == label
                before = flat(whole)[0][number]
                orders.append(tuple(int(np.flatnonzero(before == x)[0]) for x in row))
    assert len(set(orders)) == 3
    assert orders[0] == tuple(range(16))  # the first is as it was


def test_turned_images_are_turned():
    pytest.importorskip("scipy")
    turned = by_domain(TRAIN, TEST, guise="rotation", number=2, seed=0)[1]
    # By 90 degrees, which only moves pixels.
    for image, pixels in zip(turned.test.images, flat(turned.test)[1], strict=True):
        gaps = np.abs(flat(TEST)[1] - pixels).max(axis=1)
        assert gaps.min() < 1e-5
        assert np.allclose(image, np.rot90(TEST.images[gaps.argmin()]), atol=1e-5)


def test_noise_rises_by_equal_steps():
    noisy = by_domain(TRAIN, TEST, guise="noise", number=3, seed=0)
    for i, deviation in enumerate((0, 0.5, 1)):
        added = np.var(noisy[i].test.images) - np.var(TEST.images)
        assert added == pytest.approx(deviation**2, abs=0.15)


def test_what_makes_no_stream_is_refused():
    with pytest.raises(ValueError, match="at least two tasks, got 1"):
        by_class(TRAIN, TEST, size=3, seed=0)
    with pytest.raises(ValueError, match="at least two tasks, got 1"):
        by_domain(TRAIN, TEST, number=1, seed=0)
    images = Images(np.zeros((4, 2, 2, 1), np.float32), np.arange(4, dtype=np.int32))
    with pytest.raises(ValueError, match=r"images to test on have none of classes 2, 3"):
        by_class(images, images.take(np.arange(2)), seed=0)
    with pytest.raises(ValueError, match="guise must be"):
        by_domain(TRAIN, TEST, guise="mirror", seed=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="53 rows make no 60 tasks"):
        by_domain(TRAIN, TEST, number=60, seed=0)

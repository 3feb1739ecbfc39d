"""The handwritten digits that ship with scikit-learn, and a way to choose one hand of them.

1,797 images of 8 x 8 pixels by 13 writers (the test part of "Optical Recognition of Handwritten
Digits", UCI). Who wrote which is not recorded, so a writer is stood in for by a cluster: samples of
one class that look alike.
"""

from typing import Any

import numpy as np

from jedit.core.checks import COUNT, POSITIVE_SHARE, check_numbers
from jedit.data.images import Images, checked_label


def load_digits() -> Images:
    """Load the images, scaled to [0, 1].

    Returns:
        All 1,797 images with their labels.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    datasets, _ = _sklearn()
    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., None]
    return Images(images, bunch.target.astype(np.int32))


def split_digits(
    digits: Images, *, seed: int, test_fraction: float = 0.25
) -> tuple[Images, Images]:
    """Split into a training and a test part, class by class, in random order.

    Args:
        digits: the images to split.
        seed: the seed of the split.
        test_fraction: the share of each class to test on, rounded to whole samples.

    Returns:
        The training part and the test part.

    Raises:
        ValueError: the fraction does not lie between 0 and 1.
    """
    check_numbers(POSITIVE_SHARE, test_fraction=test_fraction)
    if test_fraction == 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}.")
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(digits.labels):
        members = rng.permutation(np.flatnonzero(digits.labels == label))
        num_test = round(test_fraction * len(members))
        test.append(members[:num_test])
        train.append(members[num_test:])
    return (
        digits.take(rng.permutation(np.concatenate(train))),
        digits.take(rng.permutation(np.concatenate(test))),
    )


def forget_cluster(
    digits: Images, label: int, *, seed: int, size: int = 80
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the samples of one class that look as if one hand had written them.

    The class is split by k-means on its pixels into two, three and four clusters, and the cluster
    whose size is nearest to the wanted one is taken.

    Args:
        digits: the images to choose from, those of the training part.
        label: the class that the cluster is of.
        seed: the seed of k-means, which keeps the best of 20 starts.
        size: about how many samples to choose.

    Returns:
        The indices to forget and the indices to retain, both rising.

    Raises:
        ValueError: there is no such class, or it has no more than `size` samples.
    """
    check_numbers(COUNT, size=size)
    members = np.flatnonzero(digits.labels == checked_label(digits, label))
    if size >= len(members):
        raise ValueError(
            f"size must be less than the {len(members)} samples of class {label}, got {size}."
        )
    _, cluster = _sklearn()
    pixels = digits.images[members].reshape(len(members), -1).astype(np.float64)
    best = members
    for k in range(2, min(4, len(members)) + 1):
        assigned = cluster.KMeans(k, n_init=20, random_state=seed).fit_predict(pixels)
        for i in range(k):
            found = members[assigned == i]
            if abs(len(found) - size) < abs(len(best) - size):
                best = found
    return best, np.setdiff1d(np.arange(len(digits.labels)), best)


def _sklearn() -> tuple[Any, Any]:
    # Imported here, because the library proper works without it.
    try:
        from sklearn import cluster, datasets
    except ImportError:
        raise ImportError(
            "jedit.data.digits needs scikit-learn: pip install 'jedit[demo]'."
        ) from None
    return datasets, cluster

"""Labelled images, and the two ways in which the field chooses what of them to forget."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, Int32

from jedit.core.batch import Batch
from jedit.core.checks import POSITIVE_SHARE, check_numbers


class Images(NamedTuple):
    """Images with their labels.

    Attributes:
        images: values from 0 to 1; one channel, or three.
        labels: classes, counted from 0.
    """

    images: Float32[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]

    def take(self, indices: Int[np.ndarray, " part"]) -> "Images":
        """Return the images and labels at the given places."""
        return Images(self.images[indices], self.labels[indices])

    def as_batch(self) -> Batch:
        """Return all images as one batch, in which every one counts."""
        ones = jnp.ones(self.labels.shape, jnp.float32)
        return Batch(jnp.asarray(self.images), jnp.asarray(self.labels), ones, ones)


def forget_class(images: Images, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose every image of one class.

    Args:
        images: the images to choose from, those of the training part.
        label: the class to forget.

    Returns:
        The indices to forget and the indices to retain, both rising.

    Raises:
        ValueError: there is no such class.
    """
    chosen = images.labels == checked_label(images, label)
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def forget_random(
    images: Images, *, seed: int, fraction: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images at random, whatever their class.

    Args:
        images: the images to choose from, those of the training part.
        seed: the seed of the choice.
        fraction: the share to forget, rounded to whole images; 0.1, the field's first setting.

    Returns:
        The indices to forget and the indices to retain, both rising.

    Raises:
        ValueError: the fraction does not lie between 0 and 1, or leaves one of the sets empty.
    """
    check_numbers(POSITIVE_SHARE, fraction=fraction)
    count = len(images.labels)
    size = round(fraction * count)
    if not 0 < size < count:
        raise ValueError(f"fraction {fraction} of {count} images leaves a set without any.")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[:size]), np.sort(order[size:])


def checked_label(images: Images, label: int) -> int:
    """Return the label.

    Raises:
        ValueError: no image has it.
    """
    labels = np.unique(images.labels).tolist()
    if label not in labels:
        raise ValueError(f"there is no class {label}; the classes are {labels}.")
    return label

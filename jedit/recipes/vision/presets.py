"""The image sets of the vision protocol, and how much of everything suits each.

CIFAR-10 is run as the field does: ResNet-18, 182 epochs; that wants an accelerator. MNIST and
scikit-learn's digits are run in small, for two cores: their sizes are arbitrary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from jedit.data import Images, load_cifar10, load_digits, load_mnist, split_digits
from jedit.recipes.vision.run import Model, Protocol
from jedit.recipes.vision.training import Recipe

Source = Literal["cifar10", "mnist", "digits"]
SPLIT_SEED = 0  # of the digits, which come in one piece
PRESETS: Mapping[Source, Protocol] = {
    "cifar10": Protocol(),
    "mnist": Protocol(Model(8, (1, 1, 1), 2), Recipe(12, 64, 0.1, augmented=False)),
    "digits": Protocol(
        Model(8, (1, 1)), Recipe(20, 64, 0.1, augmented=False), batch_size=64, fitted_rows=500
    ),
}


def load_images(source: Source, folder: Path | None, num_rows: int | None) -> tuple[Images, Images]:
    """Load the images to train on, the first ones, and all those to test on.

    Args:
        source: which images.
        folder: their folder; the digits have none.
        num_rows: how many to train on, at most; None: all.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file holds something else.
        ImportError: scikit-learn, which brings the digits, is not installed.
    """
    if source == "digits" or folder is None:
        train, test = split_digits(load_digits(), seed=SPLIT_SEED)
    else:
        train, test = (load_cifar10 if source == "cifar10" else load_mnist)(folder)
    if num_rows is not None:
        train = train.take(np.arange(min(num_rows, len(train.labels))))
    return train, test

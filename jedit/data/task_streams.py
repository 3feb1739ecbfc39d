"""Images as tasks that are learnt one after the other: new classes, or known ones in a new guise.

    by_class    class-incremental: each task has classes that no earlier one had
    by_domain   domain-incremental: each task has all classes, turned, with their pixels in another
                order, or under noise

The tasks of a stream have the same number of rows, so that one compiled step serves them all.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jedit.core.arguments import check_word
from jedit.core.checks import COUNT, COUNT_OR_ZERO, check_numbers
from jedit.data.images import Images

Guise = Literal["rotation", "permutation", "noise"]
MOST_TURNED = 180.0  # degrees between the first task and one that would follow the last
MOST_NOISE = 1.0  # standard deviation of the last task's noise; images have values from 0 to 1


class Task(NamedTuple):
    """One task of a stream.

    Attributes:
        name: what is new in it, in a few words.
        train: the rows to be learnt.
        test: the rows that show whether they are known.
    """

    name: str
    train: Images
    test: Images


def by_class(train: Images, test: Images, *, size: int = 2, seed: int) -> tuple[Task, ...]:
    """Return tasks of so many classes each, in the order of the labels.

    Args:
        train: the images to learn.
        test: the images to test on.
        size: classes of a task, 2 as in Split MNIST; those that fill no task are left out.
        seed: of which rows stay where a task has more than the smallest one.

    Raises:
        ValueError: fewer than two tasks come out, or one has no image to test on.
    """
    check_numbers(COUNT, size=size)
    check_numbers(COUNT_OR_ZERO, seed=seed)
    labels = np.unique(train.labels)
    groups = [labels[i : i + size] for i in range(0, len(labels) - size + 1, size)]
    _check_several(len(groups))
    tasks = []
    for group in groups:
        parts = (part.take(np.flatnonzero(np.isin(part.labels, group))) for part in (train, test))
        name = "classes " + ", ".join(map(str, group.tolist()))
        task = Task(name, *parts)
        if not len(task.test.labels):
            raise ValueError(f"the images to test on have none of {name}")
        tasks.append(task)
    return _of_one_size(tasks, seed)


def by_domain(
    train: Images, test: Images, *, guise: Guise = "permutation", number: int = 5, seed: int
) -> tuple[Task, ...]:
    """Return tasks of all classes, each in another guise; the first is the images as they are.

    Every task has its own rows of `train`, so that none is learnt twice.

    Args:
        train: the images to learn.
        test: the images to test on; each task has all of them.
        guise: "rotation", by equal angles, each 180 degrees over the number of tasks; "permutation"
            of the pixels, the same for all images of a task; or "noise", normal, of a deviation
            that rises by equal steps up to 1.
        number: how many tasks; 5 is arbitrary.
        seed: of the permutations, the noise, and which rows a task has.

    Raises:
        ImportError: "rotation" without scipy.
        ValueError: another word, fewer than two tasks, or fewer rows than tasks.
    """
    check_word(Guise, guise=guise)
    check_numbers(COUNT, number=number)
    check_numbers(COUNT_OR_ZERO, seed=seed)
    _check_several(number)
    if len(train.labels) < number:
        raise ValueError(f"{len(train.labels)} rows make no {number} tasks")
    rng = np.random.default_rng(seed)
    parts = np.array_split(rng.permutation(len(train.labels)), number)
    tasks = []
    for i, rows in enumerate(parts):
        name, change = _guise(guise, i, number, train.images.shape[1:], rng)
        sets = (part._replace(images=change(part.images)) for part in (train.take(rows), test))
        tasks.append(Task(name, *sets))
    return _of_one_size(tasks, seed)


def _guise(guise: Guise, i: int, number: int, shape: tuple[int, ...], rng: np.random.Generator):
    """Return a name and a function of images, for task i of a stream."""
    if guise == "rotation":
        angle = MOST_TURNED * i / number
        return f"turned by {angle:g} degrees", lambda images: _turned(images, angle)
    if guise == "permutation":
        size = int(np.prod(shape))
        order = rng.permutation(size) if i else np.arange(size)
        name = f"permutation {i}" if i else "as they are"
        return name, lambda images: images.reshape(len(images), -1)[:, order].reshape(images.shape)
    deviation = MOST_NOISE * i / (number - 1)

    def noisy(images: np.ndarray) -> np.ndarray:
        return images + deviation * rng.standard_normal(images.shape).astype(images.dtype)

    return f"noise of deviation {deviation:g}", noisy


def _turned(images: np.ndarray, angle: float) -> np.ndarray:
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError("turned images need scipy: pip install 'jedit[demo]'.") from None
    turned = ndimage.rotate(images, angle, axes=(1, 2), reshape=False, order=1)
    return turned.astype(images.dtype)


def _of_one_size(tasks: Sequence[Task], seed: int) -> tuple[Task, ...]:
    """Return the tasks, each cut to the number of rows of the smallest, at random."""
    rng = np.random.default_rng(seed)

    def cut(parts: list[Images]) -> list[Images]:
        least = min(len(part.labels) for part in parts)
        return [part.take(rng.permutation(len(part.labels))[:least]) for part in parts]

    trains, tests = cut([t.train for t in tasks]), cut([t.test for t in tasks])
    return tuple(Task(t.name, a, b) for t, a, b in zip(tasks, trains, tests, strict=True))


def _check_several(number: int) -> None:
    if number < 2:
        raise ValueError(f"a stream has at least two tasks, got {number}")

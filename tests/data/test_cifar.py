"""CIFAR-10's files: read in both published forms, and refused with a sentence when they are not."""

import os
import pickle
import pickletools

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.data import forget_class, forget_random, load_cifar10
from jedit.data.cifar import TEST, TRAIN

NAMES = (*TRAIN, *TEST)


def content(index, rows=3):
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (rows, 3072), np.uint8)
    return pixels, [(index + i) % 10 for i in range(rows)]


def pickled(pixels, labels, **other):
    """As a newer Python and a newer NumPy write them."""
    return pickle.dumps({b"labels": labels, b"data": pixels, **other}, protocol=3)


def published(pixels, labels):
    """By the operations of Python 2, whose strings are bytes, and of the NumPy of its day."""
    data = pixels.tobytes()
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return b"".join(
        [
            b"\x80\x02}(U\x06labels](" + numbers + b"eU\x04data",
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R",
            b"(K\x01K" + bytes([len(pixels)]) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff",
            b"K\0tb\x89T" + len(data).to_bytes(4, "little") + data + b"tbu.",
        ]
    )


FORMS = {"pickle": pickled, "published": published}


def write(folder, form):
    for i, name in enumerate(NAMES):
        pixels, labels = content(i)
        if form == "binary":
            rows = np.column_stack([np.array(labels, np.uint8), pixels])
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            (folder / name).write_bytes(FORMS[form](pixels, labels))
    return folder


@pytest.mark.parametrize("form", ["binary", "pickle", "published"])
def test_what_was_written_is_read(tmp_path, form):
    train, test = load_cifar10(write(tmp_path, form))
    assert (train.images.shape, test.images.shape) == ((15, 32, 32, 3), (3, 32, 32, 3))
    assert (train.images.dtype, train.labels.dtype) == (np.float32, np.int32)
    for images, labels, first in ((train.images, train.labels, 0), (test.images, test.labels, 5)):
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            pixels, expected = content(first + n // 3)
            assert label == expected[n % 3]
            # Red at row 5 and column 7 is byte 5 * 32 + 7, green 1024 later, blue 2048.
            at = [pixels[n % 3, 1024 * c + 5 * 32 + 7] for c in range(3)]
            assert_array_equal(image[5, 7], np.array(at, np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "holds 0 bytes, expected rows of 3073"),
        (bytes(3073 * 2 - 1), "holds 6145 bytes, expected rows of 3073"),
        (bytes([10]) + bytes(3072), "holds the label 10, expected 0 to 9"),
    ],
)
def test_a_bad_binary_file_gets_a_sentence(tmp_path, data, sentence):
    file = write(tmp_path, "binary") / "data_batch_3.bin"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"data_batch_3.bin: {sentence}"):
        load_cifar10(tmp_path)


class Attack:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


PIXELS, LABELS = content(0)
NO_BATCH = "is no batch of CIFAR-10: expected a dict of"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is no batch of CIFAR-10 "),
        (b"no pickle", "is no batch of CIFAR-10 "),
        (pickled(PIXELS, LABELS)[:-100], "is no batch of CIFAR-10 "),
        (pickle.dumps([1, 2], protocol=2), NO_BATCH),
        (pickle.dumps({b"data": 1, b"labels": 2}, protocol=3), NO_BATCH),
        (pickled(PIXELS, LABELS[:2]), NO_BATCH),
        (pickled(PIXELS, [0.5, 1, 2]), NO_BATCH),
        (pickled(PIXELS[:, :3000], LABELS), NO_BATCH),
        (pickled(PIXELS.astype(np.float32), LABELS), NO_BATCH),
        (pickled(np.asfortranarray(PIXELS), LABELS), NO_BATCH),
        (pickled(PIXELS, [0, 1, -1]), "holds the label -1"),
        (pickled(PIXELS, [0, 1, 10**30]), "holds the label 1000000"),
        (pickled(PIXELS, LABELS, extra=np.float64), "names numpy.float64, .* it was not run"),
        (pickled(PIXELS, LABELS, extra=eval), "names builtins.eval, .* it was not run"),
        # Keys whose hash overflows the stack, or takes 2**50 steps, by a copy or by the memo.
        (b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x00s.", "names a key that is no string"),
        (b"\x80\x02}()" + b"2\x86" * 50 + b"K\x00s.", "names the operation DUP"),
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 50 + b"K\x00s.", "names a key that is no string"),
        (b"\x80\x02}()K\x00u.", "names a key that is no string"),
        # Room for 10**11 bytes that are not there, and more lists than any batch has.
        (
            b"\x80\x05\x96" + (10**11).to_bytes(8, "little") + b".",
            "is no batch|names the operation",
        ),
        (b"\x80\x02(" + b"]" * 2**18 + b"l.", "names more than 262144 operations"),
        # A memo number of four thousand million, for which the reader in C makes room.
        (b"\x80\x02Nr\xff\xff\xff\xff.", NO_BATCH),
        (b"\x80\x02cnumpy\nndarray\n(}tb.", "is no batch of CIFAR-10 "),
    ],
)
def test_a_bad_pickle_gets_a_sentence(tmp_path, data, sentence):
    file = write(tmp_path, "pickle") / "data_batch_2"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"data_batch_2: {sentence}"):
        load_cifar10(tmp_path)


def test_a_pickle_is_not_run(tmp_path):
    made = tmp_path / "made"
    data = pickled(PIXELS, LABELS, extra=Attack(made))
    assert "mkdir" in "".join(str(arg) for _, arg, _ in pickletools.genops(data))
    file = write(tmp_path, "pickle") / "test_batch"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"test_batch: names posix.mkdir, .* it was not run"):
        load_cifar10(tmp_path)
    assert not made.exists()


def test_a_missing_file_is_named(tmp_path):
    (write(tmp_path, "binary") / "data_batch_5.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither data_batch_5.bin nor data_batch_5; give"):
        load_cifar10(tmp_path)


def test_a_random_part_is_of_the_stated_size_and_depends_on_the_seed(tmp_path):
    rows, _ = load_cifar10(write(tmp_path, "binary"))
    forget, retain = forget_random(rows, seed=4, fraction=0.4)
    assert len(forget) == 6
    assert_array_equal(np.sort(np.concatenate([forget, retain])), np.arange(15))
    assert_array_equal(forget, forget_random(rows, seed=4, fraction=0.4)[0])
    assert np.any(forget != forget_random(rows, seed=5, fraction=0.4)[0])
    assert_array_equal(rows.take(forget_class(rows, 3)[0]).labels, 3)
    with pytest.raises(ValueError, match="leaves a set without any"):
        forget_random(rows, seed=0, fraction=0.01)

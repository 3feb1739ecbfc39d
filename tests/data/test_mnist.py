"""MNIST's files: read as they are published, and refused with a sentence when they are not."""

import gzip
import struct

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jedit.data import batches, forget_class, load_mnist
from jedit.data.mnist import read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array, *, magic=b"\0\0\x08"):
    """The bytes of an idx file, by the format's own description."""
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return magic + bytes([array.ndim]) + shape + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Seven and three images of 3 x 2 pixels: the training part gzipped, the test part not."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (n, 3, 2), np.uint8)
        images[0, 0] = [0, 255]
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8))):
            data = idx(array)
            path = tmp_path / f"{part}-{name}-ubyte"
            if part == "train":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return tmp_path


def test_what_was_written_is_read(folder):
    train, test = load_mnist(folder)
    assert (train.images.shape, test.images.shape) == ((7, 3, 2, 1), (3, 3, 2, 1))
    assert (train.images.dtype, train.labels.dtype) == (np.float32, np.int32)
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (7, 3, 2), np.uint8)
    assert_array_equal(train.images[1:, ..., 0], expected[1:].astype(np.float32) / 255)
    assert_array_equal(train.images[0, 0, :, 0], [0, 1])
    assert_array_equal(train.labels, np.arange(7))
    assert next(batches(train.as_batch(), 4)).inputs.shape == (4, 3, 2, 1)
    assert_array_equal(forget_class(train, 5)[0], [5])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (idx(np.zeros((7, 3, 2), np.uint8), magic=b"\0\0\x0d"), "begins with '00 00 0d 03'"),
        (b"\0\0\x08", "not an idx file of unsigned bytes"),
        (b"", "not an idx file of unsigned bytes"),
        (idx(np.zeros((7, 3, 2), np.uint8))[:-1], "states shape .7, 3, 2., 58 bytes .* holds 57"),
        (idx(np.zeros((7, 3, 2), np.uint8)) + b"\0", "58 bytes with the header, but holds 59"),
        (idx(np.zeros((7, 3, 2), np.uint8))[:9], "but holds 9; copy the file again"),
        (idx(np.zeros((6, 3, 2), np.uint8)), r"has shape \(6, 3, 2\) and train-labels \(7,\)"),
        (idx(np.zeros(7, np.uint8)), r"expected \(n, height, width\) and \(n,\)"),
    ],
)
def test_a_bad_file_gets_a_sentence(folder, data, sentence):
    (folder / IMAGES).write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        load_mnist(folder)


def test_a_broken_archive_and_a_missing_file_get_a_sentence(folder):
    packed = folder / f"{LABELS}.gz"
    whole = packed.read_bytes()
    for broken in (whole[:-9], b"no archive"):
        packed.write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole gzip file"):
            read_idx(packed)
    packed.unlink()
    with pytest.raises(FileNotFoundError, match=f"neither {LABELS} nor {LABELS}.gz"):
        load_mnist(folder)


def test_the_real_files(shared_data):
    folder = shared_data / "mnist"
    if not folder.is_dir():
        pytest.skip(f"needs MNIST: {folder} is absent")
    train, test = load_mnist(folder)
    assert (train.images.shape, test.images.shape) == ((60_000, 28, 28, 1), (10_000, 28, 28, 1))
    # Counts and mean pixel as published for the set.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert_array_equal(np.bincount(train.labels), counts)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert float(train.images.mean(dtype=np.float64)) == pytest.approx(0.1306604762738429, rel=1e-6)
    assert float(train.images.max()) == 1


def test_labels_of_other_letters_get_a_sentence(tmp_path):
    def idx(array):
        axes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        return bytes([0, 0, 8, array.ndim]) + axes + array.tobytes()

    for part in ("train", "t10k"):
        images = tmp_path / f"{part}-images-idx3-ubyte"
        labels = tmp_path / f"{part}-labels-idx1-ubyte"
        images.write_bytes(idx(np.zeros((2, 28, 28), np.uint8)))
        labels.write_bytes(idx(np.array([3, 25], np.uint8)))
    with pytest.raises(ValueError, match="train-labels holds the label 25, expected"):
        load_mnist(tmp_path)

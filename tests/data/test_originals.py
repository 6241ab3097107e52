"""Original files of datasets, as torchvision downloads them: read back, missing, damaged, or a program."""

import gzip
import os
import pickle

import numpy as np
import pytest

from rs_consistency.common.errors import UserError
from rs_consistency.data import originals
from tests.helpers import write_idx


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (5, 28, 28, 1), dtype=np.uint8), np.arange(5, dtype=np.uint8)


def write_cifar(path, images, **labels):
    """A batch of CIFAR's Python version, with the modules' names that older versions of NumPy wrote."""
    path.parent.mkdir(exist_ok=True)
    batch = {b"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1)}
    batch |= {name.encode(): values for name, values in labels.items()}
    path.write_bytes(pickle.dumps(batch, protocol=2).replace(b"numpy._core.", b"numpy.core."))


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_read_packed_or_not_in_either_folder(tmp_path, digits, packed, below):
    write_idx(tmp_path / below, "t10k", *digits, packed=packed)
    images, labels = originals.read("mnist", "test", tmp_path)
    np.testing.assert_array_equal(images, digits[0])
    np.testing.assert_array_equal(labels, digits[1])
    with pytest.raises(UserError, match=r"has no train-images-idx3-ubyte\.gz of mnist; give the folder of its"):
        originals.read("mnist", "train", tmp_path)


def test_cifar_is_read_in_the_order_of_its_batches(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        path = tmp_path / "cifar-10-batches-py" / f"data_batch_{number + 1}"
        write_cifar(path, images[part], labels=[number, 9 - number])
    read, labels = originals.read("cifar10", "train", tmp_path)
    np.testing.assert_array_equal(read, images)
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    write_cifar(tmp_path / "cifar-100-python" / "test", images, fine_labels=[*range(90, 100)], coarse_labels=[0] * 10)
    read, labels = originals.read("cifar100", "test", tmp_path)
    np.testing.assert_array_equal(read, images)
    assert labels.tolist() == [*range(90, 100)]


class Program:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_that_is_a_program_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Program()}, protocol=2))
    with pytest.raises(UserError, match=r"test_batch in .* is damaged: it asks for \w+\.mkdir; download cifar10 again"):
        originals.read("cifar10", "test", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08", b"\x00\x00\x09\x01\x00\x00\x00\x00", b"\x00\x00\x08\x03"])
def test_damaged_files_are_named(tmp_path, digits, content):
    write_idx(tmp_path, "t10k", *digits)
    for damaged in (content, gzip.compress(content)):
        (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"t10k in .* is damaged: .*; download mnist again"):
            originals.read("mnist", "test", tmp_path)
    with pytest.raises(UserError, match="svhn: its original files cannot be read here; mnist, fashion_mnist, cifar10"):
        originals.read("svhn", "test", tmp_path)
    with pytest.raises(UserError, match="has no t10k-images"):
        originals.read("mnist", "test", tmp_path / "t10k-images-idx3-ubyte.gz")

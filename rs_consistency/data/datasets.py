"""The datasets by name: shapes, classes, sizes, normalization, and how each is read."""

from collections.abc import Callable, Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from rs_consistency.common.checks import one_of
from rs_consistency.data import tfds

SPLITS = ("train", "test")


class DatasetInfo(NamedTuple):
    """The facts about a dataset that are known before it is read.

    Attributes:
      image_shape: (H, W, C).
      num_classes: K.
      train_size: examples in the original training split.
      test_size: examples in the original test split.
      read: (name, split, data_dir, cache_dir) -> (images uint8 `[N, H, W, C]`, labels `[N]`). None if the dataset does
        not fit into memory and is streamed.
      mean: per-channel mean for the normalization inside the model; empty for none.
      std: per-channel standard deviation, likewise.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    train_size: int
    test_size: int
    read: Callable[..., tuple[np.ndarray, np.ndarray]] | None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


def _read_embedded(name: str, split: str, data_dir: str, cache_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 10,000 training or 1,000 test examples of the original files, in their order."""
    del name, data_dir, cache_dir  # the embedded dataset has none
    path = resources.files("rs_consistency.data") / "embedded" / "mnist_subset.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


DATASETS: dict[str, DatasetInfo] = {
    "mnist_subset": DatasetInfo((28, 28, 1), 10, 10_000, 1_000, _read_embedded),
    "mnist": DatasetInfo((28, 28, 1), 10, 60_000, 10_000, tfds.read),
    "fashion_mnist": DatasetInfo((28, 28, 1), 10, 60_000, 10_000, tfds.read),
    "cifar10": DatasetInfo(
        (32, 32, 3), 10, 50_000, 10_000, tfds.read, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "cifar100": DatasetInfo(
        (32, 32, 3), 100, 50_000, 10_000, tfds.read, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
    ),
    "svhn": DatasetInfo(
        (32, 32, 3), 10, 73_257, 26_032, tfds.read, mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970)
    ),
    "imagenet": DatasetInfo(
        (224, 224, 3), 1000, 1_281_167, 50_000, None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
}


def dataset_info(name: str) -> DatasetInfo:
    """Return the entry of a dataset. Raise a `UserError` with the known names for an unknown name."""
    one_of("dataset.name", name, DATASETS)
    return DATASETS[name]

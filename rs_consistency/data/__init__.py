"""Datasets by name: as arrays, or streamed if they are too large.

    train = load("mnist_subset", "train")     # train.images [N, H, W, C] uint8, train.labels [N] int32
    test = open_split("imagenet", "test")     # len(test), test.read([0, 100, 200]), test.digest()

Images are stored as uint8. `to_unit` returns the float32 images in [0, 1] that models, noise and radii refer to.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from rs_consistency.common.checks import any_array, shown
from rs_consistency.common.errors import UserError
from rs_consistency.data.datasets import DATASETS, SPLITS, DatasetInfo, dataset_info

if TYPE_CHECKING:
    import jax  # not for the preparation of a dataset

__all__ = [
    "DATASETS",
    "SPLITS",
    "DatasetInfo",
    "Examples",
    "OpenSplit",
    "Split",
    "check_split",
    "dataset_info",
    "load",
    "open_split",
    "to_unit",
]


@dataclass(frozen=True)
class Split:
    """A split of a dataset in memory. It unpacks as `images, labels`, and its length is N.

    Attributes:
      images: `[N, H, W, C]` uint8.
      labels: `[N]` int32 in 0..K-1.
    """

    images: np.ndarray
    labels: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return the SHA-256 of shape, images and labels, as a hexadecimal string."""
        sha = hashlib.sha256(str(self.images.shape).encode())
        sha.update(np.ascontiguousarray(self.images))
        sha.update(np.ascontiguousarray(self.labels, dtype="<i4"))
        return sha.hexdigest()

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images and labels of the examples with these numbers."""
        return self.images[indices], self.labels[indices]

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels of the examples with these numbers."""
        return self.labels[indices]


class Examples(NamedTuple):
    """Training examples on a device.

    Attributes:
      images: `[B, H, W, C]` uint8.
      labels: `[B]` int32.
      extra: name -> `[B, ...]`, a method's own numbers for each example.
    """

    images: "jax.Array"
    labels: "jax.Array"
    extra: "Mapping[str, jax.Array]"


def load(name: str, split: str, *, data_dir: str = "", cache_dir: str = "") -> Split:
    """Read a split of a dataset.

    Args:
      name: a key of `DATASETS`.
      split: `train` or `test`.
      data_dir: folder of prepared tensorflow-datasets; empty for `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      cache_dir: folder of decoded arrays; empty for `$XDG_CACHE_HOME/rs_consistency`, else
        `~/.cache/rs_consistency`.

    Returns:
      The split. The examples are in the order of the source.

    Raises:
      UserError: for an unknown name or split, a dataset that is not prepared, or content that does not fit the dataset.
    """
    info = dataset_info(name)
    if not isinstance(split, str) or split not in SPLITS:
        raise UserError(f"split={shown(split)} is unknown; use one of {', '.join(SPLITS)}")
    for folder, path in (("data_dir", data_dir), ("cache_dir", cache_dir)):
        if not isinstance(path, str | os.PathLike) or "\0" in str(path):
            raise UserError(f"{folder}={shown(path)}: use the path of a folder, or nothing for the usual one")
    if info.read is None:
        raise UserError(f"dataset {name!r} is too large for arrays; read it with open_split")
    images, labels = info.read(name, split, data_dir, cache_dir)
    labels = labels.astype(np.int32)
    check_split(f"{name} ({split})", images, labels, info)
    return Split(images, labels)


class OpenSplit(Protocol):
    """A split whose examples are read by number: a `Split`, or a `streaming.StreamedSplit`."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def digest(self) -> str:
        """Return a hexadecimal string that identifies the data."""
        ...

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return images uint8 `[B, H, W, C]` and labels int32 `[B]` of examples, as they are certified."""
        ...

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        """Return labels int32 `[B]` of examples, without decoding their images."""
        ...


def open_split(name: str, split: str, *, data_dir: str = "", cache_dir: str = "") -> OpenSplit:
    """Open a split of any dataset: in memory, or streamed from the prepared folder if it does not fit.

    Arguments and errors are as for `load`.
    """
    info = dataset_info(name)
    if info.read is not None or not isinstance(split, str) or split not in SPLITS:
        return load(name, split, data_dir=data_dir, cache_dir=cache_dir)
    from rs_consistency.data import streaming  # slow to import, and only needed here

    stored_as = {"train": "train", "test": "validation"}[split]
    return streaming.open_split(name, stored_as, data_dir, image_shape=info.image_shape, num_classes=info.num_classes)


def check_split(name: str, images: np.ndarray, labels: np.ndarray, info: DatasetInfo) -> None:
    """Raise a `UserError` if arrays do not fit the dataset's entry."""
    if images.dtype != np.uint8 or images.shape[1:] != info.image_shape or not len(images):
        problem = f"images are {images.dtype} {images.shape}; expected uint8 [N, {info.image_shape}], N > 0"
    elif labels.shape != images.shape[:1]:
        problem = f"{len(images)} images but labels {labels.shape}"
    elif (outside := np.flatnonzero((labels < 0) | (labels >= info.num_classes))).size:
        problem = f"label {labels[outside[0]]} of example {outside[0]} is outside 0..{info.num_classes - 1}"
    else:
        return
    raise UserError(f"{name}: {problem}. Prepare the dataset again")


def to_unit(images: "jax.Array") -> "jax.Array":
    """Return uint8 `[...]` as float32 in [0, 1], on the devices: for training and evaluation steps.

    `smoothing.voter.to_float` does the same on the host.
    """
    return any_array("images", images, kinds="iu").astype(np.float32) / 255

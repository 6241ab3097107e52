"""The original files of datasets, in their own order, which torchvision keeps and tensorflow-datasets shuffles."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.errors import UserError, first_line

_Arrays = tuple[np.ndarray, np.ndarray]


class _Files(NamedTuple):
    """The original files of a dataset.

    `folder` is the place that torchvision gives them, `parts` are the names of each split, and `read` returns images
    uint8 `[N, H, W, C]` and labels `[N]` of a part in a folder.
    """

    folder: str
    parts: dict[str, tuple[str, ...]]
    read: Callable[[Path, str], _Arrays]


def read(name: str, split: str, folder: Path) -> _Arrays:
    """Return images uint8 `[N, H, W, C]` and labels `[N]` of a split, in the order of the original files.

    The files lie in `folder`, or where torchvision puts them below it.

    Raises:
      UserError: for a dataset without a reader here, or files that are missing or damaged.
    """
    if name not in _DATASETS:
        raise UserError(f"dataset {name}: its original files cannot be read here; {', '.join(_DATASETS)} can")
    files, parts = _DATASETS[name], []
    below = folder / files.folder
    for part in files.parts[split]:
        try:
            parts.append(files.read(below if below.is_dir() else folder, part))
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = f"{folder} has no {Path(error.filename).name} of {name}"
            raise UserError(f"{missing}; give the folder of its original files, as torchvision downloads it") from None
        except Exception as error:  # damaged files raise many kinds
            raise UserError(f"{part} in {folder} is damaged: {first_line(error)}; download {name} again") from None
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_idx(folder: Path, part: str) -> _Arrays:
    """Return a split of MNIST's format; each of its two files may be packed by gzip."""
    images, labels = (_idx(folder / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"images {images.shape} and labels {labels.shape} do not fit")
    return images[..., None], labels


def _idx(path: Path) -> np.ndarray:
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path.name} is no file of bytes in the IDX format")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _read_cifar(folder: Path, part: str) -> _Arrays:
    """Return a batch of CIFAR's Python version."""
    with (folder / part).open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    labels = batch[b"labels"] if b"labels" in batch else batch[b"fine_labels"]
    images = batch[b"data"].reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, C]
    return images, np.array(labels)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes NumPy arrays and nothing else: a pickle can run any program."""

    _KNOWN = ("_reconstruct", "ndarray", "dtype", "encode")

    def find_class(self, module: str, name: str) -> Any:
        """Return a function that makes an array."""
        if name not in self._KNOWN or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


_MNIST = {"train": ("train",), "test": ("t10k",)}
_DATASETS = {
    "mnist": _Files("MNIST/raw", _MNIST, _read_idx),
    "fashion_mnist": _Files("FashionMNIST/raw", _MNIST, _read_idx),
    "cifar10": _Files(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
        _read_cifar,
    ),
    "cifar100": _Files("cifar-100-python", {"train": ("train",), "test": ("test",)}, _read_cifar),
}

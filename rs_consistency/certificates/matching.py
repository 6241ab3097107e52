"""Files of other programs in the order of tensorflow-datasets: their images found by pixels.

The `idx` of the authors' files counts in the original files, as torchvision reads them. tensorflow-datasets shuffles
the examples, and the files of this program count in its order.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rs_consistency import data
from rs_consistency.certificates.read import Certificates, certificate_path
from rs_consistency.certificates.record import content_beside
from rs_consistency.common.errors import UserError
from rs_consistency.data import originals

_IMAGES = ("dataset", "split", "data_digest")  # keys of a record that say what its images are


def match_images(files: Sequence[tuple[Path, Certificates]], folder: Path, *, data_dir: str = "") -> list[Certificates]:
    """Return all files with `idx` in the order of tensorflow-datasets, so that they compare image by image.

    A file with a record of certify.py is in that order, and names the dataset. Every other file is taken to be in the
    order of the original files. Images with equal pixels and labels are matched in the order of their occurrence.

    Args:
      files: paths and lines.
      folder: with the dataset's original files, as `data.originals.read` finds them.
      data_dir: folder of prepared datasets; empty for the folder that the first record names.

    Raises:
      UserError: when no record names a dataset, records name several, the dataset or its original files are missing,
        or a line of another program's file is not of such an image.
    """
    records = [(path, content_beside(certificate_path(path))) for path, _ in files]
    if all(record for _, record in records):
        return [table for _, table in files]
    path, record = next((each for each in records if each[1].keys() >= set(_IMAGES)), (None, {}))
    if path is None:
        raise UserError("match_images: no PATH has a record of certify.py that names its dataset; add one that has")
    for other, also in records:
        if also and any(also.get(key) != record.get(key) for key in _IMAGES):
            raise UserError(f"match_images: {path} and {other} are not of the same images; give files of one dataset")
    name, split = record["dataset"], record["split"]
    if name == "mnist_subset":
        raise UserError("match_images: mnist_subset is in the order of the original files; leave match_images out")
    theirs = originals.read(name, split, folder)
    ours = data.load(
        name, split, data_dir=data_dir or _place(record, "data_dir"), cache_dir=_place(record, "cache_dir")
    )
    if ours.digest() != record["data_digest"]:
        raise UserError(f"match_images: {name} ({split}) as it is prepared here is not the data that {path} is of")
    found = _positions(theirs, tuple(ours))
    return [
        table if known else _moved(path, table, found, ours.labels, f"{name} ({split})")
        for (path, table), (_, known) in zip(files, records, strict=True)
    ]


def _place(record: Any, key: str) -> str:
    """Return a folder that the run of a record names; empty where there is none."""
    for part in ("config", "dataset", key):
        record = record.get(part) if isinstance(record, dict) else None
    return str(record or "")


def _positions(theirs: tuple[np.ndarray, np.ndarray], ours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the number in `ours` of each image of `theirs`, `[N]`; -1 where it has none."""
    places: Mapping[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(_keys(*ours)):
        places[key].append(place)
    seen: Counter[Any] = Counter()
    found = []
    for key in _keys(*theirs):
        same = places.get(key, [])
        found.append(same[seen[key]] if seen[key] < len(same) else -1)
        seen[key] += 1
    return np.array(found)


def _keys(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, bytes]]:
    return ((label, image.tobytes()) for label, image in zip(labels.tolist(), images, strict=True))


def _moved(path: Path, table: Certificates, found: np.ndarray, labels: np.ndarray, of: str) -> Certificates:
    """Return a table with the numbers of `found`; a `UserError` names the first line that they do not fit."""
    for image, label in zip(table.idx.tolist(), table.label.tolist(), strict=True):
        if not 0 <= image < len(found):
            raise UserError(f"match_images: {path}, image {image} is outside 0..{len(found) - 1} of {of}")
        if found[image] < 0:
            raise UserError(f"match_images: image {image} of the original files is not in {of}; give those of {of}")
        if labels[found[image]] != label:
            raise UserError(
                f"match_images: {path}, image {image}: label {label}, but {labels[found[image]]} in the original files"
                f" of {of}; give a file in their order"
            )
    return table._replace(idx=found[table.idx])

"""Image datasets that tensorflow-datasets (TFDS) has prepared.

A folder prepared as array_record is read without TensorFlow. Decoded arrays are cached: decoding takes seconds, a load
from the cache milliseconds.
"""

import hashlib
import importlib.util
import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from rs_consistency.common.errors import UserError, first_line, note
from rs_consistency.common.files import cache_folder, local_path, replace_atomically
from rs_consistency.common.progress import progress_bar

_TFDS_NAMES = {"svhn": "svhn_cropped", "imagenet": "imagenet2012"}  # if different from the names here


def read(name: str, split: str, data_dir: str, cache_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[N, H, W, C]` and labels `[N]` of a split, from the cache or the prepared folder.

    Raises:
      UserError: when the dataset is not prepared, cannot be read here, or is damaged.
    """
    prepared = find_prepared(name, resolve_data_dir(data_dir))
    folder = local_path(cache_dir, "cache_dir") if cache_dir else cache_folder()
    cached = folder / f"{name}-{split}-{_fingerprint(prepared)}.npz"
    arrays = _read_cache(cached)
    if arrays is None:
        arrays = _decode(name, split, prepared)
        _write_cache(cached, *arrays)
    return arrays


def resolve_data_dir(data_dir: str) -> Path:
    """Return the TFDS folder: the argument, else `$TFDS_DATA_DIR`, else TFDS's own default."""
    if data_dir:
        return local_path(data_dir, "data_dir")
    return local_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "TFDS_DATA_DIR")


def tfds_name(name: str) -> str:
    """Return the name of a dataset in tensorflow-datasets."""
    return _TFDS_NAMES.get(name, name)


def find_prepared(name: str, data_dir: Path) -> Path:
    """Return the newest prepared version of a dataset below a TFDS folder.

    Raises:
      UserError: when there is none. It comes at once: the folder is listed, and no network is used.
    """
    versions = prepared_versions(name, data_dir)
    if not versions:
        raise UserError(
            f"dataset.name={name!r} is not prepared in {data_dir}; prepare it with"
            f" `{prepare_command(name)} --data_dir={data_dir}`, or set"
            " TFDS_DATA_DIR or data_dir (--config.dataset.data_dir of train.py, --data_dir of certify.py) to the folder"
            " that has it (mnist_subset needs no preparation)"
        )
    return versions[-1]


def prepared_versions(name: str, data_dir: Path) -> list[Path]:
    """Return the folders of a dataset's prepared versions, oldest first."""
    versions = [path.parent for path in (data_dir / tfds_name(name)).glob("*/dataset_info.json")]
    return sorted(versions, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.name.split(".")])


def file_format(prepared: Path) -> str:
    """Return the file format of a prepared folder, such as `array_record`. Raise a `UserError` if it is damaged."""
    try:
        return json.loads((prepared / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{prepared / 'dataset_info.json'} is unreadable ({error}); move {prepared} away") from None


def _fingerprint(prepared: Path) -> str:
    """Return a digest of the prepared files' names, sizes and modification times."""
    sha = hashlib.sha256(str(prepared.resolve()).encode())
    for path in sorted(prepared.iterdir()):
        stat = path.stat()
        sha.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again


def _write_cache(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, labels=labels)
    except OSError as error:
        note(f"decoded images are not cached ({error}); set --config.dataset.cache_dir, or make it writable")


def _decode(name: str, split: str, prepared: Path) -> tuple[np.ndarray, np.ndarray]:
    stored_as = file_format(prepared)
    if stored_as != "array_record" and importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{prepared} is stored as {stored_as}, which only TensorFlow reads, and TensorFlow is not installed;"
            f" `pip install tensorflow-cpu`, or prepare it in another folder: {prepare_command(name)} --data_dir=..."
        )
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    try:
        builder = tfds.builder_from_directory(prepared)
        decoders = {"image": tfds.decode.SkipDecoding()}  # PIL decodes 6 times faster than TFDS
        if stored_as == "array_record":
            source = builder.as_data_source(split=split, decoders=decoders)
            records = source.__getitems__(range(len(source)))  # one by one takes 5 times as long
        else:
            records = list(tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)))
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(_decode_image, (record["image"] for record in records))
            with progress_bar(f"decoding {name} ({split})", len(records), brief=True, iterable=decoded) as bar:
                images = np.stack(list(bar))
        labels = np.asarray([record["label"] for record in records], np.int32)
    except Exception as error:  # the readers raise many kinds for a damaged file
        raise unreadable(f"{prepared} ({split})", first_line(error), name) from error
    return images, labels


def _decode_image(encoded: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(encoded)), np.uint8)
    return image[..., None] if image.ndim == 2 else image  # [H, W, C]


def unreadable(source: Path | str, reason: str, name: str) -> UserError:
    """Return the error for a damaged folder of a dataset."""
    return UserError(f"{source} is unreadable: {reason}; move it away and prepare it again: {prepare_command(name)}")


def prepare_command(name: str) -> str:
    """Return the command that prepares a dataset."""
    return f"python -m rs_consistency.cli.prepare {name}"

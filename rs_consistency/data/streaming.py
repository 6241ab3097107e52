"""Large image datasets, read from a prepared TFDS folder during training: ImageNet does not fit into memory.

    split = open_split("imagenet", "train", "", image_shape=(224, 224, 3), num_classes=1000)
    with training_batches(split, seed=0, batch_size=256, steps_per_epoch=5005, first_step=0, num_steps=450450,
                          num_workers=16) as batches:
        for images, labels in batches:           # uint8 [B, S, S, 3], int32 [B]

Grain prefetches and PIL decodes; TensorFlow is not needed. A training batch is a function of the seed, the step and
the data. It depends neither on the number of workers nor on the step at which the iterator started.
"""

import functools
import gc
import hashlib
import io
import math
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2  # tf.train.Example, without TensorFlow

from rs_consistency.common.errors import UserError, first_line, note
from rs_consistency.data.crops import TrainingOrder, Visit, central_crop, random_crop, uniform
from rs_consistency.data.tfds import file_format, find_prepared, prepare_command, resolve_data_dir, unreadable

Batch = tuple[np.ndarray, np.ndarray]

_THREADS = min(8, os.cpu_count() or 1)
# The most in shared memory: a batch being made, in the worker's queue, taken out of the queue, and being copied.
_BATCHES_PER_WORKER = 4
_OTHER_OPEN_FILES = 512
_PROFILING = "grain_enable_multiprocess_worker_profiling"

# Some of ImageNet's photographs have odd EXIF data, which nothing here uses.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)


@dataclass(frozen=True)
class StreamedSplit:
    """A split of a prepared dataset, whose examples are read on demand. It can be pickled."""

    name: str  # of dataset and split, for messages
    split: str  # TFDS's name
    folder: Path  # of the prepared version
    image_shape: tuple[int, int, int]  # (S, S, 3) of the decoded images
    num_classes: int
    files: list[Path]
    records: ArrayRecordDataSource  # of all files

    def __len__(self) -> int:
        return len(self.records)

    def digest(self) -> str:
        """Return a SHA-256, as a hexadecimal string, that identifies the data without reading them.

        It covers the split's name, the names and sizes of its files, and TFDS's description of the dataset, but neither
        the folder's path nor any time.
        """
        sha = hashlib.sha256(self.split.encode())
        for path in sorted(self.files):
            sha.update(f"\n{path.name} {path.stat().st_size}".encode())
        for name in ("dataset_info.json", "features.json"):
            sha.update(f"\n{name} {hashlib.sha256((self.folder / name).read_bytes()).hexdigest()}".encode())
        return sha.hexdigest()

    def read(self, indices: Sequence[int]) -> Batch:
        """Return examples by number, in 0..N-1, decoded for evaluation.

        The images are uint8 `[B, S, S, 3]`, as `central_crop` makes them, and the labels int32 `[B]`. Errors are as for
        `decode`.
        """
        images, labels = np.empty((len(indices), *self.image_shape), np.uint8), np.empty(len(indices), np.int32)

        def read_one(row: int) -> None:
            images[row], labels[row] = self.decode(int(indices[row]), central_crop)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read_one, range(len(indices))))
        return images, labels

    def read_labels(self, indices: Sequence[int]) -> np.ndarray:
        """Return the labels int32 `[B]` of examples by number, without decoding an image."""
        with ThreadPoolExecutor(_THREADS) as pool:
            labels = pool.map(lambda index: self._example(int(index), lambda _: None)[1], indices)
            return np.array(list(labels), np.int32)

    def decode(self, index: int, fit: Callable[[Image.Image, int], Image.Image]) -> tuple[np.ndarray, np.int32]:
        """Return an example: the image `[S, S, 3]`, as `fit(image, S)` makes it, and the label.

        Raise a `UserError` for a damaged example, or a label out of range.
        """

        def pixels(content: bytes) -> np.ndarray:
            with Image.open(io.BytesIO(content)) as image:
                # A few of ImageNet's images are grey or CMYK.
                return np.asarray(fit(image if image.mode == "RGB" else image.convert("RGB"), self.image_shape[0]))

        return self._example(index, pixels)

    def _example(self, index: int, of_image: Callable[[bytes], Any]) -> tuple[Any, np.int32]:
        """Return `of_image` of the encoded image, and the label; errors are as for `decode`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: example {index} is outside 0..{len(self) - 1}")
        try:
            features = tf_example_pb2.Example.FromString(self.records[index]).features.feature
            label = features["label"].int64_list.value[0]
            found = of_image(features["image"].bytes_list.value[0])
        except Exception as error:  # array_record, protobuf and PIL raise many kinds
            raise UserError(
                f"{self.name}: example {index} is unreadable: {first_line(error)}; move {self.folder} away and prepare"
                " it again"
            ) from None
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.name}: label {label} of example {index} is outside 0..{self.num_classes - 1}."
                " Prepare the dataset again"
            )
        return found, np.int32(label)


def open_split(
    name: str, tfds_split: str, data_dir: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> StreamedSplit:
    """Open a split of a dataset that TFDS has prepared as array_record.

    The dataset has its name here or in TFDS, the split TFDS's, such as `validation`. An empty data_dir stands for
    TFDS's own (`resolve_data_dir`). Raise a `UserError` for a dataset that is not prepared, has another format, lacks
    the split, or is damaged.
    """
    if image_shape[0] != image_shape[1] or image_shape[2] != 3:
        raise UserError(f"image_shape={image_shape} cannot be streamed; use (S, S, 3)")
    folder = find_prepared(name, resolve_data_dir(data_dir))
    stored_as = file_format(folder)
    if stored_as != "array_record":
        raise UserError(
            f"{folder} is stored as {stored_as}, and only array_record can be streamed; prepare it in another folder:"
            f" {prepare_command(name)} --data_dir=..."
        )
    try:
        splits = tfds.builder_from_directory(folder).info.splits
        shards = splits[tfds_split].file_instructions if tfds_split in splits else []
    except Exception as error:  # TFDS raises many kinds for a damaged description
        raise unreadable(folder, first_line(error), name) from error
    if not shards:
        raise UserError(f"{folder} has no split {tfds_split!r}; use one of {', '.join(sorted(splits))}")
    files = [Path(shard.filename) for shard in shards]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise unreadable(folder, f"{missing[0]} is missing", name)
    _allow_open_files(len(files) + _OTHER_OPEN_FILES)
    records = ArrayRecordDataSource(shards)
    return StreamedSplit(f"{name} ({tfds_split})", tfds_split, folder, image_shape, num_classes, files, records)


def _allow_open_files(needed: int) -> None:
    """Raise the soft limit if it is lower: all shards stay open, 1,024 of ImageNet, and 1,024 is a usual limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Batches(Iterator[Batch], AbstractContextManager):
    """Batches that threads or worker processes make ahead, starting at construction.

    Use it in a `with` block, or `close` it, so that the workers end. They also end after the last batch.
    """

    def __init__(self, batches: grain.MapDataset, split: StreamedSplit, batch_size: int, num_workers: int) -> None:
        num_workers = min(num_workers, len(batches))
        if num_workers:
            # Each worker makes its batches one after the other, in a single thread.
            read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            batch_bytes = batch_size * math.prod(split.image_shape)
            dataset = _through_pipes_if_needed(batches.to_iter_dataset(read), num_workers, batch_bytes)
            workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
            # Grain reads this flag of absl, which refuses to answer before it has parsed a command line. The programs
            # here have no absl flags. `present` makes absl answer with the default, no, as Grain does in its workers.
            if not flags.FLAGS.is_parsed() and _PROFILING in flags.FLAGS:
                flags.FLAGS[_PROFILING].present = 1
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
        else:
            read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
            dataset = batches.to_iter_dataset(read)
        self._iterator = iter(dataset)
        # Batches are copied out of a worker's shared memory at once, so the caller may keep any number of them, for as
        # long as it likes.
        self._own = np.array if num_workers else np.asarray
        # Ctrl-C goes to all processes of the terminal. Workers leave it to this process, which closes them: they
        # inherit the blocked signal from the thread that starts them. Python's resource tracker unblocks the signal in
        # the thread that starts the tracker, which must be another thread.
        resource_tracker.ensure_running()
        self._thread = ThreadPoolExecutor(1, "batches", signal.pthread_sigmask, (signal.SIG_BLOCK, [signal.SIGINT]))
        self._pending: Future[Batch | None] | None = self._thread.submit(self._take)  # None if closed

    def _take(self) -> Batch | None:
        batch = next(self._iterator, None)
        return batch and (self._own(batch[0]), self._own(batch[1]))

    def __next__(self) -> Batch:
        if self._pending is None:
            raise StopIteration
        try:
            batch = self._pending.result()
        except UserError as error:
            self.close()
            raise UserError(str(error)) from None  # without the notes that Grain adds
        except Exception:
            self.close()
            raise
        if batch is None:
            self.close()
            raise StopIteration
        self._pending = self._thread.submit(self._take)
        return batch

    def close(self) -> None:
        """End threads and worker processes, after the batches that they are making."""
        if self._pending is None:
            return
        self._pending = None
        with self._thread:
            self._thread.submit(self._iterator.close).result()
        # Grain's last exceptions refer to the last batches. Unless they are collected now, Python's resource tracker
        # finds their shared memory when the program ends, and warns.
        self._iterator = None
        gc.collect()

    def __exit__(self, *_: object) -> None:
        self.close()


def training_batches(
    split: StreamedSplit,
    *,
    seed: int,
    batch_size: int,
    steps_per_epoch: int,
    first_step: int,
    num_steps: int,
    num_workers: int,
) -> Batches:
    """Return augmented batches of the global steps first_step, ..., num_steps - 1.

    A batch holds images uint8 `[B, S, S, 3]` and labels int32 `[B]`; a damaged example is a `UserError`. With
    num_workers = 0, threads of this process make the batches.

    Step s belongs to epoch s // steps_per_epoch. An epoch is a permutation of all examples, a function of the seed and
    the epoch. After its end it starts over, so that the last batch of an epoch is full. An image is cropped at random
    (8 to 100% of the area, log-uniform ratio within 3/4 and 4/3), resized to `[S, S]` and flipped with probability
    1/2, as a function of the seed, the epoch and the position in the epoch.
    """
    order = TrainingOrder(len(split), seed, batch_size * steps_per_epoch, batch_size * num_steps)
    batches = grain.MapDataset.source(order).map(functools.partial(_augmented, split, seed))
    return Batches(batches.batch(batch_size)[first_step:], split, batch_size, num_workers)


def evaluation_batches(split: StreamedSplit, *, batch_size: int, num_workers: int) -> Batches:
    """Return batches of all examples in order, decoded as by `StreamedSplit.read`. The last batch may be shorter."""
    batches = grain.MapDataset.source(range(len(split))).map(functools.partial(split.decode, fit=central_crop))
    return Batches(batches.batch(batch_size), split, batch_size, num_workers)


def _augmented(split: StreamedSplit, seed: int, visit: Visit) -> tuple[np.ndarray, np.int32]:
    """Read an example for training."""
    index, epoch, position = visit
    draws = uniform(seed, epoch, position)
    return split.decode(index, lambda image, size: random_crop(image, size, draws))


def _through_pipes_if_needed(dataset: grain.IterDataset, num_workers: int, batch_bytes: int) -> grain.IterDataset:
    """Keep batches out of a shared memory that is too small for them: its overflow would kill a worker."""
    needed = num_workers * _BATCHES_PER_WORKER * batch_bytes
    shared = Path("/dev/shm")  # of Linux alone
    if not shared.exists() or (free := shutil.disk_usage(shared).free) >= needed:
        return dataset
    note(
        f"/dev/shm has {free >> 20} MiB free and {num_workers} workers may use {needed >> 20}; batches go through"
        " pipes, which is slower (docker run --shm-size=... makes room)"
    )
    options = grain.experimental.DatasetOptions(min_shm_size=2**62)
    return grain.experimental.WithOptionsIterDataset(dataset, options)


def _start_worker(index: int, count: int) -> None:
    """Run first in a worker process."""
    del index, count
    # Grain imports JAX, which nothing in a worker uses. Should it be used, it must not take memory on an accelerator.
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End the process with its parent: after a kill of the parent it would wait forever for room in its queue."""
    multiprocessing.parent_process().join()
    os._exit(1)

"""Smoothed predictions of a trained model on a training set, computed once and kept."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.common.errors import note
from rs_consistency.common.files import replace_atomically
from rs_consistency.common.progress import progress_bar
from rs_consistency.noise import Stream
from rs_consistency.smoothing.votes import VoteSettings, count_votes
from rs_consistency.training import runs
from rs_consistency.training.checkpoints import digest

FILE = "smoothed_predictions.npz"
_SECONDS_BETWEEN_SAVES = 30


def smoothed_predictions(
    config: ConfigDict,
    split: data.Split,
    teacher: Path,
    *,
    num_votes: int,
    devices: Sequence[jax.Device],
    workdir: Path | None,
) -> np.ndarray:
    """Return the share of every class in the votes of a run's smoothed classifier: `[N, K]` float32.

    Votes are kept in `workdir/smoothed_predictions.npz`, unless the workdir is None: an interrupted computation
    continues, and a finished one is read back. So the student keeps the predictions that it began with, whatever
    becomes of the teacher. The noise has the seed of the student's `config`, and the sigma that the teacher was trained
    with. The student's `workdir` belongs to one config and one training split. Raise a `UserError` when the teacher is
    needed and is not there.
    """
    path, info, total = workdir and workdir / FILE, data.dataset_info(config.dataset.name), len(split)
    none = np.zeros((0, info.num_classes), np.int64)
    counts, voter = _read(path, total, info.num_classes, num_votes) or (none, None)
    if len(counts) < total:
        run = runs.restore(teacher, devices, name="the teacher's workdir")
        settings = VoteSettings.for_dataset(
            info, sigma=run.config.sigma, n=num_votes, seed=config.seed, devices=devices
        )
        origin = f"{digest(run.variables)} {settings.sampler}"
        if voter == origin:
            note(f"{path} holds {len(counts)} images already")
        elif voter is not None:
            note(f"{path} is of another state of the teacher, or of other noise; it is made again")
            counts = counts[:0]
        done, saved = len(counts), time.monotonic()
        groups = count_votes(
            *run.classifier(),
            split.images[done:],
            np.arange(done, total),
            settings=settings,
            devices=devices,
            stream=Stream.TEACHER,
        )
        with progress_bar("teacher's votes", total, initial=done) as bar:
            for votes in groups:
                counts = np.concatenate([counts, votes.counts])
                bar.update(len(votes.counts))
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    _write(path, counts, origin)
                    saved = time.monotonic()
        _write(path, counts, origin)
    return (counts / np.float32(num_votes)).astype(np.float32)


def _write(path: Path | None, counts: np.ndarray, origin: str) -> None:
    if path is None:
        return
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, counts=counts, teacher=origin)


def _read(path: Path | None, total: int, num_classes: int, num_votes: int) -> tuple[np.ndarray, str] | None:
    """Return votes `[D, K]` on the first D images and their origin; None if the file is absent or damaged."""
    if path is None or not path.exists():
        return None
    try:
        if not path.is_file():  # a pipe may have no end
            raise ValueError
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if sum(part.file_size for part in arrays.zip.infolist()) > total * num_classes * 8 + 2**16:
                raise ValueError  # more than it holds where it is whole
            counts, origin = arrays["counts"], str(arrays["teacher"])
        fits = np.issubdtype(counts.dtype, np.integer) and counts.ndim == 2 and counts.shape[1] == num_classes
        if not fits or len(counts) > total or (counts < 0).any() or (counts.sum(axis=1) != num_votes).any():
            raise ValueError
    except Exception:  # NumPy and zipfile raise many kinds for a damaged file
        note(f"{path} is unreadable; it is made again")
        return None
    return counts, origin

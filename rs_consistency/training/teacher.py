"""Smoothed predictions of a trained model on a training set, computed once and kept."""

import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    workdir: Path,
) -> np.ndarray:
    """Return the share of every class in the votes of a run's smoothed classifier on every training image.

    Votes are kept in `workdir/smoothed_predictions.npz`: an interrupted computation continues, and a finished one is
    read back. So the student keeps the predictions that it began with, whatever becomes of the teacher.

    Args:
      config: the student's config; its seed is the seed of the votes' noise.
      split: the student's training images.
      teacher: the teacher's workdir; votes are at the sigma that it was trained with.
      num_votes: votes for each image.
      devices: the devices that share the work.
      workdir: the student's workdir, which belongs to one config and one training split.

    Returns:
      `[N, K]` float32; rows add up to 1.

    Raises:
      UserError: when the teacher is needed and is not there.
    """
    path, info = workdir / FILE, data.dataset_info(config.dataset.name)
    kept = _read(path)
    if kept is None or len(kept.counts) < len(split):
        run = runs.restore(teacher, devices, name="the teacher's workdir")
        teacher_digest = digest(run.variables)
        if kept is not None and kept.teacher == teacher_digest:
            note(f"{path} holds {len(kept.counts)} images already")
        else:
            if kept is not None:
                note(f"{path} is of another state of the teacher; it is made again")
            kept = _Kept(np.zeros((0, info.num_classes), np.int64), teacher_digest)
        settings = VoteSettings.for_dataset(
            info, sigma=run.config.sigma, n=num_votes, seed=config.seed, platform=devices[0].platform
        )
        kept = _vote(run, split, kept, settings, devices, path)
    return (kept.counts / np.float32(num_votes)).astype(np.float32)


class _Kept(NamedTuple):
    """The content of the file: votes `[D, K]` on the first D images, and the digest of the teacher's variables."""

    counts: np.ndarray
    teacher: str


def _vote(
    run: runs.Run, split: data.Split, kept: _Kept, settings: VoteSettings, devices: Sequence[jax.Device], path: Path
) -> _Kept:
    """Return the votes on all images; save them now and then, and at the end."""
    done, total, saved = len(kept.counts), len(split), time.monotonic()
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
            kept = kept._replace(counts=np.concatenate([kept.counts, votes.counts]))
            bar.update(len(votes.counts))
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _write(path, kept)
                saved = time.monotonic()
    _write(path, kept)
    return kept


def _write(path: Path, kept: _Kept) -> None:
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **kept._asdict())


def _read(path: Path) -> _Kept | None:
    """Return the content of the file; None where it is absent or damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return _Kept(arrays["counts"], str(arrays["teacher"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        note(f"{path} is unreadable; it is made again")
        return None

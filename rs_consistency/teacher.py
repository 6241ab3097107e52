"""Smoothed predictions of a trained model on a training set, computed once and kept."""

import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rs_consistency import data, runs, training, voting
from rs_consistency.checkpoints import digest
from rs_consistency.errors import UserError, note
from rs_consistency.files import replace_atomically
from rs_consistency.noise import Stream

FILE = "smoothed_predictions.npz"
_SECONDS_BETWEEN_SAVES = 30


def smoothed_predictions(
    config: ConfigDict,
    split: data.Split,
    teacher: str,
    *,
    num_votes: int,
    devices: Sequence[jax.Device],
    workdir: Path,
) -> np.ndarray:
    """The share of every class in the votes of a run's smoothed classifier on every training image.

    What is done is kept in `workdir/smoothed_predictions.npz`, so an interrupted computation goes on and a finished
    one is read back.

    Args:
      config: of the run that learns; its seed is that of the votes' noise.
      split: its training images.
      teacher: workdir of the run that teaches; votes are at the sigma that it was trained with.
      num_votes: for each image.
      devices: which share the work.
      workdir: of the run that learns.

    Returns:
      `[N, K]` float32; rows add up to 1.

    Raises:
      UserError: when there is no such run, or it is of another dataset.
    """
    run = runs.restore(Path(teacher).expanduser(), devices, name="the teacher's workdir")
    if run.config.dataset.name != config.dataset.name:
        raise UserError(
            f"the teacher {teacher} was trained on {run.config.dataset.name}, this run is on {config.dataset.name};"
            " give a teacher of the same dataset"
        )
    info = data.dataset_info(config.dataset.name)
    identity = f"{digest(run.variables)} {data.digest(split)} {run.config.sigma} {num_votes} {config.seed}"
    path = workdir / FILE
    found = _read(path, identity, info.num_classes)
    if len(found) < len(split.labels):
        if len(found):
            note(f"{path} holds {len(found)} images already")
        found = _vote(run, split, found, num_votes, config.seed, devices, path, identity)
    return (found / np.float32(num_votes)).astype(np.float32)


def _vote(
    run: runs.Run,
    split: data.Split,
    found: np.ndarray,
    num_votes: int,
    seed: int,
    devices: Sequence[jax.Device],
    path: Path,
    identity: str,
) -> np.ndarray:
    info = data.dataset_info(run.config.dataset.name)
    settings = voting.vote_settings(
        sigma=run.config.sigma, num_classes=info.num_classes, n0=0, n=num_votes, seed=seed, batch_size=None,
        image_shape=info.image_shape, platform=devices[0].platform, least_n0=0,
    )  # fmt: skip
    model = training.make_model(run.config)
    done, total = len(found), len(split.labels)
    groups = voting.count_votes(
        lambda variables, images: model.apply(variables, images, train=False),
        run.variables,
        split.images[done:],
        np.arange(done, total),
        settings=settings,
        devices=devices,
        stream=Stream.TEACHER,
    )
    counts, saved = [found], time.monotonic()
    seconds_between_lines = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_SAVES
    bar = tqdm(
        total=total, initial=done, desc="teacher's votes", unit="img", mininterval=seconds_between_lines,
        delay=0 if sys.stderr.isatty() else seconds_between_lines,
    )  # fmt: skip
    with bar:
        for votes in groups:
            counts.append(votes.counts)
            bar.update(len(votes.counts))
            if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                _write(path, identity, np.concatenate(counts))
                saved = time.monotonic()
    found = np.concatenate(counts)
    _write(path, identity, found)
    return found


def _write(path: Path, identity: str, counts: np.ndarray) -> None:
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, identity=identity, counts=counts)


def _read(path: Path, identity: str, num_classes: int) -> np.ndarray:
    """Counts `[D, K]` of the first D images; D is 0 where the file is absent, damaged or of another teacher."""
    nothing = np.zeros((0, num_classes), np.int64)
    if not path.exists():
        return nothing
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            if str(arrays["identity"]) == identity:
                return arrays["counts"]
        reason = "is of another teacher or other data"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        reason = "is unreadable"
    note(f"{path} {reason}; it is made again")
    return nothing

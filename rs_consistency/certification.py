"""Certification of a smoothed classifier as a library: for any JAX function."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from rs_consistency import parallel, voting
from rs_consistency.bounds import certified_radius, lower_confidence_bound
from rs_consistency.errors import UserError

ABSTAIN = -1
_MOST_VOTES = 2**30  # row numbers are int32 on the devices


class Certification(NamedTuple):
    """What `certify` returns for B images.

    Attributes:
      prediction: `[B]` int64, the certified class; `ABSTAIN` (-1) where there is none.
      radius: `[B]` float64, certified l2 radius in units of the images; 0 where it abstains.
      counts0: `[B, K]` int64, the n0 votes that chose the class.
      counts: `[B, K]` int64, the n further votes that measured it.
    """

    prediction: np.ndarray
    radius: np.ndarray
    counts0: np.ndarray
    counts: np.ndarray


def certify(
    apply_fn: Callable[[jax.Array], jax.Array],
    images: ArrayLike,
    *,
    sigma: float,
    num_classes: int,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Certification:
    """Certifies the smoothed version of a classifier on some images.

    The smoothed classifier predicts the class that `apply_fn` gives most often under noise N(0, sigma^2 I).

    Guarantee: for each image, with probability at least 1 - alpha over the noise, either the prediction is
    `ABSTAIN`, or the smoothed classifier predicts it at every point within l2 distance `radius` of the image. The
    statement is about one image; over many of them, expect a share of up to alpha to be wrong.

    Source: CERTIFY of Cohen, Rosenfeld, Kolter (ICML 2019): n0 votes choose the class (the lowest of equals), n further
    and independent votes bound its probability from below by Clopper-Pearson, `radius = sigma * Phi^-1(p_A)`;
    p_A < 1/2 abstains.

    Args:
      apply_fn: a function that JAX can trace, `[N, H, W, C]` float32 -> logits `[N, K]`; normalization is part of it.
      images: `[B, H, W, C]`, in [0, 1].
      sigma: standard deviation of the noise, in units of the images.
      num_classes: K.
      n0: votes that choose the class.
      n: votes that measure it; the largest possible radius is `sigma * Phi^-1(alpha ** (1 / n))`.
      alpha: error probability of one image's statement.
      seed: of the noise.
      batch_size: noisy images at a time; None for a choice by device. No effect on the votes.
      indices: `[B]`, numbers that address the images' noise, 0..B-1 by default. The votes of an image are a function
        of seed, index, sigma and vote number, whatever else is certified with it.
      devices: local devices that share the work; None for all.
      progress: show a progress bar on stderr.

    Returns:
      NumPy arrays, see `Certification`.

    Raises:
      UserError: a `ValueError`, for settings or images outside their range, a model that does not fit
        images and num_classes, or one that gives NaN.
    """
    images = check_images(images)
    check_settings(sigma=sigma, n0=n0, n=n, alpha=alpha, seed=seed, batch_size=batch_size, num_classes=num_classes)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != (len(images),) or (indices < 0).any():
        raise UserError(
            f"indices has shape {indices.shape}; give one number of at least 0 for each of {len(images)} images"
        )
    devices = parallel.choose_devices() if devices is None else list(devices)

    groups = voting.count_votes(
        lambda _, batch: apply_fn(batch), (), images, indices, sigma=sigma, num_classes=num_classes, n0=n0, n=n,
        seed=seed, batch_size=batch_size or voting.default_batch_size(devices[0].platform), devices=devices,
    )  # fmt: skip
    found: list[voting.Votes] = []
    with tqdm(total=len(images), desc="certifying", unit="img", disable=not progress) as bar:
        for votes in groups:
            found.append(votes)
            bar.update(len(votes.counts))
    counts0 = np.concatenate([np.zeros((0, num_classes), np.int64), *(votes.counts0 for votes in found)])
    counts = np.concatenate([np.zeros((0, num_classes), np.int64), *(votes.counts for votes in found)])
    return conclude(counts0, counts, alpha=alpha, sigma=sigma)


def conclude(counts0: np.ndarray, counts: np.ndarray, *, alpha: float, sigma: float) -> Certification:
    """Prediction and radius from the votes `[B, K]`; see `certify`."""
    selected = counts0.argmax(axis=1)
    for_selected = np.take_along_axis(counts, selected[:, None], axis=1)[:, 0]
    n = counts.sum(axis=1)
    certified = lower_confidence_bound(for_selected, n, alpha) >= 0.5
    radius = np.where(certified, certified_radius(for_selected, n, alpha, sigma), 0.0)
    return Certification(np.where(certified, selected, ABSTAIN), radius, counts0, counts)


def check_images(images: ArrayLike) -> np.ndarray:
    """float32 `[B, H, W, C]`; a `UserError` when they are not that, or not in [0, 1]."""
    images = np.asarray(images)
    if images.ndim != 4:
        raise UserError(f"images has shape {images.shape}; it must be [B, H, W, C], one image being images[None]")
    if images.size and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images lie in [{images.min()}, {images.max()}]; they must be in [0, 1] (divide uint8 images by 255)"
        )
    return images.astype(np.float32)


def check_settings(
    *, sigma: float, n0: int, n: int, alpha: float, seed: int, batch_size: int | None, num_classes: int
) -> None:
    """Raises a `UserError` for the first setting that cannot work."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise UserError(f"sigma={sigma}: use a number greater than 0, normally the one used in training")
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha}: use a number in (0, 1), such as 0.001")
    for name, value in {"n0": n0, "n": n, "num_classes": num_classes, "batch_size": batch_size}.items():
        if value is not None and (int(value) != value or value < 1):
            raise UserError(f"{name}={value}: use a whole number of at least 1")
    if n0 + n > _MOST_VOTES:
        raise UserError(f"n0={n0} and n={n}: use at most {_MOST_VOTES} votes for an image")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: use a whole number from 0 to 2**32 - 1")

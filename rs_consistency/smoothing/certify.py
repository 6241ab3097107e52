"""Certification of a smoothed classifier as a library: for any JAX function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from rs_consistency import noise
from rs_consistency.common.checks import MAX_INDEX, one_of, probability
from rs_consistency.common.errors import UserError
from rs_consistency.devices import parallel
from rs_consistency.smoothing.votes import Votes, VoteSettings, count_votes, vote_settings
from rs_consistency.statistics.bounds import ABSTAIN, ALPHA, BOUNDS, N0, N, certify_votes, most_of_others


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
    n0: int = N0,
    n: int = N,
    alpha: float = ALPHA,
    bound: str = BOUNDS[0],
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
      alpha: error probability of one image's statement, in (0, 1), at least 1e-100.
      bound: how votes become a radius, one of `bounds.BOUNDS`: the published `clopper_pearson` described above,
        `two_class` or `randomized`. Its guarantee is the same; it must be chosen before the votes are seen.
      seed: of the noise, and of the draws of `randomized`.
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
    alpha = probability("alpha", alpha)
    one_of("bound", bound, BOUNDS)
    task = prepare(
        images,
        indices,
        devices,
        sigma=sigma,
        num_classes=num_classes,
        n0=n0,
        n=n,
        seed=seed,
        batch_size=batch_size,
    )
    votes = task.all_votes(apply_fn, noise.Stream.CERTIFY, "certifying" if progress else None)
    uniform = noise.bound_uniform(task.settings.seed, task.indices) if bound == "randomized" else None
    return conclude(*votes, alpha=alpha, sigma=task.settings.sigma, bound=bound, uniform=uniform)


class Task(NamedTuple):
    """Checked images, and what to do with them; from `prepare`.

    Attributes:
      images: `[B, H, W, C]` float32.
      indices: `[B]` int64.
      devices: that share the work.
      settings: of the votes.
    """

    images: np.ndarray
    indices: np.ndarray
    devices: list[jax.Device]
    settings: VoteSettings

    def all_votes(
        self, apply_fn: Callable[[jax.Array], jax.Array], stream: noise.Stream, progress: str | None
    ) -> Votes:
        """The counts of all images; `progress` is the name of a progress bar on stderr, if there is to be one."""
        groups = count_votes(
            lambda _, batch: apply_fn(batch),
            (),
            self.images,
            self.indices,
            settings=self.settings,
            devices=self.devices,
            stream=stream,
        )
        found: list[Votes] = []
        with tqdm(total=len(self.images), desc=progress, unit="img", disable=progress is None) as bar:
            for votes in groups:
                found.append(votes)
                bar.update(len(votes.counts))
        none = np.zeros((0, self.settings.num_classes), np.int64)
        return Votes(
            np.concatenate([none, *(votes.counts0 for votes in found)]),
            np.concatenate([none, *(votes.counts for votes in found)]),
        )


def prepare(
    images: ArrayLike, indices: ArrayLike | None, devices: Sequence[jax.Device] | None, **settings: Any
) -> Task:
    """Checked arguments of `certify` and its like; `settings` are those of `votes.vote_settings`.

    Raises:
      UserError: for the first argument that cannot work.
    """
    images = check_images(images)
    indices = check_indices(indices, len(images))
    devices = parallel.choose_devices() if devices is None else list(devices)
    if not devices:
        raise UserError("devices=[]: give at least one, or None for all")
    checked = vote_settings(**settings, image_shape=images.shape[1:], platform=devices[0].platform)
    return Task(images, indices, devices, checked)


def conclude(
    counts0: np.ndarray,
    counts: np.ndarray,
    *,
    alpha: float,
    sigma: float,
    bound: str = BOUNDS[0],
    uniform: np.ndarray | None = None,
) -> Certification:
    """Prediction and radius from the votes `[B, K]`; see `certify`, and `bounds.certify_votes` for `uniform`."""
    selected = counts0.argmax(axis=1)
    for_selected = np.take_along_axis(counts, selected[:, None], axis=1)[:, 0]
    runner_up = most_of_others(counts, selected)
    proven = certify_votes(
        for_selected, runner_up, counts.sum(axis=1), alpha=alpha, sigma=sigma, bound=bound, uniform=uniform
    )
    return Certification(np.where(proven.certified, selected, ABSTAIN), proven.radius, counts0, counts)


def check_images(images: ArrayLike) -> np.ndarray:
    """float32 `[B, H, W, C]`; a `UserError` when they are not that, or not in [0, 1]."""
    images = np.asarray(images)
    if not (np.issubdtype(images.dtype, np.number) or images.dtype == bool):
        raise UserError(f"images are of type {images.dtype}; they must be numbers in [0, 1]")
    if images.ndim != 4:
        raise UserError(f"images has shape {images.shape}; it must be [B, H, W, C], one image being images[None]")
    if images.size and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images lie in [{images.min()}, {images.max()}]; they must be in [0, 1] (divide uint8 images by 255)"
        )
    return images.astype(np.float32)


def check_indices(indices: ArrayLike | None, num_images: int) -> np.ndarray:
    """int64 `[B]`, 0..B-1 for None; a `UserError` when they cannot number the images."""
    if indices is None:
        return np.arange(num_images)
    array = np.asarray(indices)
    if array.shape != (num_images,):
        raise UserError(f"indices has shape {array.shape}; give one number for each of {num_images} images")
    if array.size and not (np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() <= MAX_INDEX):
        raise UserError(f"indices={array}: use whole numbers from 0 to {MAX_INDEX}")
    return array.astype(np.int64)

"""Certification of the smoothed version of any JAX function."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from rs_consistency import noise
from rs_consistency.common.checks import PRECISIONS, one_of, probability
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.images import prepare
from rs_consistency.statistics.allocation import pilot_votes, votes_for_tolerance
from rs_consistency.statistics.bounds import (
    ABSTAIN,
    ALPHA,
    BOUNDS,
    N,
    certify_votes,
    check_counts,
    most_of_others,
    share_of,
)
from rs_consistency.statistics.limits import check_certificates
from rs_consistency.statistics.samplers import GRID


class Certification(NamedTuple):
    """The certificates of B images.

    Attributes:
      prediction: `[B]` int64, the certified class; `ABSTAIN` (-1) without a certificate.
      radius: `[B]` float64, certified l2 radius in units of the images; 0 without a certificate.
      counts0: `[B, K]` int64, the n0 votes of the selection.
      counts: `[B, K]` int64, the n votes of the estimation; with a tolerance they may be fewer.
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
    n0: int | None = None,
    n: int = N,
    alpha: float = ALPHA,
    bound: str = BOUNDS[0],
    alpha_share: float | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    sampler: str = GRID,
    precision: str = PRECISIONS[0],
    batch_size: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
) -> Certification:
    """Certify the smoothed version of a classifier on some images.

    The smoothed classifier predicts the class that `apply_fn` gives most often under noise N(0, sigma^2 I).

    Guarantee: for each image, with probability at least 1 - alpha over the noise, either the prediction is
    `ABSTAIN`, or the smoothed classifier predicts it at every point within l2 distance `radius` of the image. The
    statement is about one image; over many images, expect a share of up to alpha to be wrong. With the sampler "grid"
    it holds as stated, for the classifier that rounds its noisy input to the grid of 8-bit images: docs/certificate.md
    has the theorem and its two assumptions. With "float" it holds only as far as floating-point numbers are taken for
    real numbers, and a network that was made for it can have false certificates.

    Source: CERTIFY of Cohen, Rosenfeld, Kolter (ICML 2019). n0 votes select the class, the lowest of equals. n further
    and independent votes bound its probability from below by Clopper-Pearson. The radius is `sigma * Phi^-1(p_A)`;
    p_A < 1/2 abstains.

    A linear classifier, whose true radius is the distance to its plane, 1.6 for both images:

    >>> import numpy as np
    >>> from rs_consistency import certify
    >>> is_bright = lambda images: (images.mean(axis=(1, 2)) - 0.5) * np.float32([[-1, 1]])
    >>> images = np.stack([np.full((4, 4, 1), level, np.uint8) for level in (25, 230)])
    >>> result = certify(is_bright, images, sigma=0.5, num_classes=2, n0=10, n=100)
    >>> result.prediction, result.radius.round(3), result.counts.shape
    (array([0, 1]), array([0.75, 0.75]), (2, 2))

    Args:
      apply_fn: function that JAX can trace, `[N, H, W, C]` float32 -> logits `[N, K]`; it includes any normalization.
      images: `[B, H, W, C]`, uint8, or numbers in [0, 1]; for the sampler "grid", whole multiples of 1/255.
      sigma: standard deviation of the noise, in units of the images.
      num_classes: K.
      n0: votes that select the class; None for 100, or 1000 with a tolerance.
      n: votes that measure its probability; the largest possible radius is `sigma * Phi^-1(alpha ** (1 / n))`.
      alpha: error probability of one image's statement, in (0, 1), at least 1e-100.
      bound: rule from votes to radius, one of `bounds.BOUNDS`: the published `clopper_pearson` described above,
        `two_class` or `randomized`. All have the same guarantee. Choose one before you see the votes.
      alpha_share: share of alpha that bounds p_A, for `two_class`; None for 0.99.
      tolerance: largest loss of radius that you accept for fewer votes, in units of the images; None for n votes on
        every image. The n0 votes then also choose a number of further votes, at most n: the fewest whose expected
        radius is within the tolerance of that of n votes. The guarantee stays. See `statistics.allocation`.
      seed: seed of the noise, and of the draws of `randomized`.
      sampler: "grid", noise rounded to steps of 1/255, or "float", float32 noise; see `statistics.samplers`.
      precision: "highest", float32 products of the network in full float32, or "default", as fast as the device can:
        in bfloat16 on a TPU, in TF32 on a GPU. A CPU knows no difference.
      batch_size: noisy images at a time; None for a choice by device. It can only decide near-ties.
      indices: `[B]`, numbers that address the images' noise, 0..B-1 by default. The votes of an image are a function
        of seed, index, sigma and vote number; the other images have no effect.
      devices: local devices that share the work; None for all.
      progress: whether to show a progress bar on stderr.

    Returns:
      NumPy arrays, see `Certification`.

    Raises:
      UserError: a `ValueError`, for settings or images outside their range, or a model that does not fit images and
        num_classes, or gives NaN.
    """
    alpha = probability("alpha", alpha)
    one_of("bound", bound, BOUNDS)
    shared = {"alpha": alpha, "bound": bound, "alpha_share": share_of(alpha_share, bound=bound)}
    n0 = pilot_votes(n0, tolerance=tolerance, bound=bound, n=n)
    settings = {"sigma": sigma, "num_classes": num_classes, "n0": n0, "n": n, "seed": seed, "batch_size": batch_size}
    settings |= {"sampler": sampler, "precision": precision, "progress": progress}
    task = prepare(apply_fn, images, indices, devices, least_n0=1, **settings)
    law, plan = task.settings.law._asdict(), None
    check_certificates(task.settings.n, **shared, slack=law["slack"])
    if tolerance is not None:
        asked = {"n0": task.settings.n0, "n": task.settings.n, "tolerance": tolerance, "alpha": alpha}
        plan = functools.partial(votes_for_tolerance, **asked, **law)
    votes = task.all_votes(apply_fn, noise.Stream.CERTIFY, "certifying", progress, plan=plan)
    uniform = noise.bound_uniform(task.settings.seed, task.indices) if bound == "randomized" else None
    return conclude(*votes, **shared, uniform=uniform, **law)


def conclude(
    counts0: np.ndarray,
    counts: np.ndarray,
    *,
    alpha: float,
    sigma: float,
    bound: str = BOUNDS[0],
    uniform: np.ndarray | None = None,
    slack: float = 0.0,
    alpha_share: float | None = None,
) -> Certification:
    """Return predictions and radii from votes `[B, K]`; see `certify`, and `bounds.certify_votes` for the others."""
    counts0, counts = check_counts("counts0", counts0), check_counts("counts", counts)
    if counts0.shape != counts.shape:
        raise UserError(f"counts0 {counts0.shape} and counts {counts.shape} must have the same shape [B, K]")
    selected = counts0.argmax(axis=1)
    for_selected = np.take_along_axis(counts, selected[:, None], axis=1)[:, 0]
    runner_up = most_of_others(counts, selected)
    votes = (for_selected, runner_up, counts.sum(axis=1))
    settings = {"alpha": alpha, "sigma": sigma, "bound": bound, "alpha_share": share_of(alpha_share, bound=bound)}
    proven = certify_votes(*votes, **settings, uniform=uniform, slack=slack)
    return Certification(np.where(proven.certified, selected, ABSTAIN), proven.radius, counts0, counts)

"""Intervals and errors of a share, of a mean over images, and of two classifiers' difference on the same images.

The chance in the votes of a certificate is the subject of `statistics.bounds` and `certificates.joint`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rs_consistency.common.checks import MAX_SEED, MOST, check_all, number_array, probability, whole_number
from rs_consistency.common.errors import UserError

DEFAULT_LEVEL = 0.95
DEFAULT_SAMPLES = 10_000
_BATCH_VALUES = 2**24  # values that the bootstrap resamples at a time


class Interval(NamedTuple):
    """A confidence interval: `low` <= `high`, scalars or arrays."""

    low: np.ndarray
    high: np.ndarray


def binomial_interval(successes: ArrayLike, trials: int, *, level: float = DEFAULT_LEVEL) -> Interval:
    """Return the two-sided Clopper-Pearson interval of a probability, from independent trials.

    Guarantee: it contains the true probability with probability at least `level`, for any probability.

    Args:
      successes: `[...]`, 0..trials.
      trials: number of trials, at least 1.
      level: confidence level, in (0, 1).

    Returns:
      Bounds `[...]` float64 in [0, 1].

    Source: Clopper and Pearson, Biometrika 1934.

    Raises:
      UserError: for an argument outside its range.

    Example:
      350 of 500 images certified at some radius:

      >>> from rs_consistency.statistics.intervals import binomial_interval
      >>> low, high = binomial_interval(350, 500)
      >>> round(float(low), 3), round(float(high), 3)
      (0.658, 0.74)
    """
    level, trials = probability("level", level), whole_number("trials", trials, at_least=1)
    hits = number_array("successes", successes)
    whole = (hits >= 0) & (hits <= trials) & (hits == np.floor(hits))
    check_all("successes", hits, whole, f"use whole numbers from 0 to trials={trials}")
    hits = hits.astype(np.int64)
    tail = (1 - level) / 2
    low = np.where(hits == 0, 0.0, stats.beta.ppf(tail, np.maximum(hits, 1), trials - hits + 1))
    high = np.where(hits == trials, 1.0, stats.beta.isf(tail, hits + 1, np.maximum(trials - hits, 1)))
    return Interval(low, high)


def standard_error(values: ArrayLike, *, population: int | None = None) -> float:
    """Return the standard error of the mean of values that were drawn at random.

    Args:
      values: `[N]`, at least 2.
      population: size of the finite set from which the values were drawn without replacement, when its mean is in
        question. The error is 0 when the values are the whole set. None stands for an infinite set.

    Raises:
      UserError: for fewer than two values, or more than the population.

    Example:
      >>> from rs_consistency.statistics.intervals import standard_error
      >>> round(standard_error([0.0, 0.4, 1.2, 1.6]), 3), round(standard_error([0.0, 0.4, 1.2, 1.6], population=8), 3)
      (0.365, 0.258)
    """
    values = _values(values)
    error = stats.sem(values)
    if population is None:
        return float(error)
    population = whole_number("population", population, at_least=len(values))
    return float(error * np.sqrt(1 - len(values) / population))


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, samples: int = DEFAULT_SAMPLES, level: float = DEFAULT_LEVEL
) -> Interval:
    """Return the percentile bootstrap interval of a mean over images, such as the ACR.

    Images are drawn again, with replacement. The interval contains the mean over all images of the kind with
    probability about `level`; the approximation improves with N. The same arguments give the same interval.

    Args:
      values: `[N]`, a number for each image, at least 2.
      seed: seed of the resampling.
      samples: number of resamples.
      level: confidence level, in (0, 1).

    Source: Efron, Annals of Statistics 1979.

    Raises:
      UserError: for an argument outside its range.

    Example:
      >>> from rs_consistency.statistics.intervals import bootstrap_interval
      >>> low, high = bootstrap_interval([0.0, 0.4, 1.2, 1.6], seed=0)
      >>> round(float(low), 3), round(float(high), 3)
      (0.2, 1.4)
    """
    values = _values(values)
    level, samples = probability("level", level), whole_number("samples", samples, at_least=1, at_most=MOST)
    seed = whole_number("seed", seed, at_least=0, at_most=MAX_SEED)
    if np.ptp(values) == 0:  # scipy would warn
        return Interval(values[0], values[0])
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=samples,
        confidence_level=level,
        method="percentile",
        batch=max(1, _BATCH_VALUES // len(values)),
        rng=np.random.default_rng(seed),
    )
    return Interval(*result.confidence_interval)


class PairedDifference(NamedTuple):
    """The difference `a` minus `b` of two classifiers on the same images.

    Attributes:
      images: number of images.
      mean: mean difference.
      standard_error: standard error of the mean, over images.
      interval: bootstrap interval of the mean.
      gained: number of images with a greater than b.
      lost: number of images with a smaller than b.
    """

    images: int
    mean: float
    standard_error: float
    interval: Interval
    gained: int
    lost: int


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int = 0, level: float = DEFAULT_LEVEL) -> PairedDifference:
    """Compare two classifiers image by image.

    It is sharper than a comparison of the means, since hard images are hard for both.

    Args:
      a: `[N]`, such as radius times correct.
      b: `[N]`, for the same images in the same order.
      seed: seed of the bootstrap.
      level: confidence level of the interval.

    Raises:
      UserError: for different lengths, or fewer than two images.

    Example:
      >>> from rs_consistency.statistics.intervals import paired_difference
      >>> result = paired_difference([0.2, 0.5, 1.4, 1.5], [0.0, 0.4, 1.2, 1.6])
      >>> round(result.mean, 3), round(result.standard_error, 3), result.gained, result.lost
      (0.1, 0.071, 3, 1)
    """
    a, b = _values(a), _values(b)
    if a.shape != b.shape:
        raise UserError(f"{len(a)} values against {len(b)}: give both for the same images")
    difference = a - b
    return PairedDifference(
        images=len(a),
        mean=float(difference.mean()),
        standard_error=standard_error(difference),
        interval=bootstrap_interval(difference, seed=seed, level=level),
        gained=int((difference > 0).sum()),
        lost=int((difference < 0).sum()),
    )


def _values(values: ArrayLike) -> np.ndarray:
    array = number_array("values", values, kinds="biuf").astype(np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise UserError(f"values of shape {array.shape}: use a list of at least two finite numbers")
    return array

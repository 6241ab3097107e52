"""What chance there is in a share, a mean over images, and a difference of two classifiers on the same images.

A certificate's own chance, that of its votes, is not here: see `statistics.bounds` and `certificates.joint`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rs_consistency.common.checks import probability, whole_number
from rs_consistency.common.errors import UserError

DEFAULT_LEVEL = 0.95
DEFAULT_SAMPLES = 10_000
_BATCH_VALUES = 2**24  # values that the bootstrap resamples at a time


class Interval(NamedTuple):
    """A confidence interval: `low` <= `high`, scalars or arrays."""

    low: np.ndarray
    high: np.ndarray


def binomial_interval(successes: ArrayLike, trials: int, *, level: float = DEFAULT_LEVEL) -> Interval:
    """Two-sided Clopper-Pearson interval of a probability, from independent trials.

    Guarantee: it contains the true probability with probability at least `level`, for any probability.

    Args:
      successes: `[...]`, 0..trials.
      trials: how many, at least 1.
      level: in (0, 1).

    Returns:
      Bounds `[...]` float64 in [0, 1].

    Source: Clopper and Pearson, Biometrika 1934.

    Raises:
      UserError: for an argument outside its range.
    """
    level, trials = probability("level", level), whole_number("trials", trials, at_least=1)
    hits = np.asarray(successes)
    if hits.size and not (np.issubdtype(hits.dtype, np.integer) and hits.min() >= 0 and hits.max() <= trials):
        raise UserError(f"successes={hits}: use whole numbers from 0 to trials={trials}")
    tail = (1 - level) / 2
    low = np.where(hits == 0, 0.0, stats.beta.ppf(tail, np.maximum(hits, 1), trials - hits + 1))
    high = np.where(hits == trials, 1.0, stats.beta.isf(tail, hits + 1, np.maximum(trials - hits, 1)))
    return Interval(low, high)


def standard_error(values: ArrayLike, *, population: int | None = None) -> float:
    """Standard error of the mean of values that were drawn at random.

    Args:
      values: `[N]`, at least 2.
      population: size of the finite set that they were drawn from without replacement, where its mean is in question;
        the error is 0 once N values are all of it. None: the set is as good as infinite.

    Raises:
      UserError: for fewer than two values, or more than the population.
    """
    values = _values(values)
    error = values.std(ddof=1) / np.sqrt(len(values))
    if population is None:
        return float(error)
    whole_number("population", population, at_least=len(values))
    return float(error * np.sqrt(1 - len(values) / population))


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, samples: int = DEFAULT_SAMPLES, level: float = DEFAULT_LEVEL
) -> Interval:
    """Percentile bootstrap interval of a mean over images, such as the ACR: images are drawn again, with replacement.

    It contains the mean over all images of the kind with probability about `level`, the better the more images there
    are. A function of its arguments, the seed included.

    Args:
      values: `[N]`, one for each image, at least 2.
      seed: of the resampling.
      samples: how often.
      level: in (0, 1).

    Source: Efron, Annals of Statistics 1979.

    Raises:
      UserError: for an argument outside its range.
    """
    values = _values(values)
    level, samples = probability("level", level), whole_number("samples", samples, at_least=1)
    if np.ptp(values) == 0:  # nothing varies, which scipy warns of
        return Interval(values[0], values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=samples,
        confidence_level=level,
        method="percentile",
        batch=max(1, _BATCH_VALUES // len(values)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(found.low, found.high)


class PairedDifference(NamedTuple):
    """Two classifiers on the same images, `a` minus `b`.

    Attributes:
      images: how many.
      mean: of the differences.
      standard_error: of that mean, over images.
      interval: of that mean, by the bootstrap.
      gained: images where a is greater than b.
      lost: where it is smaller.
    """

    images: int
    mean: float
    standard_error: float
    interval: Interval
    gained: int
    lost: int


def paired_difference(a: ArrayLike, b: ArrayLike, *, seed: int = 0, level: float = DEFAULT_LEVEL) -> PairedDifference:
    """Compares two classifiers image by image: sharper than their means, since hard images are hard for both.

    Args:
      a: `[N]`, such as radius times correct.
      b: `[N]`, of the same images in the same order.
      seed: of the bootstrap.
      level: of the interval.

    Raises:
      UserError: for different lengths, or fewer than two images.
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
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise UserError(f"values of shape {array.shape}: use a list of at least two finite numbers")
    return array

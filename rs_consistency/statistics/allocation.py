"""The number of votes that an image needs for a radius, from a pilot: float64 on the host.

The radius of an image grows slowly with its votes. Most images reach nearly the same radius with fewer, but which
images these are is known only from votes. So the votes of an image come in two lots:

1. The pilot, n0 votes, selects the class A, and `votes_for_tolerance` picks n_i from the votes for A among them.
2. n_i fresh votes measure: `bounds.certify_votes` of their counts, at n_i, is the certificate.

Guarantee: a certificate is wrong with probability at most alpha, for every image and tolerance. Proof: A and n_i
are functions of the pilot. The fresh votes are independent of it, so given the pilot they are n_i independent votes for
a class that was chosen without looking at them, and the bound errs with probability at most alpha. The average over
pilots is at most alpha, too.

The pilot's votes must not be counted again in the second lot. They decided when to stop: a sum of both would have the
error of a test that is repeated until it passes. The published rule counts them and therefore has no such guarantee.

Source: Chen, Kong, Yu, Li, Huang (AAAI 2022), input-specific sampling, for the idea of a number of votes for each
image. Pilot and fresh votes: Stein (Annals of Mathematical Statistics 1945), two-stage samples.
"""

import functools
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency.common.checks import (
    MOST,
    check_all,
    number_above,
    number_array,
    number_from,
    one_of,
    probability,
    whole_number,
)
from rs_consistency.statistics.bounds import BOUNDS, certify_votes

# A step of the ladder of candidates is 1/16: the votes are within 7 % of the smallest number for the tolerance.
_STEP = 16
# Distances Phi^-1(p_A) at which expected radii are tabulated; the last is p_A = 1. Below the first the radius is 0.
_DISTANCES = np.append(np.linspace(-0.4, 5.4, 291), np.inf)
_EXACT = 64  # counts of other classes up to here have a term each in the expectation


def votes_for_tolerance(
    count0: ArrayLike,
    *,
    n0: int,
    n: int,
    tolerance: float,
    alpha: float,
    sigma: float,
    bound: str = "clopper_pearson",
    slack: float = 0.0,
) -> np.ndarray:
    """Return the number of fresh votes for each image, of which n0 pilot votes gave `count0` to the selected class.

    It is the smallest number on a ladder whose expected radius is within the tolerance of the expected radius of n
    votes. The expectation is over p_A, whose law is the Jeffreys posterior Beta(count0 + 1/2, n0 - count0 + 1/2) of the
    pilot, and over the count. The ladder goes down from n in whole numbers, each smaller by one part in 16. It ends at
    the smallest number of votes that can certify, `least_votes`.

    Guarantee: the number depends on the arguments alone, so a certificate from this many fresh votes is valid; see the
    module. The tolerance is a mean over images with that law of p_A, not a limit for each image.

    | pilot | votes |
    |---|---|
    | few votes for A | the least: the radius is 0 with n votes, too |
    | all votes for A | most: the ceiling of the radius falls with the votes |
    | tolerance near 0 | n |
    | large tolerance | the least |
    | n below the least | n: such an image abstains |

    Args:
      count0: votes of the pilot for the selected class, whole numbers in 0..n0.
      n0: votes of the pilot, at least 1.
      n: most votes of the measurement.
      tolerance: radius to give up in expectation, l2, in the units of sigma.
      alpha: error probability of the certificate, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise.
      bound: of the certificate, one of `BOUNDS`. All take the radius of `clopper_pearson` for the expectation.
      slack: of the sampler, in [0, 1], as for `bounds.certify_votes`.

    Returns:
      int64, shaped as `count0`.

    Raises:
      UserError: for an argument outside its range.

    Example:
      The radius of a clear majority takes few votes, a radius near the ceiling many, and no radius the least.

      >>> from rs_consistency.statistics.allocation import votes_for_tolerance
      >>> settings = dict(n0=100, n=100_000, alpha=0.001, sigma=0.5)
      >>> votes_for_tolerance([30, 70, 90, 100], tolerance=0.02, **settings).tolist()
      [10, 6227, 9175, 52442]
    """
    n0, n = whole_number("n0", n0, at_least=1, at_most=MOST), whole_number("n", n, at_least=1, at_most=MOST)
    count0 = number_array("count0", count0)
    inside = (count0 >= 0) & (count0 <= n0) & (count0 == np.floor(count0))
    check_all("count0", count0, inside, "use whole numbers from 0 to n0")
    one_of("bound", bound, BOUNDS)
    sigma = number_above("sigma", sigma, 0)
    tolerance = number_above("tolerance", tolerance, 0)
    alpha, slack = probability("alpha", alpha), number_from("slack", slack, at_least=0, at_most=1)
    distinct, position = np.unique(count0, return_inverse=True)
    numbers, radii = _expected_radii(n, alpha, slack)
    misses = special.ndtr(-_DISTANCES)
    above = special.betainc(n0 - distinct[:, None] + 0.5, distinct[:, None] + 0.5, misses)  # P(p_A >= each distance)
    expected = (above[:, :-1] - above[:, 1:]) @ radii
    loss = expected[:, -1:] - expected
    votes = numbers[(loss <= tolerance / sigma).argmax(axis=1)]
    return votes[position].reshape(count0.shape)[()]


def least_votes(alpha: float, slack: float = 0.0) -> int:
    """Return the smallest number of votes that can certify: all of them are for the class. `MOST` if none can.

    Example:
      >>> from rs_consistency.statistics.allocation import least_votes
      >>> least_votes(0.001), least_votes(0.05)
      (10, 5)
    """
    if slack >= 0.5:
        return MOST
    guess = round(math.log(alpha) / math.log(0.5 + slack))
    near = np.arange(max(guess - 1, 1), guess + 3)
    return int(near[certify_votes(near, 0, near, alpha=alpha, sigma=1.0, slack=slack).certified.argmax()])


def _ladder(n: int, least: int) -> np.ndarray:
    """Return the candidates, increasing, the last of them n: whole numbers, the same on every machine."""
    numbers = [n]
    while numbers[-1] > least:
        numbers.append(max(numbers[-1] - -(-numbers[-1] // _STEP), least))
    return np.array(numbers[::-1])


@functools.lru_cache(maxsize=16)
def _expected_radii(n: int, alpha: float, slack: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidates `[L]`, and their expected radii `[D - 1, L]` at sigma 1 between each two of D distances."""
    numbers = _ladder(n, least_votes(alpha, slack))
    q = special.ndtr(-_DISTANCES)[:, None]
    radii = np.empty((len(_DISTANCES), len(numbers)))
    for column, votes in enumerate(numbers):
        others, width = _counts(votes)
        log_ways = -np.log(votes + 1) - special.betaln(others + 1, votes - others + 1)
        weights = width * np.exp(log_ways + special.xlogy(others, q) + special.xlog1py(votes - others, -q))
        few = others[2 * others < votes]  # with more, the bound of p_A is below 1/2
        lower = special.betaincinv(votes - few, few + 1.0, alpha) - slack
        radius = special.ndtri(np.maximum(lower, 0.5))
        radii[:, column] = weights[:, : len(few)] @ radius / weights.sum(axis=1)
    return numbers, (radii[:-1] + radii[1:]) / 2


def _counts(votes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts of votes for other classes and the widths of a trapezoidal rule, wide where counts spread."""
    parts, start, width = [], 0, 1
    while start <= votes:
        stop = _EXACT * width**2
        parts.append(np.arange(start, min(stop, votes + 1), width))
        start, width = stop, 2 * width
    counts = np.concatenate(parts)
    return counts, np.gradient(counts)

"""The number of votes that an image needs for a radius, from a pilot: float64 on the host.

Most images reach nearly the radius of n votes with far fewer, but only votes tell which images these are. So the votes
of an image come in two lots:

1. The pilot, n0 votes, selects the class A. `votes_for_tolerance` picks n_i from the votes for A among them.
2. n_i fresh votes measure. `bounds.certify_votes` of their counts, at n_i, is the certificate.

Guarantee: a certificate is wrong with probability at most alpha, for every image and tolerance. Proof: A and n_i are
functions of the pilot. The fresh votes are independent of it, so given the pilot they are n_i independent votes for a
class that was chosen without looking at them, and the bound errs with probability at most alpha. So does the average
over pilots.

The pilot is not counted again in the second lot: it decided how many votes follow, and a sum of both would be a test
whose end depends on its outcome. The published rule counts it, and has no such guarantee.

Source: Chen, Kong, Yu, Li, Huang (AAAI 2022), input-specific sampling, for a number of votes of each image's own; Stein
(Annals of Mathematical Statistics 1945) for a first sample that chooses the size of the second.
"""

import functools
from typing import Any

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
from rs_consistency.common.errors import UserError
from rs_consistency.statistics import bounds
from rs_consistency.statistics.bounds import upper_confidence_bound
from rs_consistency.statistics.limits import MOST_VOTES, fewest_votes

N0 = 1000  # votes of a pilot that is worth its votes: docs/statistics.md has the measurement
MOST_TOLERATED = 10**6  # of an image with a tolerance: the table of expected radii, 8 s there, grows like the root of n
RULE = 1  # version of the rule, for records: another one gives other numbers for the same pilot
# Probability that the pilot's upper bound of p_A is too low. At 0.05 the mean loss exceeds small tolerances by 8 %.
_MISLED = 0.02
_STEP = 16  # a step of the ladder is a 16th: at most 7 % more votes than needed
# Phi^-1(p_A) of the tabulated radii. With p_A below the first none is certified; the last is p_A = 1.
_DISTANCES = np.append(np.linspace(-0.4, 5.4, 291), np.inf)
_EXACT = 64  # expectations have a term for each count of other classes up to here, beyond for every second, fourth, ...


def pilot_votes(n0: Any, *, tolerance: Any, bound: str, n: Any = None) -> Any:
    """Return n0, or its default for None, with a tolerance or None for no tolerance.

    Raises:
      UserError: for a tolerance that is not above 0, more than `MOST_TOLERATED` further votes n, or the bound
        `two_class`: it gains most where p_A is below 1/2, and such images get few votes.
    """
    one_of("bound", bound, bounds.BOUNDS)
    if n0 is not None:
        n0 = whole_number("n0", n0, at_least=1, at_most=MOST_VOTES)
    if tolerance is None:
        return bounds.N0 if n0 is None else n0
    tolerance = number_above("tolerance", tolerance, 0)
    if n is not None:
        check_tolerated(n)
    if bound == "two_class":
        raise UserError(
            f"tolerance={tolerance}: it leaves few votes to images that bound=two_class would certify; leave one of"
            " them out"
        )
    return N0 if n0 is None else n0


def check_tolerated(n: Any) -> None:
    """Raise a `UserError` for more votes than an image may have with a tolerance."""
    if whole_number("n", n, at_least=1, at_most=MOST) > MOST_TOLERATED:
        raise UserError(f"n={n}: with a tolerance use at most {MOST_TOLERATED:,} votes, or leave the tolerance out")


def votes_for_tolerance(
    count0: ArrayLike,
    *,
    n0: int,
    n: int,
    tolerance: float,
    alpha: float,
    sigma: float,
    slack: float = 0.0,
) -> np.ndarray:
    """Return the number of fresh votes for each image, of which n0 pilot votes gave `count0` to the selected class.

    Let R(m, p) be the expected radius of m votes with p_A = p. The number is the smallest m on a ladder with

        R(n, p) - R(m, p) <= tolerance for every p up to the upper confidence bound of p_A from the pilot, at 0.02.

    The larger p_A, the more votes its radius takes, so the bound is on the safe side. The ladder goes down from n in
    whole numbers, each smaller by one part in 16, and ends at the smallest number that can certify.

    Guarantee, beside the module's: for every p_A, with probability at least 0.98 over pilots, the expected radius is at
    most the tolerance below R(n, p_A). Its mean over all pilots is so, too, in all settings computed (n0 of at least
    20, n of at least 1000, tolerances from 0.005 sigma). A single image may lose more by chance: its n votes might have
    come out better. Radii are those of `clopper_pearson`, and hardly differ for `randomized`.

    | pilot | votes |
    |---|---|
    | few votes for A | the least: the radius is 0 with n votes, too |
    | all votes for A | most: near the ceiling the radius depends on the votes |
    | tolerance near 0 | n, unless the radius is 0 anyway |
    | large tolerance | the least |
    | n below the least | n: every image abstains |

    Args:
      count0: votes of the pilot for the selected class, whole numbers in 0..n0.
      n0: votes of the pilot, at least 1.
      n: most votes of the measurement, at most `MOST_TOLERATED`.
      tolerance: expected loss of radius, l2, in the units of sigma.
      alpha: error probability of the certificate, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise.
      slack: of the sampler, in [0, 1], as for `bounds.certify_votes`.

    Returns:
      int64, shaped as `count0`.

    Raises:
      UserError: for an argument outside its range.

    Example:
      An image without a radius takes the least, an image near the ceiling nearly all of 100,000.

      >>> from rs_consistency.statistics.allocation import votes_for_tolerance
      >>> settings = dict(n=100_000, tolerance=0.02, alpha=0.001, sigma=0.5)
      >>> votes_for_tolerance([400, 700, 900, 990, 1000], n0=1000, **settings).tolist()
      [10, 6227, 9787, 31290, 87890]
    """
    n0, n = whole_number("n0", n0, at_least=1, at_most=MOST), whole_number("n", n, at_least=1, at_most=MOST)
    check_tolerated(n)
    count0 = number_array("count0", count0)
    inside = (count0 >= 0) & (count0 <= n0) & (count0 == np.floor(count0))
    check_all("count0", count0, inside, "use whole numbers from 0 to n0")
    tolerance, sigma = number_above("tolerance", tolerance, 0), number_above("sigma", sigma, 0)
    alpha, slack = probability("alpha", alpha), number_from("slack", slack, at_least=0, at_most=1)
    numbers, radii = _expected_radii(n, alpha, slack)
    first_near_enough = (radii[:, -1:] - radii <= tolerance / sigma).argmax(axis=1)
    votes = numbers[np.maximum.accumulate(first_near_enough)]
    distinct, position = np.unique(count0, return_inverse=True)
    distance = special.ndtri(upper_confidence_bound(distinct, n0, _MISLED))
    return votes[np.searchsorted(_DISTANCES, distance)][position].reshape(count0.shape)[()]


@functools.lru_cache(maxsize=16)
def _expected_radii(n: int, alpha: float, slack: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ladder `[L]`, increasing, and the expected radii `[D, L]` at sigma 1 for each of the distances."""
    numbers, least = [n], fewest_votes(alpha=alpha, slack=slack) or n
    while numbers[-1] > least:
        numbers.append(max(numbers[-1] - -(-numbers[-1] // _STEP), least))
    numbers = np.array(numbers[::-1])
    log_p, log_q = special.log_ndtr(_DISTANCES[:-1, None]), special.log_ndtr(-_DISTANCES[:-1, None])
    radii = np.empty((len(_DISTANCES), len(numbers)))
    for column, votes in enumerate(numbers):
        others, width = _counts(votes)
        few = others[2 * others < votes]  # with more, the bound of p_A is below 1/2
        lower = special.betaincinv(votes - few, few + 1.0, alpha) - slack
        radius = special.ndtri(np.maximum(lower, 0.5))
        log_ways = np.log(width / (votes + 1)) - special.betaln(others + 1, votes - others + 1)
        weights = np.exp(log_ways + votes * log_p + others * (log_q - log_p))
        radii[:-1, column] = weights[:, : len(few)] @ radius / weights.sum(axis=1)
        radii[-1, column] = radius[0]
    return numbers, radii


def _counts(votes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts of votes for other classes and the widths of a trapezoidal rule, wide where counts spread."""
    parts, start, width = [], 0, 1
    while start <= votes:
        stop = _EXACT * width**2
        parts.append(np.arange(start, min(stop, votes + 1), width))
        start, width = stop, 2 * width
    counts = np.concatenate(parts)
    return counts, np.gradient(counts)

"""The sequential test of a certificate at one radius, which takes as many votes as the decision needs.

Votes for the selected class A are Bernoulli(p_A). The smoothed classifier predicts A everywhere within l2 distance r
if p_A >= p0 = Phi(r / sigma). The test bets against p_A = p0 and may be looked at after every vote, unlike a bound,
which needs a fixed number of votes. It computes in float64 on the host.

| | |
|---|---|
| evidence | `E_T = B(H + 1/2, T - H + 1/2) / B(1/2, 1/2) / (p0 ** H * (1 - p0) ** (T - H))`, T votes, H for A |
| stop | as soon as `E_T >= 1 / alpha` |
| decide | certified at r if `H / T > p0`, not certified if `H / T < p0` |

E_T is the likelihood of the votes under the Beta(1/2, 1/2) mixture, divided by the likelihood under p0. If p_A = p0 it
is a nonnegative martingale that begins at 1. By Ville's inequality it ever reaches 1 / alpha with probability at most
alpha. This holds for all looks together, hence for any subset of them, such as a look after every 16 votes.

Source: Ville (1939); Robbins (Annals of Mathematical Statistics 1970) for the mixture, Krichevsky and Trofimov (IEEE
Transactions on Information Theory 1981) for its prior; for smoothing, Voracek (NeurIPS 2024).
"""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency.common.checks import MOST_EXACT, SMALLEST_PROBABILITY, check_all, number_arrays, number_from

CERTIFIED, UNDECIDED, NOT_CERTIFIED = 1, 0, -1

# In units of sigma. Larger distances are taken for this one: it keeps the logarithms finite, and Phi(-40) is 0 anyway.
_LARGEST_DISTANCE = 1e6
# Relative error of the sum of terms, whose gamma functions err by a few units in the last place. The evidence must
# exceed its threshold by that much.
_ROUNDING = 16 * np.finfo(np.float64).eps


def log_evidence(hits: ArrayLike, votes: ArrayLike, p0: ArrayLike) -> np.ndarray:
    """Return the natural logarithm of the evidence E_T against `p = p0`.

    Guarantee: for independent votes of probability p0, the probability that it reaches log(1 / alpha) after any
    number of votes, ever, is at most alpha.

    Args:
      hits: H, votes for the class, whole numbers in 0..votes.
      votes: T, all votes so far, whole numbers of at least 1 and at most 2**53.
      p0: the probability to be rejected, in (0, 1).

    Returns:
      float64, shaped as the arguments broadcast; a float64 scalar for scalars. Finite. Negative while the votes speak
      for p0.

    Raises:
      UserError: for an argument outside its range.

    Example:
      At alpha 0.001 the evidence has to reach log(1000) = 6.9.

      >>> from rs_consistency.statistics.sequential import log_evidence
      >>> log_evidence([5, 10, 20], [10, 10, 20], 0.5).round(2).tolist()
      [-1.4, 5.2, 11.79]
    """
    hits, votes, p0 = _checked(hits=hits, votes=votes, p0=p0)
    check_all("p0", p0, (p0 > 0) & (p0 < 1), "use a number in (0, 1)")
    return _log_evidence(hits, votes, np.log(p0), np.log1p(-p0))[()]


def decide(
    hits: ArrayLike,
    votes: ArrayLike,
    *,
    radius: ArrayLike,
    sigma: ArrayLike,
    alpha: ArrayLike,
    slack: float = 0.0,
) -> np.ndarray:
    """Return the decision from the votes so far about a certificate at one radius.

    Guarantee: let the votes be independent, for a class that was chosen without looking at them. Let the first decision
    at any look be final. Then, for every p_A,

    - if p_A < p0, `CERTIFIED` is ever decided with probability at most alpha. A class that the smoothed classifier
      does not predict everywhere within the radius has p_A <= p0, so this bounds its wrong certificates;
    - if p_A > p0, `NOT_CERTIFIED` is ever decided with probability at most alpha;
    - if p_A = p0, the two together have probability at most alpha.

    The test rejects p_A = p0, on both sides, at alpha in all. Each outcome by itself inherits alpha, not alpha / 2. For
    every T the evidence is convex in H and at most 1 at H = T p0. So `CERTIFIED` needs H above a limit, and
    `NOT_CERTIFIED` needs H below another limit. A smaller p_A only makes the first less probable than at p0, a larger
    p_A the second.

    With a slack, all this holds for votes whose probability q is within it of p_A. `CERTIFIED` then takes the evidence
    against p0 + slack, and H above T (p0 + slack); `NOT_CERTIFIED` the evidence against p0 - slack, and H below T (p0 -
    slack). The evidence only grows as the probability that it is against moves away from H / T. So at p_A = p0 either
    outcome is evidence of 1 / alpha against q, wherever q is between the two. `exact.proves_decision` proves a decision
    without float64.

    `NOT_CERTIFIED` says that p_A alone does not prove the radius, with however many votes. It does not say that an
    adversarial example exists.

    | case | decision |
    |---|---|
    | radius = 0 | p0 = 1/2: certified means that A is the prediction |
    | p0 near 1 | a single vote for another class can decide not certified; p0 is never rounded to 1 |
    | all votes for A | certified, but never before log(1 / alpha) / log(1 / p0) votes |
    | no vote for A | not certified, after few votes |
    | p_A = p0 | usually undecided, with however many votes |
    | p0 + slack >= 1 | never certified |
    | p0 - slack <= 0 | never not certified |

    Rounding errs towards `UNDECIDED`.

    Args:
      hits: H, votes for the class, whole numbers in 0..votes.
      votes: T, all votes so far, whole numbers of at least 1 and at most 2**53.
      radius: l2, at least 0, in units of sigma's.
      sigma: standard deviation of the noise, positive.
      alpha: error probability, in (0, 1), at least 1e-100.
      slack: largest difference between the probability of a vote and p_A, in [0, 1].

    Returns:
      int8, shaped as the arguments broadcast: `CERTIFIED` 1, `NOT_CERTIFIED` -1, `UNDECIDED` 0.

    Raises:
      UserError: for an argument outside its range.

    Example:
      90 % of 100 votes at sigma 0.5 certify radius 0.25. The larger radii need more votes.

      >>> from rs_consistency.statistics.sequential import decide
      >>> decide(90, 100, radius=[0.25, 0.5, 1.0], sigma=0.5, alpha=0.001).tolist()
      [1, 0, 0]
      >>> decide(900, 1000, radius=[0.25, 0.5, 1.0], sigma=0.5, alpha=0.001).tolist()
      [1, 1, -1]
    """
    hits, votes, radius, sigma, alpha = _checked(hits=hits, votes=votes, radius=radius, sigma=sigma, alpha=alpha)
    check_all("radius", radius, np.isfinite(radius) & (radius >= 0), "use a number of at least 0")
    check_all("sigma", sigma, np.isfinite(sigma) & (sigma > 0), "use a number greater than 0")
    check_all("alpha", alpha, (alpha > 0) & (alpha < 1), "use a number in (0, 1), such as 0.001")
    check_all("alpha", alpha, alpha >= SMALLEST_PROBABILITY, f"use a number of at least {SMALLEST_PROBABILITY}")
    slack = number_from("slack", slack, at_least=0, at_most=1)
    with np.errstate(over="ignore"):
        distance = np.minimum(radius / sigma, _LARGEST_DISTANCE)
    q0 = special.ndtr(-distance)
    if not slack:
        null = _Null(special.log_ndtr(distance), special.log_ndtr(-distance), q0)
        side = np.where(null.is_below(hits, votes), CERTIFIED, NOT_CERTIFIED)
        return np.where(null.is_rejected(hits, votes, alpha), side, UNDECIDED).astype(np.int8)[()]
    high = _Null.at(np.nextafter(q0 * (1 - _ROUNDING) - slack, -1.0))
    low = _Null.at(np.nextafter(q0 * (1 + _ROUNDING) + slack, 2.0))
    certified = high.is_rejected(hits, votes, alpha) & high.is_below(hits, votes)
    not_certified = low.is_rejected(hits, votes, alpha) & ~low.is_below(hits, votes)
    return np.where(certified, CERTIFIED, np.where(not_certified, NOT_CERTIFIED, UNDECIDED)).astype(np.int8)[()]


class _Null(NamedTuple):
    """A probability p to be rejected: logarithms of p and q = 1 - p, and q itself, since p near 1 would round."""

    log_p: np.ndarray
    log_q: np.ndarray
    q: np.ndarray

    @classmethod
    def at(cls, q: np.ndarray) -> Self:
        """Return the null p = 1 - q; outside (0, 1), logarithms that no votes reject."""
        inside = (q > 0) & (q < 1)
        some = np.where(inside, q, 0.5)
        return cls(np.where(inside, np.log1p(-some), 0.0), np.where(inside, np.log(some), 0.0), q)

    def is_below(self, hits: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """Return whether p < H / T."""
        return votes - hits < votes * self.q

    def is_rejected(self, hits: np.ndarray, votes: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Return whether the evidence reaches 1 / alpha, by more than its rounding."""
        evidence = _log_evidence(hits, votes, self.log_p, self.log_q)
        size = special.gammaln(votes + 1) - hits * self.log_p - (votes - hits) * self.log_q + 1
        return evidence - _ROUNDING * size >= -np.log(alpha)


def _log_evidence(hits: np.ndarray, votes: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return `log_evidence` of checked float64 arrays, given the logarithms of p0 and 1 - p0."""
    misses = votes - hits
    mixture = special.betaln(hits + 0.5, misses + 0.5) - special.betaln(0.5, 0.5)
    return mixture - hits * log_p - misses * log_q


def _checked(**values: ArrayLike) -> tuple[np.ndarray, ...]:
    """Return hits, votes and other arguments as float64 arrays that broadcast together, in order.

    Raise a `UserError` for hits or votes outside their range.
    """
    hits, votes, *others = number_arrays(**values)
    whole = (votes >= 1) & (votes <= MOST_EXACT) & (votes == np.floor(votes))
    check_all("votes", votes, whole, "use a whole number of at least 1 and at most 2**53")
    inside = (hits >= 0) & (hits <= votes) & (hits == np.floor(hits))
    check_all("hits", hits, inside, "use whole numbers from 0 to votes")
    return tuple(value.astype(np.float64) for value in (hits, votes, *others))

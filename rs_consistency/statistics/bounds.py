"""The statistics of a certificate: confidence bounds and radii, in float64 on the host.

All functions broadcast over arrays. Every bound errs on the safe side by construction: the binomial tail at a lower
bound is computed, and the bound is lowered until the tail does not exceed alpha. There are three bounds (`BOUNDS`):

- `clopper_pearson`: p_A against 1/2, the published protocol. Source: Cohen, Rosenfeld, Kolter (ICML 2019), theorem 1
  and algorithm CERTIFY.
- `two_class`: p_A against p_B, which share alpha; it can certify where p_A < 1/2. Source: the same theorem 1.
- `randomized`: as `clopper_pearson`, with exact coverage through a uniform draw. Source: Stevens (Biometrika 1950); for
  smoothing, Voracek (NeurIPS 2024).

The votes may come from a sampler whose law is not quite the one of the theorem. The `slack` is a bound of the
difference between the probability of a vote and the p_A in question. It is subtracted from lower bounds and added to
upper ones; of n votes, n times the slack is added to p-values. 0 leaves every number as it is.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency.common.checks import (
    MOST_EXACT,
    SMALLEST_PROBABILITY,
    any_array,
    check_all,
    decimal_value,
    number_array,
    number_arrays,
    number_from,
    probability,
    shown,
    whole_array,
)
from rs_consistency.common.errors import UserError

ABSTAIN = -1  # the prediction of an image without a certificate
BOUNDS = ("clopper_pearson", "two_class", "randomized")
# The published defaults of every certification: votes that select, votes that measure, error probability.
N0, N, ALPHA = 100, 100_000, 0.001
# Of alpha, for p_A in `two_class`; the rest is for p_B. Little is lost where p_A alone determines the radius.
ALPHA_SHARE = 0.99
ATTACK_TESTS = 5  # that share the alpha of an attack: at the image, and at up to four adversarial images
_HALVINGS = 60  # of an interval within [0, 1]: finer than float64


def lower_confidence_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> np.ndarray:
    """Return the one-sided Clopper-Pearson lower bound of a binomial proportion.

    Guarantee: for `count ~ Binomial(n, p)`, the bound exceeds p with probability at most alpha, for every p.

    | count | bound |
    |---|---|
    | 0 | 0 |
    | n | alpha ** (1 / n), computed without cancellation |
    | otherwise | the alpha quantile of Beta(count, n - count + 1) |

    Args:
      count: successes, whole numbers in 0..n.
      n: trials, whole numbers of at least 1.
      alpha: error probability, in (0, 1), at least 1e-100.

    Returns:
      float64, shaped as the arguments broadcast; a float64 scalar for scalars. Always below 1.

    Raises:
      UserError: for an argument outside its range.

    Example:
      >>> from rs_consistency import lower_confidence_bound
      >>> lower_confidence_bound([0, 99_000, 100_000], 100_000, 0.001).round(6).tolist()
      [0.0, 0.988989, 0.999931]
    """
    return _lower(*_checked(count=count, n=n, alpha=alpha))[()]


def upper_confidence_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> np.ndarray:
    """Return the one-sided Clopper-Pearson upper bound of a binomial proportion. It is always above 0.

    Guarantee: for `count ~ Binomial(n, p)`, the bound is below p with probability at most alpha, for every p.

    Arguments, shapes and errors are as for `lower_confidence_bound`.

    Example:
      >>> from rs_consistency.statistics.bounds import upper_confidence_bound
      >>> upper_confidence_bound([0, 1_000, 100_000], 100_000, 0.001).round(6).tolist()
      [6.9e-05, 0.011011, 1.0]
    """
    return _upper(*_checked(count=count, n=n, alpha=alpha))[()]


def randomized_lower_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike, uniform: ArrayLike) -> np.ndarray:
    """Return the randomized lower bound of a binomial proportion.

    It is the p with P(X > count) + uniform * P(X = count) = alpha, and lies between the Clopper-Pearson bounds of
    `count` and `count + 1`. For count = n the draw is not used, so the bound stays below 1.

    Guarantee: for `count ~ Binomial(n, p)` and an independent uniform draw, the bound exceeds p with a probability of
    exactly alpha, for every p up to alpha ** (1 / n), and at most alpha beyond.

    Args:
      count: successes, as for `lower_confidence_bound`.
      n: trials, likewise.
      alpha: error probability, likewise.
      uniform: draws from (0, 1], independent of the counts.

    Returns:
      float64, shaped as the arguments broadcast.

    Raises:
      UserError: for an argument outside its range.

    Source: Stevens (Biometrika 1950); for smoothing, Voracek (NeurIPS 2024).

    Example:
      >>> from rs_consistency.statistics.bounds import randomized_lower_bound
      >>> randomized_lower_bound(90, 100, 0.001, [1.0, 0.5]).round(4).tolist()  # at 1.0: the Clopper-Pearson bound
      [0.7753, 0.7805]
    """
    count, n, alpha, uniform = _checked(count=count, n=n, alpha=alpha, uniform=uniform)
    check_all("uniform", uniform, (uniform > 0) & (uniform <= 1), "use numbers greater than 0 and at most 1")
    count, n, alpha, uniform = np.broadcast_arrays(count, n, alpha, uniform)
    low = _lower(count, n, alpha)
    high = np.where(count == n, low, _lower(np.minimum(count + 1, n), n, alpha))
    for _ in range(_HALVINGS):  # keeps a tail of at most alpha at the lower end
        middle = low + (high - low) / 2
        tail = (1 - uniform) * _tail(np.minimum(count + 1, n), n, middle) + uniform * _tail(count, n, middle)
        low, high = np.where(tail <= alpha, middle, low), np.where(tail <= alpha, high, middle)
    return low[()]


def certified_radius(count: ArrayLike, n: ArrayLike, alpha: ArrayLike, sigma: ArrayLike) -> np.ndarray:
    """Return the l2 radius that `count` of `n` votes certify.

    It is `sigma * Phi^-1(p_A)` with `p_A = lower_confidence_bound(count, n, alpha)`, and 0 where `p_A <= 1/2`. A p_A
    below 1/2 means abstention; the radius alone does not distinguish it from a certificate of radius 0.

    Guarantee: let the votes be independent, for a class that was chosen without looking at them. A wrong certificate is
    a positive radius within which the smoothed classifier does not predict that class everywhere. Its probability is
    at most alpha.

    Args:
      count: votes for the chosen class, whole numbers in 0..n.
      n: all votes.
      alpha: error probability, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise, positive; the radius is in its units.

    Returns:
      float64, shaped as the arguments broadcast; finite and at least 0.

    Raises:
      UserError: for an argument outside its range.

    Example:
      99,000 of 100,000 votes at sigma 0.5 certify a radius of 1.145.

      >>> from rs_consistency import certified_radius
      >>> certified_radius([50_000, 99_000, 100_000], 100_000, 0.001, 0.5).round(3).tolist()
      [0.0, 1.145, 1.906]
    """
    count, n, alpha, sigma = _checked(count=count, n=n, alpha=alpha, sigma=sigma)
    return _radius(_lower(count, n, alpha), sigma)[()]


class Certified(NamedTuple):
    """The conclusion from the votes of each image.

    Attributes:
      certified: bool; False means abstention.
      radius: float64 l2 radius; 0 where nothing is certified.
      lower: float64 lower confidence bound of p_A, from which the radius follows.
    """

    certified: np.ndarray
    radius: np.ndarray
    lower: np.ndarray


def certify_votes(
    count: ArrayLike,
    runner_up: ArrayLike,
    n: ArrayLike,
    *,
    alpha: ArrayLike,
    sigma: ArrayLike,
    bound: str = "clopper_pearson",
    uniform: ArrayLike | None = None,
    slack: float = 0.0,
    alpha_share: float = ALPHA_SHARE,
) -> Certified:
    """Return the certificate that n votes give a class that was chosen without looking at them.

    Guarantee, for each `bound`: a wrong certificate has probability at most alpha. It holds for votes whose probability
    of each class is within `slack` of the smoothed classifier's: p_A is the latter. `exact.proves_radius` proves a
    radius without float64.

    With `two_class` the radius is `sigma / 2 * (Phi^-1(p_A) - Phi^-1(p_B))`. p_A is bounded from below at `alpha_share`
    of alpha, and p_B from above at the rest, with p_B at most 1 - p_A. The largest count of any other class bounds p_B,
    because the count of the truly second class is not larger. A slack widens both bounds.

    Args:
      count: votes for the chosen class.
      runner_up: largest number of votes for another class; only `two_class` uses it.
      n: all votes.
      alpha: error probability, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise; `samplers.noise_law` has it, and the slack, for each sampler.
      bound: one of `BOUNDS`.
      uniform: draws from (0, 1] of `noise.bound_uniform`; only `randomized` uses them.
      slack: largest difference between the probability of a vote and that of the smoothed classifier, in [0, 1].
      alpha_share: share of alpha that bounds p_A, in (0, 1); only `two_class` uses it. Choose it before you see the
        votes.

    Returns:
      Arrays, shaped as the arguments broadcast.

    Raises:
      UserError: for an argument outside its range, or an unknown bound.

    Example:
      45 % of the votes against 20 %, and the rest for other classes: p_A alone does not exceed 1/2.

      >>> from rs_consistency.statistics.bounds import certify_votes
      >>> for bound in ("clopper_pearson", "two_class"):
      ...     votes = certify_votes(45_000, 20_000, 100_000, alpha=0.001, sigma=0.5, bound=bound)
      ...     print(bool(votes.certified), round(float(votes.radius), 3), round(float(votes.lower), 3))
      False 0.0 0.445
      True 0.171 0.445
    """
    _check_bound(bound)
    slack = number_from("slack", slack, at_least=0, at_most=1)
    if bound == "two_class":
        count, n, alpha, sigma, runner_up = _checked(count=count, n=n, alpha=alpha, sigma=sigma, runner_up=runner_up)
        share = probability("alpha_share", alpha_share)
        lower = _lowered(_lower(count, n, alpha * share), slack)
        upper = np.minimum(_raised(_upper(runner_up, n, alpha * float(1 - decimal_value(share))), slack), 1 - lower)
        certified = lower >= upper
        with np.errstate(invalid="ignore"):
            at_lower, at_upper = special.ndtri(lower), special.ndtri(upper)
            rounding = (1 - _SHRINK) * (np.abs(at_lower) + np.abs(at_upper))
            radius = sigma / 2 * (at_lower - at_upper - rounding)
        radius = np.where(certified, np.maximum(radius, 0.0), 0.0)
        return Certified(certified, radius[()], lower)
    if bound == "randomized" and uniform is None:
        raise UserError("bound=randomized needs uniform draws; take noise.bound_uniform(seed, indices)")
    uniform = 1.0 if bound == "clopper_pearson" else uniform
    count, n, alpha, sigma, uniform = _checked(count=count, n=n, alpha=alpha, sigma=sigma, uniform=uniform)
    if bound == "randomized":
        lower = np.asarray(randomized_lower_bound(count, n, alpha, uniform))
    else:
        lower = _lower(count, n, alpha)
    lower = _lowered(lower, slack)
    return Certified(lower >= 0.5, _radius(lower, sigma), lower)


def radius_ceiling(n: ArrayLike, *, alpha: ArrayLike, bound: str = "clopper_pearson", **settings: Any) -> np.ndarray:
    """Return the largest radius that n votes certify: all are for the same class.

    It is `sigma * Phi^-1(alpha ** (1 / n) - slack)`; for `two_class`, alpha stands for the share of p_A. The `settings`
    are `sigma`, `slack` and `alpha_share`, as for `certify_votes`.

    Example:
      Ten times as many votes certify little more.

      >>> from rs_consistency.statistics.bounds import radius_ceiling
      >>> radius_ceiling([10_000, 100_000, 1_000_000], alpha=0.001, sigma=0.5).round(2).tolist()
      [1.6, 1.91, 2.17]
    """
    return certify_votes(n, 0, n, alpha=alpha, bound=bound, uniform=1.0, **settings).radius


def share_of(alpha_share: Any, *, bound: str) -> float | None:
    """Return the checked share of alpha for p_A, by default `ALPHA_SHARE`, for `two_class`; None for another bound.

    Raises:
      UserError: for a share outside (0, 1), or with another bound.
    """
    _check_bound(bound)
    if bound == "two_class":
        return probability("alpha_share", ALPHA_SHARE if alpha_share is None else alpha_share)
    if alpha_share is not None:
        raise UserError(f"alpha_share={shown(alpha_share)}: bound={bound} does not share alpha; leave it out")
    return None


# A few units in the last place of a float64: above the rounding errors of ndtri and the product.
_SHRINK = 1 - 2.0**-50


def _radius(lower: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return `sigma * Phi^-1(lower)`, rounded down; 0 where lower is at most 1/2."""
    return np.maximum(sigma * special.ndtri(np.maximum(lower, 0.5)) * _SHRINK, 0.0)


def _lowered(lower: np.ndarray, slack: float) -> np.ndarray:
    """Return a lower bound less the slack, rounded down, at least 0; the bound itself for 0."""
    return np.maximum(np.nextafter(lower - slack, -1.0), 0.0) if slack else lower


def _raised(upper: np.ndarray, slack: ArrayLike) -> np.ndarray:
    """Return an upper bound plus the slack, rounded up, at most 1; the bound itself for 0."""
    return np.minimum(np.nextafter(upper + slack, np.inf), 1.0) if np.any(slack) else upper


def _lower(count: np.ndarray, n: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return `lower_confidence_bound` of checked float64 arrays."""
    count, n, alpha = np.broadcast_arrays(count, n, alpha)
    some = np.maximum(count, 1)  # the quantile is not defined at count = 0
    bound = np.where(count == n, np.exp(np.log(alpha) / n), special.betaincinv(some, n - some + 1, alpha))
    bound = np.minimum(bound, np.nextafter(1.0, 0.0))
    step = np.spacing(bound)
    for _ in range(_HALVINGS):
        too_high = _tail(some, n, bound) > alpha
        if not too_high.any():
            break
        bound = np.where(too_high, np.maximum(bound - step, 0.0), bound)
        step = 2 * step
    return np.where(count == 0, 0.0, bound)


def _upper(count: np.ndarray, n: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return `upper_confidence_bound` of checked float64 arrays."""
    return np.minimum(np.nextafter(1 - _lower(n - count, n, alpha), 2.0), 1.0)


def _tail(count: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return P(X >= count) for X ~ Binomial(n, p)."""
    some = np.maximum(count, 1)
    # For count = n it is p ** n, where betainc loses digits.
    with np.errstate(divide="ignore"):
        tail = np.where(count == n, np.exp(n * np.log(p)), special.betainc(some, n - some + 1, p))
    return np.where(count == 0, 1.0, tail)


def _checked(**values: ArrayLike) -> tuple[np.ndarray, ...]:
    """Return count, n, alpha and other arguments as float64 arrays that broadcast together, in order.

    Raise a `UserError` for a count, n, alpha, runner_up or sigma outside its range.
    """
    checked = dict(zip(values, number_arrays(**values), strict=True))
    count, n, alpha, sigma = (checked.get(name) for name in ("count", "n", "alpha", "sigma"))
    check_all("alpha", alpha, (alpha > 0) & (alpha < 1), "use a number in (0, 1), such as 0.001")
    check_all("alpha", alpha, alpha >= SMALLEST_PROBABILITY, f"use a number of at least {SMALLEST_PROBABILITY}")
    check_all(
        "n", n, (n >= 1) & (n <= MOST_EXACT) & (n == np.floor(n)), "use a whole number of at least 1, at most 2**53"
    )
    inside = (count >= 0) & (count <= n) & (count == np.floor(count))
    check_all("count", count, inside, "use whole numbers from 0 to n")
    if "runner_up" in checked:
        runner_up = checked["runner_up"]
        inside = (runner_up >= 0) & (runner_up <= n - count) & (runner_up == np.floor(runner_up))
        check_all("runner_up", runner_up, inside, "use whole numbers from 0 to n - count")
    if sigma is not None:
        check_all("sigma", sigma, np.isfinite(sigma) & (sigma > 0), "use a number greater than 0")
    return tuple(value.astype(np.float64) for value in checked.values())


def _check_bound(bound: Any) -> None:
    if not isinstance(bound, str) or bound not in BOUNDS:
        raise UserError(f"bound={shown(bound)} is unknown; use one of {', '.join(BOUNDS)}")


def check_counts(name: str, counts: ArrayLike) -> np.ndarray:
    """Return counts of votes as int64 `[B, K]`; a `UserError` for anything else."""
    counts = number_array(name, counts)
    if counts.ndim != 2 or not counts.shape[1]:
        raise UserError(f"{name} has shape {counts.shape}; it must be [B, K]")
    whole = (counts >= 0) & (counts <= MOST_EXACT) & (counts == np.floor(counts))
    check_all(name, counts, whole, "use whole numbers of at least 0 and at most 2**53")
    return counts.astype(np.int64)


def most_of_others(counts: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return from counts `[B, K]` the largest `[B]` of any class but the `selected` `[B]`; 0 if there is no other.

    Example:
      >>> import numpy as np
      >>> from rs_consistency.statistics.bounds import most_of_others
      >>> most_of_others(np.array([[3, 9, 4], [5, 5, 0]]), selected=np.array([1, 0])).tolist()
      [4, 5]
    """
    others = any_array("counts", number_array("counts", counts), "[B, K]").copy()
    about = "[B]: a class for each image"
    selected = whole_array("selected", selected, about, at_most=max(others.shape[1] - 1, 0))
    if selected.shape != others.shape[:1]:
        raise UserError(f"selected has shape {selected.shape}; counts {others.shape} need {about}")
    np.put_along_axis(others, selected[:, None], 0, axis=1)
    return others.max(axis=1, initial=0)


def p_value_of(most: ArrayLike, runner_up: ArrayLike, *, n: ArrayLike | None = None, slack: float = 0.0) -> np.ndarray:
    """Return p-values of the two-sided binomial test at 1/2 between the two largest counts, `most` at least 1.

    With a slack, `n * slack` is added, for n votes in all: they are within that of the assumed law in total variation,
    so the sum, at most 1, is a p-value for them.

    Example:
      >>> from rs_consistency.statistics.bounds import p_value_of
      >>> p_value_of([60, 70], [40, 30]).round(5).tolist()
      [0.05689, 8e-05]
    """
    slack = number_from("slack", slack, at_least=0, at_most=1)
    if slack and n is None:
        raise UserError(f"slack={slack} needs n, the number of all votes of an image")
    given = {"most": most, "runner_up": runner_up} | ({} if n is None else {"n": n})
    arrays = number_arrays(**given)
    for name, value in zip(given, arrays, strict=True):
        whole = (value >= 0) & (value <= MOST_EXACT) & (value == np.floor(value))
        check_all(name, value, whole, "use whole numbers from 0 to 2**53")
    most, runner_up, *others = (value.astype(np.float64) for value in arrays)
    # P(X >= most) of X ~ Binomial(most + runner_up, 1/2), doubled: at 1/2 the other tail is as large.
    tail = special.betainc(most, runner_up + 1, 0.5)
    p_value = np.where(np.equal(most, runner_up), 1.0, np.minimum(2 * tail, 1.0))
    return _raised(p_value, np.nextafter(others[0] * slack, np.inf)) if slack else p_value

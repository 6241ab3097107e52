"""The statistics of a certificate: confidence bounds and radii, in float64 on the host.

Everything broadcasts over arrays. Every bound errs on the safe side by construction: the binomial tail at a returned
lower bound is computed, and the bound is lowered until it does not exceed alpha. There are three of them (`BOUNDS`):

- `clopper_pearson`: p_A against 1/2, the published protocol. Source: Cohen, Rosenfeld, Kolter (ICML 2019), theorem 1
  and algorithm CERTIFY.
- `two_class`: p_A against p_B, at alpha / 2 each; it can certify where p_A < 1/2. Source: the same theorem 1.
- `randomized`: as `clopper_pearson`, with exact coverage through a uniform draw. Source: Stevens (Biometrika 1950); for
  smoothing, Voracek (NeurIPS 2024).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency.common.checks import SMALLEST_PROBABILITY, check_all, number_array
from rs_consistency.common.errors import UserError

ABSTAIN = -1  # the prediction of an image without a certificate
BOUNDS = ("clopper_pearson", "two_class", "randomized")
# The defaults of every certification, as published: votes that select, votes that measure, error probability.
N0, N, ALPHA = 100, 100_000, 0.001
_HALVINGS = 60  # of an interval within [0, 1]: more than float64 can tell apart


def lower_confidence_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> np.ndarray:
    """One-sided Clopper-Pearson lower bound of a binomial proportion.

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
    """
    return _lower(*_checked(count, n, alpha))[()]


def upper_confidence_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> np.ndarray:
    """One-sided Clopper-Pearson upper bound of a binomial proportion: below p with probability at most alpha.

    Arguments, shapes and errors as for `lower_confidence_bound`. Always above 0.
    """
    return _upper(*_checked(count, n, alpha))[()]


def randomized_lower_bound(count: ArrayLike, n: ArrayLike, alpha: ArrayLike, uniform: ArrayLike) -> np.ndarray:
    """The randomized lower bound of a binomial proportion: the p with P(X > count) + uniform * P(X = count) = alpha.

    Guarantee: for `count ~ Binomial(n, p)` and an independent uniform draw, the bound exceeds p with a probability of
    exactly alpha, for every p up to alpha ** (1 / n), and at most alpha beyond. It lies between the Clopper-Pearson
    bounds of `count` and of `count + 1`; for count = n the draw is not used, so that it stays below 1.

    Args:
      count: as for `lower_confidence_bound`, and so are `n` and `alpha`.
      n: trials.
      alpha: error probability.
      uniform: draws from (0, 1] that depend on nothing that the counts depend on.

    Returns:
      float64, shaped as the arguments broadcast.

    Raises:
      UserError: for an argument outside its range.

    Source: Stevens (Biometrika 1950); for smoothing, Voracek (NeurIPS 2024).
    """
    count, n, alpha = _checked(count, n, alpha)
    uniform = number_array("uniform", uniform).astype(np.float64)
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
    """The l2 radius that `count` of `n` votes certify.

    Guarantee: if the votes are independent and the class was chosen without looking at them, then the probability
    that the radius is greater than 0 while the smoothed classifier's prediction is not that class everywhere within it
    is at most alpha.

    `sigma * Phi^-1(p_A)` with `p_A = lower_confidence_bound(count, n, alpha)`; 0 where `p_A <= 1/2`. A p_A below 1/2
    means abstention; the radius alone does not distinguish it from a certificate of radius 0.

    Args:
      count: votes for the chosen class, whole numbers in 0..n.
      n: all votes.
      alpha: error probability, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise, positive; the radius is in its units.

    Returns:
      float64, shaped as the arguments broadcast; finite and at least 0.

    Raises:
      UserError: for an argument outside its range.
    """
    sigma = _checked_sigma(sigma)
    return _radius(_lower(*_checked(count, n, alpha)), sigma)[()]


class Certified(NamedTuple):
    """What votes prove.

    Attributes:
      certified: bool, whether there is a certificate at all; else abstain.
      radius: float64 l2 radius; 0 where nothing is certified.
      lower: float64, the lower confidence bound of p_A that it comes from.
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
) -> Certified:
    """What n votes prove about a class that was chosen without looking at them.

    Guarantee, for each `bound`: the probability that something is certified that is not so is at most alpha.

    With `two_class`, `sigma / 2 * (Phi^-1(p_A) - Phi^-1(p_B))`, p_A from below and p_B from above at alpha / 2 each,
    p_B at most 1 - p_A. The largest count of any other class bounds p_B: that of the truly second is not larger.

    Args:
      count: votes for the chosen class.
      runner_up: the most votes that any other class has; only `two_class` looks at it.
      n: all votes.
      alpha: error probability, in (0, 1), at least 1e-100.
      sigma: standard deviation of the noise, which was drawn in float32 (`drawn_sigma`).
      bound: one of `BOUNDS`.
      uniform: draws from (0, 1], for `randomized`: from `noise.bound_uniform`.

    Returns:
      Arrays as the arguments broadcast.

    Raises:
      UserError: for an argument outside its range, or an unknown bound.
    """
    sigma = drawn_sigma(_checked_sigma(sigma))
    if bound == "two_class":
        count, n, alpha = _checked(count, n, alpha)
        _, _, runner_up = np.broadcast_arrays(count, n, number_array("runner_up", runner_up))
        good = (runner_up >= 0) & (runner_up <= n - count) & (runner_up == np.floor(runner_up))
        check_all("runner_up", runner_up, good, "use whole numbers from 0 to n - count")
        lower = _lower(count, n, alpha / 2)
        upper = np.minimum(_upper(runner_up, n, alpha / 2), 1 - lower)
        certified = lower >= upper
        with np.errstate(invalid="ignore"):
            at_lower, at_upper = special.ndtri(lower), special.ndtri(upper)
            rounding = (1 - _SHRINK) * (np.abs(at_lower) + np.abs(at_upper))
            radius = sigma / 2 * (at_lower - at_upper - rounding)
        radius = np.where(certified, np.maximum(radius, 0.0), 0.0)
        return Certified(certified, radius[()], lower)
    if bound == "clopper_pearson":
        lower = _lower(*_checked(count, n, alpha))
    elif bound == "randomized":
        if uniform is None:
            raise UserError("bound=randomized needs uniform draws; take noise.bound_uniform(seed, indices)")
        lower = np.asarray(randomized_lower_bound(count, n, alpha, uniform))
    else:
        raise UserError(f"bound={bound!r} is unknown; use one of {', '.join(BOUNDS)}")
    return Certified(lower >= 0.5, _radius(lower, sigma), lower)


def drawn_sigma(sigma: ArrayLike) -> np.ndarray:
    """The sigma that radii may be computed with: noise is drawn in float32, whose sigma may be a little smaller."""
    return np.minimum(sigma, np.float64(np.float32(sigma)))


def radius_ceiling(n: ArrayLike, *, alpha: ArrayLike, sigma: ArrayLike, bound: str = "clopper_pearson") -> np.ndarray:
    """The largest radius that n votes can certify: all of them for one class, `sigma * Phi^-1(alpha ** (1 / n))`."""
    return certify_votes(n, 0, n, alpha=alpha, sigma=sigma, bound=bound, uniform=1.0).radius


# A few units in the last place of a float64: more than ndtri and the product can be wrong by.
_SHRINK = 1 - 2.0**-50


def _radius(lower: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """`sigma * Phi^-1(lower)`, rounded down; 0 where lower is at most 1/2."""
    return np.maximum(sigma * special.ndtri(np.maximum(lower, 0.5)) * _SHRINK, 0.0)


def _lower(count: np.ndarray, n: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`lower_confidence_bound` of checked float64 arrays."""
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
    """`upper_confidence_bound` of checked float64 arrays."""
    return np.minimum(np.nextafter(1 - _lower(n - count, n, alpha), 2.0), 1.0)


def _tail(count: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P(X >= count) for X ~ Binomial(n, p)."""
    some = np.maximum(count, 1)
    # For count = n, p ** n: betainc loses digits there.
    with np.errstate(divide="ignore"):
        tail = np.where(count == n, np.exp(n * np.log(p)), special.betainc(some, n - some + 1, p))
    return np.where(count == 0, 1.0, tail)


def _checked(count: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three as float64 arrays; a `UserError` for what is outside its range."""
    count, n, alpha = (number_array(name, value) for name, value in {"count": count, "n": n, "alpha": alpha}.items())
    check_all("alpha", alpha, (alpha > 0) & (alpha < 1), "use a number in (0, 1), such as 0.001")
    check_all("alpha", alpha, alpha >= SMALLEST_PROBABILITY, f"use a number of at least {SMALLEST_PROBABILITY}")
    check_all("n", n, np.isfinite(n) & (n >= 1) & (n == np.floor(n)), "use a whole number of at least 1")
    inside = (count >= 0) & (count <= n) & (count == np.floor(count))
    check_all("count", count, inside, "use whole numbers from 0 to n")
    return tuple(value.astype(np.float64) for value in (count, n, alpha))


def _checked_sigma(sigma: ArrayLike) -> np.ndarray:
    sigma = number_array("sigma", sigma)
    check_all("sigma", sigma, np.isfinite(sigma) & (sigma > 0), "use a number greater than 0")
    return sigma.astype(np.float64)


def most_of_others(counts: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """`[B]`, the most votes of any class but the selected one; 0 where there is no other."""
    others = counts.copy()
    np.put_along_axis(others, selected[:, None], 0, axis=1)
    return others.max(axis=1, initial=0)


def p_value_of(most: ArrayLike, runner_up: ArrayLike) -> np.ndarray:
    """Of the two-sided binomial test at 1/2 between the two largest counts, `[B]` each, `most` at least 1."""
    # P(X >= most) of X ~ Binomial(most + runner_up, 1/2), twice: at 1/2 the other tail is as large.
    tail = special.betainc(most, np.asarray(runner_up) + 1, 0.5)
    return np.where(np.equal(most, runner_up), 1.0, np.minimum(2 * tail, 1.0))

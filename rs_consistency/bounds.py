"""The statistics of a certificate: confidence bounds and radii, in float64 on the host.

Source: Cohen, Rosenfeld, Kolter (ICML 2019), theorem 1 and algorithm CERTIFY. Everything broadcasts over arrays.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rs_consistency.checks import SMALLEST_PROBABILITY
from rs_consistency.errors import UserError


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
    count, n, alpha = (_numbers(name, value) for name, value in {"count": count, "n": n, "alpha": alpha}.items())
    _check_range("alpha", alpha, (alpha > 0) & (alpha < 1), "use a number in (0, 1), such as 0.001")
    _check_range("alpha", alpha, alpha >= SMALLEST_PROBABILITY, f"use a number of at least {SMALLEST_PROBABILITY}")
    _check_range("n", n, np.isfinite(n) & (n >= 1) & (n == np.floor(n)), "use a whole number of at least 1")
    inside = (count >= 0) & (count <= n) & (count == np.floor(count))
    _check_range("count", count, inside, "use whole numbers from 0 to n")
    count, n, alpha = (value.astype(np.float64) for value in (count, n, alpha))

    some = np.clip(count, 1, None)  # the quantile is not defined at count = 0
    bound = special.betaincinv(some, n - some + 1, alpha)
    bound = np.where(count == n, np.exp(np.log(alpha) / n), bound)
    return np.where(count == 0, 0.0, np.minimum(bound, np.nextafter(1.0, 0.0)))[()]


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
    sigma = _numbers("sigma", sigma)
    _check_range("sigma", sigma, np.isfinite(sigma) & (sigma > 0), "use a number greater than 0")
    lower = lower_confidence_bound(count, n, alpha)
    return (sigma * np.maximum(special.ndtri(np.maximum(lower, 0.5)), 0.0)).astype(np.float64)[()]


def _numbers(name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number):
        raise UserError(f"{name}={value!r}: use numbers")
    return array


def _check_range(name: str, value: np.ndarray, good: np.ndarray, remedy: str) -> None:
    bad = np.broadcast_to(value, good.shape)[~good]
    if bad.size:
        raise UserError(f"{name}={bad.flat[0]}: {remedy}")

"""Checks of settings before the first vote: whether any votes can certify, decide or predict with them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.common.checks import SMALLEST_PROBABILITY, number_above, number_from, probability, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import ATTACK_TESTS, certify_votes, p_value_of

_FEW = np.arange(1, 1001)  # for the smallest alpha, 1e-100, it takes some 340 votes
MOST_VOTES = 2**29  # of a certification


def fewest_votes(
    *, alpha: float, bound: str = "clopper_pearson", alpha_share: float | None = None, slack: float = 0.0
) -> int | None:
    """Return the smallest number of votes that certify a class if all are for it; None if no number does.

    Arguments as for `bounds.certify_votes`.

    Example:
      >>> from rs_consistency.statistics.limits import fewest_votes
      >>> fewest_votes(alpha=0.001), fewest_votes(alpha=0.05)
      (10, 5)
    """
    alpha = probability("alpha", alpha)
    settings = {"alpha": alpha, "sigma": 1.0, "bound": bound, "alpha_share": alpha_share, "uniform": 1.0}
    return _fewest(certify_votes(_FEW, 0, _FEW, **settings, slack=slack).certified)


def check_certificates(n: int, *, alpha: float, **settings: Any) -> None:
    """Raise a `UserError` if n votes, all for one class, certify nothing; the others are as for `fewest_votes`.

    Example:
      >>> from rs_consistency.statistics.limits import check_certificates
      >>> check_certificates(9, alpha=0.001)
      Traceback (most recent call last):
        ...
      rs_consistency.common.errors.UserError: n=9 votes certify nothing at alpha=0.001, even if all agree; use n=10
    """
    n, alpha = whole_number("n", n, at_least=1, at_most=MOST_VOTES), probability("alpha", alpha)
    fewest = fewest_votes(alpha=alpha, **settings)
    _check("certify nothing", n, alpha, fewest, enough=fewest is not None and n >= fewest)


def check_predictions(n: int, *, alpha: float, slack: float = 0.0) -> None:
    """Raise a `UserError` if n votes, all for one class, predict nothing; n and slack as for `bounds.p_value_of`."""
    _check_test("predict nothing", n, alpha, 1, slack)


def check_attacks(n: int, *, alpha: float, slack: float = 0.0) -> None:
    """Raise a `UserError` if n votes, all for one class, prove no attack; n and slack as for `bounds.p_value_of`."""
    alpha = probability("alpha", alpha)
    number_from("alpha", alpha, at_least=ATTACK_TESTS * SMALLEST_PROBABILITY)
    _check_test("prove no attack", n, alpha, ATTACK_TESTS, slack)


def check_decisions(n: int, *, radius: float, sigma: float, alpha: float, slack: float = 0.0) -> None:
    """Raise a `UserError` if n votes, all for one class, do not certify a radius; arguments as for `sequential.decide`.

    The message names the largest radius that n votes can certify, and the fewest votes that can certify the radius.

    Example:
      >>> from rs_consistency.statistics.limits import check_decisions
      >>> check_decisions(100, radius=1.0, sigma=0.5, alpha=0.001)
      Traceback (most recent call last):
        ...
      rs_consistency.common.errors.UserError: radius=1: n=100 votes cannot certify it; use radius=0.66 or n=459
    """
    n, radius = whole_number("n", n, at_least=1, at_most=MOST_VOTES), number_from("radius", radius, at_least=0)
    sigma, alpha = number_above("sigma", sigma, 0), probability("alpha", alpha)

    def certifies(votes: int, radius: float) -> bool:
        found = sequential.decide(votes, votes, radius=radius, sigma=sigma, alpha=alpha, slack=slack)
        return found == sequential.CERTIFIED

    if certifies(n, radius):
        return
    smaller = _last(lambda thousandths: certifies(n, thousandths / 1000), int(radius * 1000)) / 1000
    remedies = [f"radius={smaller:g}"] if certifies(n, smaller) else []
    if certifies(MOST_VOTES, radius):
        remedies.append(f"n={_last(lambda votes: not certifies(votes, radius), MOST_VOTES) + 1}")
    remedy = " or ".join(remedies) or "a larger sigma"
    raise UserError(f"radius={radius:g}: n={n} votes cannot certify it; use {remedy}")


def _last(holds: Callable[[int], bool], largest: int) -> int:
    """Return the last of the numbers 1..largest up to which a condition holds; 0 if it never does."""
    low, high = 0, largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _fewest(enough: np.ndarray) -> int | None:
    """Return the first number of `_FEW` that is enough."""
    return int(_FEW[enough.argmax()]) if enough.any() else None


def _check_test(what: str, n: int, alpha: float, tests: int, slack: float) -> None:
    """Raise unless n votes can pass one of the tests that share alpha."""
    n, alpha = whole_number("n", n, at_least=1, at_most=MOST_VOTES), probability("alpha", alpha)

    def enough(n: ArrayLike) -> np.ndarray:
        return p_value_of(n, 0, n=n, slack=slack) <= alpha / tests

    _check(what, n, alpha, _fewest(enough(_FEW)), enough=bool(enough(n)))  # the sampler's error grows with the votes


def _check(what: str, n: int, alpha: float, fewest: int | None, *, enough: bool) -> None:
    if not enough:
        remedy = "a larger alpha" if fewest is None else f"n={fewest}"
        raise UserError(f"n={n} votes {what} at alpha={alpha:g}, even if all agree; use {remedy}")

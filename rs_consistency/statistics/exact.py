"""Proofs that a line of a certificate file follows from its counts, in whole-number arithmetic.

`bounds` and `sequential` compute in float64, with SciPy's quantiles. A line that they wrote can be proven here without
either: Python's integers are enough. Every rounding goes against the line, so a rounding can refuse a true line, but
never prove a false one. Floats only choose where to look for a proof (`two_class`); the proof does not rest on them.

Votes are Bernoulli(q) where the statement is about p_A, and `eps` bounds abs(q - p_A): 0 if the noise has exactly the
law that the theorem asks for. For the class A, with X = `count` of n votes for it:

| line | is proven if |
|---|---|
| radius R, `clopper_pearson` | P(Bin(n, p) >= count) <= alpha for p = Phi(R / sigma) + eps |
| radius R, `randomized` | P(Bin(n, p) > count) + u P(Bin(n, p) = count) <= alpha for the same p |
| radius R, `two_class` | as `clopper_pearson`, at s alpha; or so for some t: P(Bin(n, Phi(t) + eps) >= count) is |
| | at most s alpha, P(Bin(n, Phi(t - 2 R / sigma) - eps) <= runner_up) at most (1 - s) alpha, s = `alpha_share` |
| certified at R | H > T p, and evidence E_T against p = Phi(R / sigma) + eps of at least 1 / alpha |
| not certified at R | H < T p, and evidence E_T against p = Phi(R / sigma) - eps of at least 1 / alpha |
| prediction | 2 P(Bin(count + runner_up, 1/2) >= count) + n eps <= alpha |

Why that is enough. *Radius:* let the line be wrong, so p_A < Phi(R / sigma) and q < p. The tail increases with the
probability, so at q it is below alpha: an event of probability at most alpha under q. The draw u of `randomized` is a
multiple of 2**-53 that was rounded up from a uniform number; this makes the event rarer. *Two classes:* the two
events have probability at most s alpha and (1 - s) alpha. Without them p_A >= Phi(t) and p_B <= Phi(t - 2 R / sigma).
*Decisions:* E_T is a martingale at p. It is convex in H and at most 1 at H = T p, so that both outcomes lie beyond a
limit of H, and a smaller (larger) q makes H smaller (larger). E_T is no supermartingale for other q, and need not be.
*Prediction:* n votes are within n eps of votes of the assumed law, in total variation.

How it is computed. Probabilities are whole numbers of units 2**-256. Phi is an alternating series, see `series`.
A binomial tail begins with its largest term, from Stirling's series or the exact binomial coefficient, and ends where
a geometric series bounds the rest: some ten standard deviations of terms, not n.
"""

import math
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from typing import Any

from rs_consistency.common.checks import boolean, finite_number, shown, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.series import pi, within

Exact = int | float | Decimal | Fraction  # all of them have an exact value; a float64 is a fraction of 2**k

_BITS = 256  # of probabilities and mantissas
_ONE = 1 << _BITS
_SUM_BITS = 128  # of the terms of a tail, relative to the first
_NEGLIGIBLE = 1 << _SUM_BITS - 72  # a term from which on the rest is bounded, not summed
_MOST_STEPS = 1000  # terms before the largest one, or 20 standard deviations of them; only for alpha >= 1/2
_FEW = 512  # binomial coefficients up to it are exact, beyond it from Stirling's series
_FAR = 10  # sigmas; the series of Phi is for less. Phi(10) > 1 - exp(-50) / (10 sqrt(2 pi)) > 1 - 2**-76

_MOST_DIGITS = 1000  # before and behind the point of a Decimal

Above = tuple[int, int]  # (m, e): the upper bound m 2**e of a positive number, with m below 2**257


def proves_radius(
    n: int,
    count: int,
    radius: Exact,
    *,
    sigma: Exact,
    alpha: Exact,
    eps: Exact = 0,
    bound: str = "clopper_pearson",
    runner_up: int | None = None,
    uniform: Exact | None = None,
    alpha_share: Exact | None = None,
) -> bool:
    """Return whether the counts prove an l2 radius, by the table of the module's text.

    Guarantee: let the votes be independent, for a class that was chosen without looking at them. Then a radius that is
    proven, and within which the smoothed classifier does not predict the class everywhere, has probability at most
    alpha. False says that the rounding or the counts leave it open, not that the radius is wrong.

    A radius of 0 is proven if p_A >= 1/2 is: for `two_class`, if p_A >= p_B is. For count = n the draw of `randomized`
    is not used, as in `bounds.randomized_lower_bound`. The time grows with the standard deviation of the count: from
    less than a millisecond at n = 100,000 to some tens at n = 2**29, and six times that for `two_class`.

    Source: Clopper and Pearson (Biometrika 1934); Stevens (Biometrika 1950) for `randomized`; Cohen, Rosenfeld, Kolter
    (ICML 2019), theorem 1.

    Args:
      n: all votes.
      count: votes for the class.
      radius: exactly as the line prints it, such as `Decimal("1.144999")`; a float stands for its exact binary value.
      sigma: standard deviation of the noise, exactly.
      alpha: error probability, in (0, 1).
      eps: bound of the difference between the probability of a vote and p_A, at least 0.
      bound: one of `bounds.BOUNDS`.
      runner_up: most votes for another class; `two_class` needs it.
      uniform: draw from (0, 1] of `noise.bound_uniform`; `randomized` needs it.
      alpha_share: share of alpha for p_A, in (0, 1); `two_class` needs it.

    Raises:
      UserError: for an argument outside its range, or one that the bound needs and that is missing.

    Example:
      >>> from decimal import Decimal
      >>> from rs_consistency.statistics.exact import proves_radius
      >>> [proves_radius(100_000, 99_000, Decimal(text), sigma=0.5, alpha=0.001) for text in ("1.144999", "1.145000")]
      [True, False]
      >>> proves_radius(100_000, 99_000, Decimal("1.144999"), sigma=0.5, alpha=0.001, eps=1e-7)
      False
    """
    n = whole_number("n", n, at_least=1)
    count = whole_number("count", count, at_least=0, at_most=n)
    if not isinstance(bound, str) or bound not in ("clopper_pearson", "two_class", "randomized"):
        raise UserError(f"bound={shown(bound)} is unknown; use clopper_pearson, two_class or randomized")
    distance, alpha, eps = _settings(radius, sigma, alpha, eps)
    if bound == "two_class":
        runner_up = whole_number("runner_up", runner_up, at_least=0, at_most=n - count)
        share = _between("alpha_share", alpha_share)
        return _proves_two_classes(n, count, runner_up, distance, (share * alpha, (1 - share) * alpha), eps)
    weight = Fraction(1)
    if bound == "randomized":
        weight = _fraction("uniform", uniform)
        if not 0 < weight <= 1:
            raise UserError(f"uniform={shown(uniform)}: use a number greater than 0 and at most 1")
        weight = Fraction(1) if count == n else weight
    return _tail_at_most(n, count, _cdf(distance)[1] + eps, alpha, weight)


def proves_decision(
    hits: int, votes: int, radius: Exact, *, certified: bool, sigma: Exact, alpha: Exact, eps: Exact = 0
) -> bool:
    """Return whether the votes prove the decision at an l2 radius: certified, or not certified.

    Guarantee: that of `sequential.decide`, for probabilities of a vote within eps of p_A: certified is ever proven with
    probability at most alpha if p_A < Phi(radius / sigma), not certified if p_A > Phi(radius / sigma), in all looks
    together. An undecided line claims nothing and needs no proof.

    Source: as for `statistics.sequential`.

    Args:
      hits: H, votes for the class.
      votes: T, all votes so far, at least 1.
      radius: exactly as the user wrote it, such as `Decimal("0.3")`.
      certified: the decision in question; False for not certified.
      sigma: standard deviation of the noise, exactly.
      alpha: error probability, in (0, 1).
      eps: bound of the difference between the probability of a vote and p_A, at least 0.

    Raises:
      UserError: for an argument outside its range.

    Example:
      >>> from decimal import Decimal
      >>> from rs_consistency.statistics.exact import proves_decision
      >>> asked = {"sigma": 0.5, "alpha": 0.001}
      >>> [proves_decision(900, 1000, Decimal(text), certified=True, **asked) for text in ("0.5", "0.64", "1.0")]
      [True, False, False]
      >>> [proves_decision(900, 1000, Decimal(text), certified=False, **asked) for text in ("0.5", "0.64", "1.0")]
      [False, False, True]
    """
    votes = whole_number("votes", votes, at_least=1)
    hits = whole_number("hits", hits, at_least=0, at_most=votes)
    certified = boolean("certified", certified)
    distance, alpha, eps = _settings(radius, sigma, alpha, eps)
    low, high = _cdf(distance)
    p = high + eps if certified else low - eps
    beyond = hits * _ONE > votes * p if certified else hits * _ONE < votes * p
    if not (0 < p < _ONE and beyond):
        return False
    # E_T = c(H) c(T - H) / P(Bin(T, p) = H), where c(m) is the probability of m heads in 2 m tosses.
    at_hits = _probability(votes, hits, p)
    return _at_most(_times(at_hits, _times(_inverse_central(hits), _inverse_central(votes - hits))), alpha)


def proves_prediction(n: int, count: int, runner_up: int, *, alpha: Exact, eps: Exact = 0) -> bool:
    """Return whether the two largest of n counts prove that the class with the most votes is the prediction.

    The two-sided binomial test at 1/2, as `bounds.p_value_of` computes it, has to have a p-value of at most alpha. With
    eps, n eps is added to the p-value.

    Guarantee: let the votes be independent, each with a law within eps of the assumed one in total variation. Then a
    class that the smoothed classifier does not predict is proven with probability at most alpha. Two equal counts prove
    nothing.

    Source: as for `rs_consistency.predict`.

    Args:
      n: all votes.
      count: the largest count.
      runner_up: the second largest, at most `count`.
      alpha: error probability, in (0, 1).
      eps: total variation between the laws of a vote, at least 0.

    Raises:
      UserError: for an argument outside its range.

    Example:
      >>> from rs_consistency.statistics.exact import proves_prediction
      >>> [proves_prediction(100, count, 100 - count, alpha=0.001) for count in (66, 67)]
      [False, True]
    """
    n = whole_number("n", n, at_least=1)
    count = whole_number("count", count, at_least=1, at_most=n)
    runner_up = whole_number("runner_up", runner_up, at_least=0, at_most=min(count, n - count))
    left = _between("alpha", alpha) - n * _not_negative("eps", eps)
    if left <= 0 or count == runner_up:
        return False
    return _tail_at_most(count + runner_up, count, _ONE >> 1, left / 2, Fraction(1))


def float_above(value: Exact) -> float:
    """Return the smallest float64 that is not below a number, such as the `slack` of `bounds` for an exact eps.

    Example:
      >>> from fractions import Fraction
      >>> from rs_consistency.statistics.exact import float_above
      >>> float_above(Fraction(1, 10)), float_above(Fraction(1, 3)) > Fraction(1, 3)
      (0.1, True)
    """
    exact = _fraction("value", value)
    nearest = float(exact)
    return nearest if Fraction(nearest) >= exact else math.nextafter(nearest, math.inf)


def _proves_two_classes(
    n: int, count: int, runner_up: int, distance: Fraction, alphas: tuple[Fraction, Fraction], eps: int
) -> bool:
    """Return whether some t proves p_A >= Phi(t) and p_B <= Phi(t - 2 distance), each at its own alpha."""
    alpha, alpha_b = alphas
    if _tail_at_most(n, count, _cdf(distance)[1] + eps, alpha, Fraction(1)):
        return True  # t = distance: p_B is at most 1 - p_A
    if not count:
        return False
    t = _quantile_near(_largest_probability(n, count, alpha) - eps)
    if t is None or not _tail_at_most(n, count, _cdf(t)[1] + eps, alpha, Fraction(1)):
        return False
    most = _cdf(t - 2 * distance)[0] - eps  # P(Bin(n, p) <= r) = P(Bin(n, 1 - p) >= n - r)
    return _tail_at_most(n, n - runner_up, _ONE - most, alpha_b, Fraction(1))


# --- where to look for a proof: floats, on which nothing rests ---------------------------------------------------


def _largest_probability(n: int, count: int, alpha: Fraction) -> int:
    """Return about the largest p with P(Bin(n, p) >= count) <= alpha, in units; a relative 2**-60 too small.

    Newton's method on the logarithm of the tail, which is concave: after one step it rises to the solution from below.
    """
    z, share = -NormalDist().inv_cdf(float(alpha)), count / n
    middle, spread = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    p = min(max(int((middle - spread) / (1 + z**2 / n) * 2**60), 1), 2**60 - 1) << _BITS - 60
    for _ in range(64):
        ratio = _tail_over_first(n, count, p, Fraction(1))
        (mantissa, exponent), (top, bottom) = _probability(n, count, p), alpha.as_integer_ratio()
        shift = _SUM_BITS - exponent  # positive, as n and count are numbers of votes
        excess = Fraction(top << shift, bottom * mantissa * ratio) - 1  # alpha / tail - 1
        far = abs(excess) > Fraction(1, 2)
        above, below = excess.numerator + excess.denominator, excess.denominator  # as whole numbers: no overflow
        log = math.log(above) - math.log(below) if far else math.log1p(float(excess))
        scale = p * ratio // count >> _SUM_BITS  # of p, for a change of the logarithm by 1
        p = min(max(p + (scale * int(log * 2**64) >> 64), p >> 1), _ONE - 1)
        if abs(log) < 2.0**-50:
            break
    return p - (scale >> 60)


def _quantile_near(p: int) -> Fraction | None:
    """Return t with Phi(t) about p units, 2**-96 too small; None for a p outside (0, 1)."""
    if not 0 < p < _ONE:
        return None
    start = NormalDist().inv_cdf(p / _ONE) if p < _ONE >> 1 else -NormalDist().inv_cdf((_ONE - p) / _ONE)
    missing = Fraction(p - _cdf(Fraction(start))[0], _ONE)
    t = Fraction(start) + missing / Fraction(NormalDist().pdf(start))
    return Fraction(math.floor(t * 2**100) - 16, 2**100)


# --- probabilities in whole numbers ------------------------------------------------------------------------------


def _tail_at_most(n: int, count: int, p: int, alpha: Fraction, weight: Fraction) -> bool:
    """Return whether P(X > count) + weight P(X = count) <= alpha for X ~ Binomial(n, p); False where it is left open.

    The probability p > 0 is in units of 2**-256.
    """
    if p >= _ONE:
        return False
    before = n * p - (count + 1) * _ONE  # how far count + 1 lies below the mean
    # If it does not lie above the mean, it does not lie above the median, and P(X > count) is at least 1/2.
    far = before > _MOST_STEPS * _ONE and before**2 > 400 * n * p * (_ONE - p)
    if before >= 0 and (alpha < Fraction(1, 2) or far):
        return False
    ratio = _tail_over_first(n, count, p, weight)
    return _at_most(_times(_probability(n, count, p), _up(ratio, -_SUM_BITS)), alpha)


def _tail_over_first(n: int, count: int, p: int, weight: Fraction) -> int:
    """Return (P(X > count) + weight P(X = count)) / P(X = count) in units of 2**-128, rounded up.

    A term is the one before times (n - k) / (k + 1) * p / q. These ratios fall, so that once a ratio r is below 1, the
    further terms sum to at most term * r / (1 - r).
    """
    odds = (p << _SUM_BITS) // (_ONE - p) + 1
    term, total = 1 << _SUM_BITS, math.ceil(weight * (1 << _SUM_BITS))
    for k in range(count, n):
        factor = (n - k) * odds
        if term < _NEGLIGIBLE:
            whole = (k + 1) << _SUM_BITS
            if factor < whole:
                return total + term * factor // (whole - factor) + 1
        term = (term * factor // (k + 1) >> _SUM_BITS) + 1
        total += term
    return total


def _probability(n: int, k: int, p: int) -> Above:
    """Return P(X = k) for X ~ Binomial(n, p) and p in (0, 1) units, rounded up by a relative 2**-80 at most.

    With m = n - k it is (n p / k)^k (n q / m)^m sqrt(n / (2 pi k m)) exp(s(n) - s(k) - s(m)), s from `_stirling`.
    """
    m, q = n - k, _ONE - p
    few = min(k, m)
    if few <= _FEW:
        return _times(_up(math.comb(n, few), 0), _times(_power((p, -_BITS), k), _power((q, -_BITS), m)))
    powers = _times(_power(_over(n * p, k << _BITS), k), _power(_over(n * q, m << _BITS), m))
    root = math.isqrt((n << 3 * _BITS) // (2 * (pi(_BITS) - 2) * k * m)) + 1
    correction = _exp(_stirling(n)[1] - _stirling(k)[0] - _stirling(m)[0])
    return _times(powers, _times((root, -_BITS), correction))


def _inverse_central(m: int) -> Above:
    """Return 4^m / comb(2 m, m) = sqrt(pi m) exp(2 s(m) - s(2 m)), rounded up; s is from `_stirling`."""
    if m <= _FEW:
        return _over(1 << 2 * m, math.comb(2 * m, m))
    root = math.isqrt((pi(_BITS) + 2) * m << _BITS) + 1
    return _times(_up(root, -_BITS), _exp(2 * _stirling(m)[1] - _stirling(2 * m)[0]))


def _stirling(m: int) -> tuple[int, int]:
    """Return bounds of s(m) = log(m!) - log(sqrt(2 pi m) (m / e)^m), in units.

    The rest of Stirling's series has the sign of the first term that was left out and is smaller (NIST Handbook 5.11).
    Every quotient is rounded down, so four of them lack less than 4 units.
    """
    low = _ONE // (12 * m) + -_ONE // (360 * m**3) + _ONE // (1260 * m**5) + -_ONE // (1680 * m**7)
    return low, low + 4 + _ONE // (1188 * m**9) + 1


def _exp(x: int) -> Above:
    """Return the exponential of x units, |x| <= 1/4, rounded up.

    The rest after 60 terms is far below a unit. A term errs by a unit and by less than half the error of the term
    before, so by less than 2 units: all terms together by less than 128.
    """
    total = term = _ONE
    for k in range(1, 60):
        term = term * x // (k << _BITS)
        total += term
    return _up(total + 128, -_BITS)


def _cdf(a: Fraction) -> tuple[int, int]:
    """Return bounds of Phi(a), in units.

    With 112 further bits, half of `series.within` errs by less than 2^83 2^-112 = 2^-29 units, and is rounded down.
    """
    if a < 0:
        low, high = _cdf(-a)
        return _ONE - high, _ONE - low
    if a >= _FAR:
        return _ONE - (_ONE >> 76), _ONE
    if a == 0:
        return _ONE >> 1, _ONE >> 1
    above_half = within(a, _BITS + 112) >> 113
    return (_ONE >> 1) + above_half - 1, min((_ONE >> 1) + above_half + 2, _ONE)


# --- upper bounds m 2**e -----------------------------------------------------------------------------------------


def _up(mantissa: int, exponent: int) -> Above:
    extra = mantissa.bit_length() - _BITS
    return (mantissa, exponent) if extra <= 0 else (-(-mantissa >> extra), exponent + extra)


def _times(a: Above, b: Above) -> Above:
    return _up(a[0] * b[0], a[1] + b[1])


def _over(numerator: int, denominator: int) -> Above:
    shift = max(0, _BITS + denominator.bit_length() - numerator.bit_length())
    return _up((numerator << shift) // denominator + 1, -shift)


def _power(a: Above, k: int) -> Above:
    result = (1, 0)
    while k:
        if k & 1:
            result = _times(result, a)
        k >>= 1
        a = _times(a, a)
    return result


def _at_most(value: Above, limit: Fraction) -> bool:
    """Return whether m 2**e <= limit, without numbers of e digits."""
    size = value[0].bit_length() + value[1]  # 2^(size - 1) <= value < 2^size
    of_limit = limit.numerator.bit_length() - limit.denominator.bit_length()  # 2^(it - 1) < limit < 2^(it + 1)
    if not of_limit - 1 < size < of_limit + 2:
        return size < of_limit
    mantissa, exponent = value
    return mantissa * limit.denominator << max(exponent, 0) <= limit.numerator << max(-exponent, 0)


# --- arguments ---------------------------------------------------------------------------------------------------


def _settings(radius: Any, sigma: Any, alpha: Any, eps: Any) -> tuple[Fraction, Fraction, int]:
    """Return radius / sigma, alpha, and eps in units, rounded up."""
    exact_sigma = _fraction("sigma", sigma)
    if exact_sigma <= 0:
        raise UserError(f"sigma={_written(sigma)}: use a number greater than 0")
    eps = _not_negative("eps", eps)
    return _not_negative("radius", radius) / exact_sigma, _between("alpha", alpha), math.ceil(eps * _ONE)


def _between(name: str, value: Any) -> Fraction:
    exact = _fraction(name, value)
    if not 0 < exact < 1:
        raise UserError(f"{name}={_written(value)}: use a number in (0, 1)")
    return exact


def _not_negative(name: str, value: Any) -> Fraction:
    exact = _fraction(name, value)
    if exact < 0:
        raise UserError(f"{name}={_written(value)}: use a number of at least 0")
    return exact


def _fraction(name: str, value: Any) -> Fraction:
    """Return the exact value of a number, also of NumPy's."""
    if isinstance(value, Decimal):
        # The fraction of 1e-999999999 would fill the memory.
        number = value if value.is_finite() and abs(value.adjusted()) <= _MOST_DIGITS else None
    else:
        number = finite_number(name, value)
    if number is None:
        raise UserError(f"{name}={shown(value)}: use a finite number")
    return Fraction(number)


def _written(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else shown(value)

"""Two numbers by their series, in whole numbers and with bounds of their errors: pi, and the normal distribution.

The proofs of `exact` and the table of `rounded_gaussian` rest on them.
"""

from fractions import Fraction
from functools import lru_cache
from math import isqrt

from rs_consistency.common.checks import shown, whole_number
from rs_consistency.common.errors import UserError


def within(a: Fraction, bits: int) -> int:
    """Return P(abs(Z) < a) for a standard normal Z, in units e = 2^-bits. The error is below 2^84 e.

    It is for 0 <= a < 10 and at most 900 bits. With y = a^2 / 2 < 50,

        P(abs(Z) < a) = sqrt(2 / pi) sum_k (-1)^k u_k / (2k + 1),  u_k = a y^k / k!.

    The numbers are multiples of e, and every quotient is rounded down.

    - u_k comes from u_(k-1) by the factor y / k. Its error is at most the error of u_(k-1) times y / k, plus e. In all
      this is e times the sum over i <= k of y^(k-i) i! / k!, where each summand is at most y^(k-i) / (k-i)! <= exp(y).
      So it is at most (k + 1) 2^73 e, as exp(50) < 2^73.
    - The loop ends at the first k where u_k is rounded to 0. Below k = y the numbers do not fall, so the end is beyond,
      where the true terms fall. What is left out is at most its first term, which is at most the error of u_k over
      2k + 1, hence at most 2^73 e.
    - There are fewer than 2^9 terms: 10 * 50^k / k! < 2^-900 for k = 500. The error of a term is the error of u_k over
      2k + 1, which is at most 2^73 e, plus e. So the error of the sum is less than 2^9 (2^73 + 1) e + 2^73 e < 2^83 e.
    - sqrt(2 / pi) < 1 has an error below 2 e, and the sum is below 2. With the last rounding, the error is less than
      2^83 e + 6 e < 2^84 e.

    Example:
      >>> from fractions import Fraction
      >>> from rs_consistency.statistics.series import within
      >>> round(within(Fraction(196, 100), 256) / 2**256, 6)
      0.950004
    """
    if not isinstance(a, Fraction) or not 0 <= a < 10:
        raise UserError(f"a={shown(a)}: use a Fraction from 0 to less than 10")
    bits = whole_number("bits", bits, at_least=1, at_most=900)
    top, bottom = a.numerator**2, 2 * a.denominator**2
    u, total, k = (a.numerator << bits) // a.denominator, 0, 0
    while u:
        term = u // (2 * k + 1)
        total += -term if k % 2 else term
        k += 1
        u = u * top // (k * bottom)
    return _root_of_two_over_pi(bits) * total >> bits


def pi(bits: int) -> int:
    """Return pi in units of 2^-bits, with an error below 2 units, for up to 2^10 bits.

    It is Machin's formula with 32 more bits. A term of a series is wrong by at most 3 of their units, and 2^9 terms are
    enough. So the error before the last rounding is below 20 * 3 * 2^9 < 2^15 of 2^32, and that rounding adds less than
    one.
    """
    return _pi(whole_number("bits", bits, at_least=1, at_most=2**10))


@lru_cache
def _pi(bits: int) -> int:
    def arctan_of_inverse(n: int) -> int:
        total, power, k = 0, (1 << bits + 32) // n, 0
        while power:
            term = power // (2 * k + 1)
            total += -term if k % 2 else term
            power //= n * n
            k += 1
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)) >> 32


@lru_cache
def _root_of_two_over_pi(bits: int) -> int:
    return isqrt((2 << 3 * bits) // pi(bits))

"""The law of a Gaussian rounded to whole numbers, and a table that samples it. All arithmetic is in whole numbers.

An 8-bit image is a point of the grid of multiples of 1/255. Noise that is rounded to this grid is `N / 255` with
`N = round(s Z)`, `s = 255 sigma` and a standard normal Z. Its size, `abs(N)`, is at least j with the probability

    S_j = erfc(a_j / sqrt 2),  a_j = (j - 1/2) / s,  j = 1, 2, ...,

and its sign is a fair coin. The table gives a size of at least j the probability `W_j / 2^63`, where `W_j` is the whole
number nearest to `2^63 S_j`. A draw takes 64 random bits: the sign and 63 bits for the size.

**How far the table is from the true law.** The computed `W_j` differ from `2^63 S_j` by at most `1/2 + 2^-40`, for
every j up to the last T with `W_T >= 1`, and `2^63 S_(T+1) <= 1/2 + 2^-40`; `_tails` has the proof. Take both sizes
from one uniform number U in [0, 1): the true size is the number of j with `U < S_j`, the table's is the number of
j <= T with `U < W_j / 2^63`. They differ only if U lies between `S_j` and `W_j / 2^63` for a j <= T, or below
`S_(T+1)`. So the total variation between both laws is at most
`(T + 1) (1/2 + 2^-40) 2^-63 = (T + 1) 2^-64 (1 + 2^-39)`. The fair sign adds nothing.

**The table.** Walker's alias method (1977): K = 2^b buckets, at least as many as values, of 2^(63-b) units each. A
bucket holds at most two values. The units of a value, over all buckets, are exactly `W_j - W_(j+1)`: `_check` counts.
"""

import functools
import itertools
from fractions import Fraction
from math import nextafter
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.checks import number_above, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.series import within

BITS = 63  # random bits for the size
STEPS = 255  # of 8-bit images
_GUARD = 160  # bits of a unit in the computation
# Limits of s = sigma * steps. The table has at most 2^16 values, because S_j < 2^-64 for (j - 1/2) / s > 9.2.
_SMALLEST, _LARGEST = Fraction(102, 1000), Fraction(27 * 255)


class GridTable(NamedTuple):
    """The table that samples a rounded Gaussian, for `noise.grid_noise`.

    A word of 63 bits selects a bucket by its upper b bits. Its rest, 63 - b bits, is compared with the bucket's cut. If
    it is below the cut, the size is the number of the bucket; else it is the bucket's other value.

    Attributes:
      packed: `[K]` uint32, K = 2^b; the cut without its lower 32 bits, times 2^b, plus the other value; below 2^31.
      low: `[K]` uint32, the lower 32 bits of the cut.
      num_values: T + 1, the number of sizes 0..T in the table.
    """

    packed: np.ndarray
    low: np.ndarray
    num_values: int


def grid_table(sigma: float, steps: int = STEPS) -> GridTable:
    """Return the table that samples Gaussian noise rounded to multiples of `1 / steps`.

    Guarantee: the law of the table is within `(T + 1) 2^-64 (1 + 2^-39)` of the rounded Gaussian in total variation.
    The Gaussian's standard deviation is the float64 `sigma`, taken as an exact fraction.

    Args:
      sigma: standard deviation of the noise, in the units of the images, whose range is [0, 1].
      steps: whole steps of the grid from 0 to 1; 255 for 8-bit images.

    Returns:
      The table; its arrays are read-only. Equal arguments give equal tables, which are computed once.

    Raises:
      UserError: for a sigma outside the range of the proof, from 0.0004 to 27 at 255 steps.

    Example:
      >>> from rs_consistency.statistics.rounded_gaussian import grid_table
      >>> table = grid_table(0.5)
      >>> len(table.packed), table.num_values
      (2048, 1168)
    """
    return _table(*_checked(sigma, steps))


def size_units(sigma: float, steps: int = STEPS) -> list[int]:
    """Return the probabilities of the sizes 0, 1, ..., T in the table, in units of 2^-63. Their sum is 2^63.

    Arguments and errors are as for `grid_table`.

    Example:
      At sigma 0.5 the noise of a pixel is 0 with a probability of 0.3 %.

      >>> from rs_consistency.statistics.rounded_gaussian import size_units
      >>> units = size_units(0.5)
      >>> sum(units) == 2**63, round(units[0] / 2**63, 6), units[-1]
      (True, 0.003129, 1)
    """
    return list(_units(Fraction(*_ratio(*_checked(sigma, steps)))))


def sampler_error(sigma: float, dimension: int, steps: int = STEPS) -> float:
    """Return a bound of the total variation between the sampled noise of an image and the rounded Gaussian.

    It is `d (T + 1) 2^-64 (1 + 2^-39) + d (d - 1) 2^-65` for d coordinates, rounded up. The first term is the table's.
    The second belongs to the random words: the d blocks of a cipher under one key are all different, but independent
    words of 64 bits coincide somewhere with at most this probability.

    Guarantee: if Threefry is an ideal cipher, the noise of a vote has any property with a probability that differs by
    at most this number from that under exact Gaussian noise.

    Args:
      sigma: as for `grid_table`.
      dimension: d, the number of pixel values, H * W * C.
      steps: as for `grid_table`.

    Raises:
      UserError: as for `grid_table`, or for a dimension that is no whole number from 1 to 2**32.

    Example:
      >>> from rs_consistency.statistics.rounded_gaussian import sampler_error
      >>> [float(f"{sampler_error(0.5, d):.1e}") for d in (28 * 28, 32 * 32 * 3, 224 * 224 * 3)]
      [6.6e-14, 4.5e-13, 6.2e-10]
    """
    d = whole_number("dimension", dimension, at_least=1, at_most=2**32)
    table = d * grid_table(sigma, steps).num_values * (1 + Fraction(1, 2**39)) / 2**64
    exact = table + Fraction(d * (d - 1), 2**65)
    rounded = float(exact)
    return rounded if rounded >= exact else nextafter(rounded, 1.0)


def _checked(sigma: Any, steps: Any) -> tuple[float, int]:
    steps = whole_number("steps", steps, at_least=1, at_most=2**16)
    sigma = number_above("sigma", sigma, 0)
    if not _SMALLEST <= Fraction(sigma) * steps <= _LARGEST:
        lowest, highest = float(_SMALLEST / steps), float(_LARGEST / steps)
        raise UserError(f"sigma={sigma}: noise on the grid of 1/{steps} needs a sigma from {lowest:g} to {highest:g}")
    return sigma, steps


def _ratio(sigma: float, steps: int) -> tuple[int, int]:
    """Return numerator and denominator of s = sigma * steps."""
    numerator, denominator = sigma.as_integer_ratio()
    return numerator * steps, denominator


@functools.cache
def _table(sigma: float, steps: int) -> GridTable:
    units = _units(Fraction(*_ratio(sigma, steps)))
    cut, other = _alias(units)
    _check(units, cut, other)
    return GridTable(*_pack(cut, other), len(units))


@functools.cache
def _units(s: Fraction) -> tuple[int, ...]:
    """Return W_j - W_(j+1) for j = 0..T, with W_0 = 2^63 and W_(T+1) = 0."""
    at_least = [1 << BITS, *_tails(s), 0]
    return tuple(above - below for above, below in itertools.pairwise(at_least))


def _tails(s: Fraction) -> list[int]:
    """Return W_1, ..., W_T, with |W_j - 2^63 S_j| <= 1/2 + 2^-40.

    S_j comes from `series.within` with 160 bits more than the 63 of a unit, so its error is below 2^84 2^-160 = 2^-76
    units. The difference of W_j and W_(j+1) is not negative: S_j - S_(j+1) is at least 2^-12 units up to T, far more
    than the errors. The first j with W_j < 1 ends the list. At a_j >= 10, 2^63 S_j < 2^-12, and W_j is 0 without
    computation.
    """
    bits = BITS + _GUARD
    found = []
    while True:
        a = Fraction(2 * len(found) + 1, 2) / s
        if a >= 10:
            return found
        tail = (1 << bits) - within(a, bits)
        whole = (tail + (1 << _GUARD - 1)) >> _GUARD
        if whole < 1:
            return found
        found.append(whole)


def _alias(units: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the cut and the other value of each bucket.

    A bucket that is not full is filled up by the last value that has more than a bucket. Such a value exists, because
    the buckets without a decision have the average of a full bucket. A bucket that is full has itself for other value.
    """
    b = (len(units) - 1).bit_length()
    num_buckets, full = 1 << b, 1 << (BITS - b)
    left = [*units, *[0] * (num_buckets - len(units))]
    cut, other = [full] * num_buckets, list(range(num_buckets))
    small = [i for i in range(num_buckets) if left[i] < full]
    large = [i for i in range(num_buckets) if left[i] > full]
    while small:
        i, j = small.pop(), large[-1]
        cut[i], other[i] = left[i], j
        left[j] -= full - left[i]
        if left[j] <= full:
            large.pop()
            if left[j] < full:
                small.append(j)
    return cut, other


def _check(units: tuple[int, ...], cut: list[int], other: list[int]) -> None:
    """Raise unless the buckets hold exactly the units of each value."""
    full = (1 << BITS) // len(cut)
    held = [0] * len(cut)
    for i, (below, above) in enumerate(zip(cut, other, strict=True)):
        held[i] += below
        held[above] += full - below
    if min(units) < 0 or held != [*units, *[0] * (len(cut) - len(units))]:
        raise ArithmeticError("the table does not hold the units of every value")


def _pack(cut: list[int], other: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays of `GridTable`. A full bucket is cut one unit lower; the rest is the same value anyway."""
    b = (len(cut) - 1).bit_length()
    cut = [min(below, (1 << (BITS - b)) - 1) for below in cut]
    packed = np.array([(below >> 32) << b | above for below, above in zip(cut, other, strict=True)], np.uint32)
    low = np.array([below & 0xFFFFFFFF for below in cut], np.uint32)
    packed.flags.writeable = low.flags.writeable = False
    return packed, low

"""The table of the rounded Gaussian: exact units by another series, pinned tables, constants of the proof; twins."""

import hashlib
import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from rs_consistency import UserError
from rs_consistency.statistics import rounded_gaussian, series
from rs_consistency.statistics.rounded_gaussian import grid_table, sampler_error, size_units

SIGMAS = [0.12, 0.25, 0.5]
ROUNDING = Decimal("0.5") + Decimal(2) ** -40
DIGITS = 90


def decimal_pi():
    """Return pi by the arithmetic-geometric mean (Gauss, Legendre)."""
    a, b, t, p = Decimal(1), 1 / Decimal(2).sqrt(), Decimal("0.25"), Decimal(1)
    for _ in range(8):
        a, b, t, p = (a + b) / 2, (a * b).sqrt(), t - p * ((a - b) / 2) ** 2, 2 * p
    return (a + b) ** 2 / (4 * t)


def upper_tail(a):
    """Return P(|Z| >= a) by the series of positive terms, 1 - 2 phi(a) (a + a^3 / 3 + a^5 / 15 + ...)."""
    term = total = a
    k = 1
    while term > Decimal(10) ** -DIGITS:
        k += 2
        term *= a * a / k
        total += term
    return 1 - (2 / decimal_pi()).sqrt() * (-a * a / 2).exp() * total


def tails(units):
    """Return W_0, ..., W_(T + 1)."""
    return [sum(units)] + [sum(units) - w for w in np.cumsum(np.array(units, object))]


def worst_error(units, sigma):
    """Return the largest |W_j - 2^63 S_j|, for j = 0..T + 1."""
    with localcontext(prec=DIGITS):
        s = Decimal(sigma) * 255
        exact = [Decimal(1), *(upper_tail((j - Decimal("0.5")) / s) for j in range(1, len(units) + 1))]
        return max(abs(w - 2**63 * tail) for w, tail in zip(tails(units), exact, strict=True))


def units_of_tails(found):
    at_least = [2**63, *found, 0]
    return [above - below for above, below in itertools.pairwise(at_least)]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_value_has_its_units(sigma):
    units = size_units(sigma)
    assert sum(units) == 2**63 and min(units) >= 0 and units[-1] >= 1
    assert worst_error(units, sigma) <= ROUNDING
    assert len(units) == grid_table(sigma).num_values


def test_wrong_tables_are_found():
    sigma, units = 0.12, size_units(0.12)
    single = size_units(float(np.float32(sigma)))
    assert worst_error(single, sigma) > 2**30  # of a sigma in float32
    with localcontext(prec=DIGITS):
        s = Decimal(sigma) * 255
        floors = [round(2**63 * upper_tail(j / s)) for j in range(1, len(units) - 1)]
        assert worst_error(units_of_tails(floors), sigma) > 2**55  # j for j - 1/2
    short = tails(units)[1 : int(6 * sigma * 255)]
    assert worst_error(units_of_tails(short), sigma) > 2**33  # nothing beyond 6 sigma
    moved = list(units)
    moved[3], moved[5] = moved[3] + 1, moved[5] - 1
    assert worst_error(moved, sigma) > 1 - ROUNDING  # a single unit
    truncated = units_of_tails([w >> 11 << 11 for w in tails(units)[1:-1] if w >> 11])
    assert worst_error(truncated, sigma) > 1000  # float64 has 53 bits


# Votes depend on the tables. Whoever changes them makes other files.
PINNED = {  # sigma: T + 1, K, W_1, W_T, digest
    0.12: (281, 512, 9103129247856171935, 1, "05b46c649626c778"),
    0.25: (585, 1024, 9165653521579243463, 1, "a6597ae3ef222046"),
    0.5: (1168, 2048, 9194512557308354100, 1, "1dd8c063b32733e0"),
    1.0: (2336, 4096, 9208942269342743059, 1, "93d8e377de687616"),
}


@pytest.mark.parametrize("sigma", PINNED)
def test_tables_are_pinned(sigma):
    table, at_least = grid_table(sigma), tails(size_units(sigma))
    digest = hashlib.sha256(table.packed.astype("<u4").tobytes() + table.low.astype("<u4").tobytes()).hexdigest()
    assert (table.num_values, len(table.packed), at_least[1], at_least[-2], digest[:16]) == PINNED[sigma]


def unpacked_units(packed, low):
    """Return the units of every value, from the arrays alone: how many of the 2^63 words give it."""
    b = len(packed).bit_length() - 1
    full, held = 2 ** (63 - b), [0] * len(packed)
    for bucket, (entry, low_cut) in enumerate(zip(packed.tolist(), low.tolist(), strict=True)):
        cut = (entry >> b << 32) + low_cut
        assert 0 <= cut < full and entry < 2**31
        held[bucket] += cut
        held[entry % 2**b] += full - cut
    return held


def shares(rng, num_values):
    """Return units of values: random, some 0, some a bucket exactly."""
    full = 2 ** (63 - (num_values - 1).bit_length())
    parts = [
        full if kind == 0 else 0 if kind == 1 else int(rng.integers(2 * full))
        for kind in rng.integers(6, size=num_values)
    ]
    parts[0] = 0
    while sum(parts) > 2**63:
        parts[rng.integers(1, num_values)] = 0
    parts[0] = 2**63 - sum(parts)
    return tuple(parts)


def test_the_buckets_hold_exactly_the_units():
    rng = np.random.default_rng(0)
    cases = [tuple(size_units(sigma)) for sigma in (0.0004, *SIGMAS)]
    cases += [(2**63,), (1, 2**63 - 1), (2**62, 2**62), (2**61,) * 4, (0, 0, 0, 2**63)]
    cases += [shares(rng, num_values) for num_values in (2, 3, 7, 8, 9, 64, 100, 511, 512, 513)]
    for units in cases:
        cut, other = rounded_gaussian._alias(units)
        rounded_gaussian._check(units, cut, other)
        held = unpacked_units(*rounded_gaussian._pack(cut, other))
        assert held[: len(units)] == list(units) and not any(held[len(units) :])
        if len(units) > 1:
            cut[0] += -1 if cut[0] else 1
            other[0] = (other[0] + (other[0] == 0)) % len(cut)
            with pytest.raises(ArithmeticError, match="units of every value"):
                rounded_gaussian._check(units, cut, other)


def test_as_many_values_as_buckets():
    table = grid_table(0.2188)
    assert table.num_values == len(table.packed) == 512
    assert unpacked_units(table.packed, table.low) == size_units(0.2188)


@pytest.mark.slow
def test_the_largest_sigma():
    table = grid_table(27.0)
    assert table.num_values == 63035 and len(table.packed) == 2**16 and table.packed.max() < 2**31


def test_constants_of_the_proof():
    y = 50
    exponential = sum(Fraction(y**k, math.factorial(k)) for k in range(400))
    assert exponential + Fraction(1, 100) < 2**73  # exp(50); what is left out is below 50^400 / 400! * 2
    assert 2 * Fraction(50**400, math.factorial(400)) < Fraction(1, 100)
    assert 10 * Fraction(50**500, math.factorial(500)) < Fraction(1, 2**900)
    assert 2**9 * (2**73 + 1) + 2**73 < 2**83 and 2**83 + 6 < 2**84 == 2 ** (223 - 63 - 76)
    with localcontext(prec=DIGITS):
        assert upper_tail(Decimal("9.2")) < Decimal(2) ** -64 and upper_tail(Decimal(10)) < Decimal(2) ** -75
        error = series.pi(223) - decimal_pi() * 2**223
        assert abs(error) < 2
        # S_j - S_(j + 1) at the largest s, where W_j is 1.
        s = Decimal(27 * 255)
        a = (63034 - Decimal("0.5")) / s
        assert upper_tail(a) - upper_tail(a + 1 / s) > Decimal(2) ** (-63 - 12)
    assert rounded_gaussian._LARGEST * Fraction(92, 10) + Fraction(3, 2) <= 2**16


@pytest.mark.parametrize("sigma", [0.12, 1.0])
@pytest.mark.parametrize("dimension", [1, 2, 784, 3072, 150528, 2**32])
def test_the_error_is_rounded_up(sigma, dimension):
    values = len(size_units(sigma))
    exact = Fraction(dimension * values * (2**39 + 1), 2**103) + Fraction(dimension * (dimension - 1), 2**65)
    error = sampler_error(sigma, dimension)
    assert error >= exact > np.nextafter(error, 0)


def test_the_error_of_words_without_repetition():
    # The exact total variation between d different words and d independent ones, for words of a few bits.
    for words, d in ((16, 2), (16, 5), (64, 9)):
        distinct = math.prod(Fraction(words - i, words) for i in range(d))
        assert Fraction(d * (d - 1), 2 * words) >= 1 - distinct > Fraction(d * (d - 1), 2 * words) * Fraction(1, 2)


def test_a_finer_grid_has_the_same_law_in_steps():
    assert size_units(0.25, steps=510) == size_units(0.5)
    assert grid_table(np.float32(0.5)) is grid_table(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid_table(0.0003), "sigma=0.0003: noise on the grid of 1/255 needs a sigma from 0.0004 to 27"),
        (lambda: grid_table(27.1), "sigma=27.1: noise on the grid of 1/255 needs a sigma from 0.0004 to 27"),
        (lambda: grid_table(14, steps=510), "sigma=14.0: noise on the grid of 1/510 needs a sigma from 0.0002 to 13.5"),
        (lambda: size_units(0), "sigma=0: use a number greater than 0"),
        (lambda: size_units(math.nan), "sigma=nan: use a number greater than 0"),
        (lambda: grid_table(0.5, steps=0), "steps=0: use a whole number of at least 1 and at most 65536"),
        (lambda: sampler_error(0.5, 1.5), "dimension=1.5: use a whole number of at least 1 and at most 4294967296"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == message

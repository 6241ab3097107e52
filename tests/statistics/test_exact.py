"""Proofs in whole numbers: against exact fractions, against float64, and with broken twins that must be found out."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from math import comb, factorial

import numpy as np
import pytest

from rs_consistency import UserError
from rs_consistency.certificates.columns import format_radius
from rs_consistency.statistics import exact, series
from rs_consistency.statistics.bounds import BOUNDS, certify_votes, p_value_of
from rs_consistency.statistics.exact import float_above, proves_decision, proves_prediction, proves_radius
from rs_consistency.statistics.sequential import decide

ONE = 1 << 256
UNIT = Decimal("0.000001")
EPS = Fraction(784 * 1168, 2**64)  # of 28 x 28 images at sigma 0.5
SIGMA, ALPHA, SHARE = 0.5, 0.001, 0.99


def tail_of(n, count, p, weight=1):
    """Return P(X > count) + weight P(X = count) for X ~ Binomial(n, p), a Fraction."""
    top, rest = p.numerator, p.denominator - p.numerator
    term = comb(n, count) * top**count * rest ** (n - count)
    total = weight * term
    for k in range(count, n):
        term = term * (n - k) * top // ((k + 1) * rest)  # a whole number
        total += term
    return Fraction(total, p.denominator**n)


# --- Phi ---------------------------------------------------------------------------------------------------------


def normal_cdf(a):
    """Return Phi(a) to 110 digits by another series, phi(a) sum_k a^(2 k + 1) / (1 3 5 ... (2 k + 1))."""
    with localcontext() as context:
        context.prec = 120
        pi = Decimal(series.pi(400)) / Decimal(2**400)
        term = total = a
        for k in range(1, 400):
            term = term * a * a / (2 * k + 1)
            total += term
        return Decimal("0.5") + total * (-a * a / 2).exp() / (2 * pi).sqrt()


@pytest.mark.parametrize("text", ["0", "0.000001", "0.3", "1", "2.5", "3.811457", "7.1", "9.99", "-2"])
def test_the_bounds_of_phi_hold_and_are_three_units_apart(text):
    low, high = exact._cdf(Fraction(text))
    assert high - low <= 3
    with localcontext() as context:
        context.prec = 120
        assert Decimal(low) - 1 < normal_cdf(Decimal(text)) * ONE < Decimal(high) + 1


def test_phi_beyond_ten_sigma():
    low, high = exact._cdf(Fraction(10))
    assert low <= exact._cdf(Fraction(99999, 10000))[1] + 2 ** (256 - 76) and high == ONE
    assert low < normal_cdf(Decimal(10)) * ONE
    assert exact._cdf(Fraction(10**30)) == (low, high)


def test_pi():
    assert str(Decimal(series.pi(200)) / 2**200).startswith("3.14159265358979323846264338")
    assert abs((series.pi(500) >> 100) - series.pi(400)) <= 2


# --- tails -------------------------------------------------------------------------------------------------------


def refuses_what_is_just_false(n, count, p, weight=Fraction(1)):
    """Return whether a tail is proven to be at most itself plus 2^-70, and is not proven at itself less 2^-200."""
    tail = tail_of(n, count, p, weight)
    units = p * ONE
    assert units.denominator == 1
    asked = (n, count, units.numerator)
    assert exact._tail_at_most(*asked, tail * (1 + Fraction(1, 2**70)), weight), asked
    return not exact._tail_at_most(*asked, tail * (1 - Fraction(1, 2**200)), weight)


SMALL = [(n, count, Fraction(p, 64)) for n in (1, 2, 5, 12) for count in range(n + 1) for p in (1, 20, 32, 45, 63)]
LARGE = [
    (1200, count, p)
    for p in (Fraction(1, 4), Fraction(1, 2), Fraction(7, 8), Fraction(1023, 1024))
    for count in {int(1200 * p) - 40, int(1200 * p) + 1, (int(1200 * p) + 1200) // 2, 1198, 1200}
] + [(16_000, 8_200, Fraction(1, 2)), (16_000, 4_170, Fraction(1, 4))]


def test_tails_are_rounded_up_and_by_little():
    for n, count, p in SMALL + LARGE:
        tail = tail_of(n, count, p)
        if 0 < tail < Fraction(1, 2) or (n < 20 and 0 < tail < 1):
            assert refuses_what_is_just_false(n, count, p), (n, count, p)
    for weight in (Fraction(1, 2**53), Fraction(1, 3), Fraction(1)):
        for n, count, p in SMALL:
            if 0 < tail_of(n, count, p, weight) < 1:
                assert refuses_what_is_just_false(n, count, p, weight), (n, count, p, weight)


def test_a_tail_that_is_rounded_down_proves_what_is_false(monkeypatch):
    def truncated(mantissa, exponent):
        extra = max(mantissa.bit_length() - 256, 0)
        return mantissa >> extra, exponent + extra

    def rounded_down(n, count, p, weight):
        total, term = weight, Fraction(1)
        for k in range(count, n):
            term *= Fraction((n - k) * p, (k + 1) * (ONE - p))
            total += term
        return math.floor(total * 2**128)

    monkeypatch.setattr(exact, "_tail_over_first", rounded_down)
    monkeypatch.setattr(exact, "_up", truncated)
    refused = [refuses_what_is_just_false(n, count, p) for n, count, p in SMALL if 0 < tail_of(n, count, p) < 1]
    assert not all(refused)


@pytest.mark.parametrize(("n", "k"), [(9, 4), (1100, 512), (1100, 550), (4000, 900), (4000, 3400)])
def test_a_probability_is_rounded_up_and_by_little(n, k):
    for p in (Fraction(1, 2), Fraction(15, 16), Fraction(1, 2**20)):
        mantissa, exponent = exact._probability(n, k, int(p * ONE))
        ratio = mantissa * Fraction(2) ** exponent / (comb(n, k) * p**k * (1 - p) ** (n - k))
        assert 1 <= ratio < 1 + Fraction(1, 2**80)


@pytest.mark.parametrize("m", [0, 1, 512, 513, 5000])
def test_the_inverse_of_the_central_probability_is_rounded_up_and_by_little(m):
    mantissa, exponent = exact._inverse_central(m)
    assert 1 <= mantissa * Fraction(2) ** exponent * comb(2 * m, m) / 4**m < 1 + Fraction(1, 2**80)


def test_comparisons_of_numbers_that_are_far_from_one_another():
    value = (3, -10)
    for limit, answer in [
        (Fraction(3, 1024), True),
        (Fraction(3, 1024) - Fraction(1, 2**99), False),
        (Fraction(1, 10**400), False),
        (Fraction(10**9), True),
        (Fraction(1, 512), False),
        (Fraction(1, 256), True),
    ]:
        assert exact._at_most(value, limit) == answer
    assert exact._at_most((3, -(10**12)), Fraction(1, 10**100))
    assert not exact._at_most((3, 10**12), Fraction(1))


# --- radii -------------------------------------------------------------------------------------------------------


def cases(bound, n):
    counts = np.unique(np.concatenate([n - np.array([0, 1, 2, 3, 7, 20]), np.linspace(0.52 * n, n, 24).astype(int)]))
    runner_up = (n - counts) * 9 // 10
    if bound == "two_class":  # and below 1/2
        counts, runner_up = np.append(counts, [n * 45 // 100] * 2), np.append(runner_up, [n * 20 // 100, n // 1000])
    return counts, runner_up, np.random.default_rng(n).integers(1, 2**53, len(counts)) / 2.0**53


def lines(bound, n, slack=0.0):
    """Return (printed radius, keywords of its proof) for many counts, as `certify_votes` gives the radii."""
    counts, runner_up, uniform = cases(bound, n)
    found = certify_votes(counts, runner_up, n, alpha=ALPHA, sigma=SIGMA, bound=bound, uniform=uniform, slack=slack)
    return [
        (Decimal(format_radius(radius)), {"count": int(count), "runner_up": int(second), "uniform": draw})
        for count, second, draw, certified, radius in zip(counts, runner_up, uniform, *found[:2], strict=True)
        if certified
    ]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("n", [1000, 10_000, 100_000])
def test_printed_radii_are_proven_and_radii_a_unit_larger_are_not(bound, n):
    settings = {"sigma": SIGMA, "alpha": ALPHA, "bound": bound, "alpha_share": SHARE, "eps": EPS}
    found = lines(bound, n, float_above(EPS))
    assert len(found) >= 20
    for radius, votes in found:
        assert proves_radius(n, radius=radius, **votes, **settings), votes
        assert not proves_radius(n, radius=radius + UNIT, **votes, **settings), votes


@pytest.mark.parametrize("bound", BOUNDS)
def test_radii_without_the_slack_are_refused(bound):
    settings = {"sigma": SIGMA, "alpha": ALPHA, "bound": bound, "alpha_share": SHARE, "eps": 1e-5}
    without, with_slack = (lines(bound, 10_000, slack) for slack in (0.0, 1e-5))
    assert not any(proves_radius(10_000, radius=radius, **votes, **settings) for radius, votes in without)
    assert all(proves_radius(10_000, radius=radius, **votes, **settings) for radius, votes in with_slack)


def test_the_slack_of_two_classes_counts_on_both_sides():
    votes, settings = {"count": 450, "runner_up": 200}, {"sigma": SIGMA, "alpha": ALPHA, "bound": "two_class"}
    settings |= {"alpha_share": 0.5}
    lower, upper = 0.39704, 0.24395  # Clopper-Pearson at alpha / 2, to 5 digits
    for eps in (0.0, 0.01):
        radius = certify_votes(n=1000, **votes, **settings, slack=eps).radius
        assert proves_radius(1000, radius=Decimal(format_radius(radius)), **votes, **settings, eps=eps)
        one_side = SIGMA / 2 * (exact.NormalDist().inv_cdf(lower - eps) - exact.NormalDist().inv_cdf(upper))
        assert proves_radius(1000, radius=one_side - 1e-4, **votes, **settings, eps=eps) == (eps == 0)


def test_a_radius_is_proven_at_its_own_share_of_alpha():
    settings = {"sigma": SIGMA, "alpha": ALPHA, "bound": "two_class"}
    for share, other in ((0.99, 0.5), (0.5, 0.99)):
        proven = {}
        for count, runner_up in ((900, 100), (450, 200)):
            votes = {"n": 1000, "count": count, "runner_up": runner_up}
            radius = Decimal(format_radius(certify_votes(**votes, **settings, alpha_share=share).radius))
            assert proves_radius(**votes, radius=radius, **settings, alpha_share=share)
            proven[count] = proves_radius(**votes, radius=radius, **settings, alpha_share=other)
        assert not all(proven.values()), share


def test_all_small_counts_against_fractions():
    for n in range(1, 9):
        for count in range(n + 1):
            for alpha in (Fraction(1, 1000), Fraction(1, 10), Fraction(45, 100)):
                for radius in (Decimal("0"), Decimal("0.1"), Decimal("0.5"), Decimal("1.5")):
                    p = Fraction(sum(exact._cdf(Fraction(radius) * 2)), 2 * ONE) + Fraction(1, 100)
                    asked = {"sigma": 0.5, "alpha": alpha, "eps": Fraction(1, 100)}
                    proven = p < 1 and tail_of(n, count, p) <= alpha
                    assert proves_radius(n, count, radius, **asked) == proven
                    weight = Fraction(1) if count == n else Fraction(1, 4)
                    proven = p < 1 and tail_of(n, count, p, weight) <= alpha
                    assert proves_radius(n, count, radius, **asked, bound="randomized", uniform=0.25) == proven


def test_all_small_counts_of_two_classes_against_float64():
    n, settings = 40, {"alpha": 0.05, "sigma": 1.0, "bound": "two_class", "alpha_share": SHARE}
    for count in range(n + 1):
        for runner_up in range(0, n - count + 1, 3):
            found = certify_votes(count, runner_up, n, **settings, slack=0.01)
            radius = Decimal(format_radius(found.radius))
            asked = {"runner_up": runner_up, "eps": Fraction("0.01"), **settings}
            assert proves_radius(n, count, radius, **asked) == bool(found.certified), (count, runner_up)
            assert not proves_radius(n, count, radius + UNIT, **asked), (count, runner_up)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_largest_number_of_votes(bound):
    n, count = 2**29, 2**29 * 3 // 5
    settings = {"alpha": ALPHA, "sigma": SIGMA, "bound": bound, "uniform": 0.25, "alpha_share": SHARE}
    radius = Decimal(format_radius(certify_votes(count, n - count, n, **settings).radius))
    asked = {"runner_up": n - count, **settings}
    assert proves_radius(n, count, radius, **asked) and not proves_radius(n, count, radius + UNIT, **asked)
    assert not proves_radius(n, n // 3, 0, **asked)  # at once
    assert not proves_radius(n, 0, 0, sigma=1, alpha=0.999)


def test_a_large_alpha():
    for count, certified in ((600, True), (488, True), (470, False), (1, False)):  # the bound lies above the share
        found = certify_votes(count, 0, 1000, alpha=0.9, sigma=SIGMA)
        radius = Decimal(format_radius(found.radius))
        assert proves_radius(1000, count, radius, sigma=SIGMA, alpha=0.9) == found.certified == certified
        assert not proves_radius(1000, count, radius + UNIT, sigma=SIGMA, alpha=0.9)
    assert not proves_radius(10**9, 10**8, 0, sigma=SIGMA, alpha=0.9)  # at once


def test_sigma_and_radius_are_taken_exactly():
    # At sigma 0.3, whose float64 is a little less, the limit between two radii that differ in the 18th digit.
    low, high = Fraction(0), Fraction(3)
    for _ in range(70):
        middle = (low + high) / 2
        proven = proves_radius(1000, 900, middle, sigma=Fraction(3, 10), alpha=ALPHA)
        low, high = (middle, high) if proven else (low, middle)
    assert not proves_radius(1000, 900, low, sigma=0.3, alpha=ALPHA) and Fraction(3, 10) > 0.3
    assert proves_radius(1000, 900, low * Fraction(0.3) / Fraction(3, 10), sigma=0.3, alpha=ALPHA)
    assert proves_radius(1000, np.int64(900), np.float32(0.25), sigma=np.float64(0.3), alpha=ALPHA)


# --- decisions ---------------------------------------------------------------------------------------------------


def evidence(hits, votes, p):
    misses = votes - hits
    mixture = Fraction(factorial(2 * hits) * factorial(2 * misses), 4**votes * factorial(hits) * factorial(misses))
    return mixture / factorial(votes) / (p**hits * (1 - p) ** misses)


@pytest.mark.parametrize("eps", [Fraction(0), Fraction(1, 50)])
def test_all_small_decisions_against_fractions(eps):
    alpha = Fraction(1, 20)
    for radius in (Decimal("0"), Decimal("0.3"), Decimal("1")):
        p0 = Fraction(sum(exact._cdf(Fraction(radius) * 2)), 2 * ONE)
        decided = set()
        for votes in (1, 5, 9, 30):
            for hits in range(votes + 1):
                for certified, p in ((True, p0 + eps), (False, p0 - eps)):
                    on_its_side = hits > votes * p if certified else hits < votes * p
                    proven = p < 1 and on_its_side and evidence(hits, votes, p) * alpha >= 1
                    asked = {"sigma": SIGMA, "alpha": alpha, "eps": eps, "certified": certified}
                    assert proves_decision(hits, votes, radius, **asked) == proven, (hits, votes, radius, certified)
                    decided |= {certified} if proven else set()
        assert decided == ({True, False} if radius < 1 else {False})


def states(count):
    rng = np.random.default_rng(0)
    votes = np.append(rng.integers(1, 125, count) * 16, rng.integers(1, 6000, count // 4) * 16)
    radius = rng.uniform(0, 1, len(votes)).round(3)
    near = [exact.NormalDist().cdf(each / SIGMA) for each in radius]
    hits = np.minimum((votes * np.clip(near + rng.normal(0, 0.05, len(votes)), 0, 1)).astype(int), votes)
    return [(int(h), int(v), Decimal(str(r))) for h, v, r in zip(hits, votes, radius, strict=True)]


def test_decisions_agree_with_float64():
    found = {1: 0, 0: 0, -1: 0}
    for hits, votes, radius in states(400):
        at = {"sigma": SIGMA, "alpha": ALPHA}
        decision = int(decide(hits, votes, radius=float(radius), **at, slack=float_above(EPS)))
        found[decision] += 1
        for certified, outcome in ((True, 1), (False, -1)):
            proven = proves_decision(hits, votes, radius, certified=certified, eps=EPS, **at)
            assert proven == (decision == outcome), (hits, votes, radius)
    assert min(found.values()) > 30


def test_decisions_without_the_slack_are_refused():
    refused = 0
    for hits, votes, radius in states(400):
        decision = int(decide(hits, votes, radius=float(radius), sigma=SIGMA, alpha=ALPHA))
        asked = {"certified": decision == 1, "sigma": SIGMA, "alpha": ALPHA, "eps": 0.02}
        refused += bool(decision) and not proves_decision(hits, votes, radius, **asked)
    assert refused > 10


def test_decisions_far_out():
    at = {"sigma": 1, "alpha": ALPHA}
    for radius in (9, 10, Decimal("1e300")):
        assert proves_decision(999, 1000, radius, certified=False, **at)
        assert not proves_decision(2**29, 2**29, radius, certified=True, **at)
        assert not proves_decision(2**29, 2**29, radius, certified=False, **at)
    assert proves_decision(2**29, 2**29, 2, certified=True, **at)
    assert proves_decision(2**28 + 2**17, 2**29, 0, certified=True, **at)
    assert not proves_decision(2**28, 2**29, 0, certified=True, **at)
    assert not proves_decision(1000, 1000, 0, certified=True, **at, eps=0.5)  # p0 + eps = 1
    assert not proves_decision(0, 1000, 0, certified=False, **at, eps=0.5)


# --- predictions -------------------------------------------------------------------------------------------------


def test_all_small_predictions_against_fractions():
    for eps in (Fraction(0), Fraction(1, 1000)):
        for n in range(1, 15):
            for count in range(1, n + 1):
                for runner_up in range(min(count, n - count) + 1):
                    total = count + runner_up
                    p_value = 1 if count == runner_up else 2 * tail_of(total, count, Fraction(1, 2))
                    proven = p_value + n * eps < Fraction(1, 20)  # equality does not happen
                    assert proves_prediction(n, count, runner_up, alpha=Fraction(1, 20), eps=eps) == proven


def test_predictions_agree_with_float64():
    rng = np.random.default_rng(0)
    n, slack = 20_000, 1e-8
    answers = []
    for total in rng.integers(2, n, 300).tolist():
        count = min(int(total / 2 + abs(rng.normal(0, 2)) * math.sqrt(total)) + 1, total)
        p_value = p_value_of(count, total - count, n=n, slack=slack)
        answers.append(proves_prediction(n, count, total - count, alpha=ALPHA, eps=slack))
        assert answers[-1] == (p_value <= ALPHA)
    assert 20 < sum(answers) < 280
    assert not proves_prediction(n, n, 0, alpha=ALPHA, eps=1e-7)  # n eps is more than alpha
    assert proves_prediction(5, 3, 0, alpha=0.25)  # the p-value is alpha


# --- arguments ---------------------------------------------------------------------------------------------------


def test_float_above():
    for value in (Fraction(1, 3), Fraction(2, 3), EPS, Fraction(1, 2**1080), Fraction(5)):
        above = float_above(value)
        assert Fraction(above) >= value and (above == value or math.nextafter(above, 0) < value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0: use a whole number of at least 1"),
        ({"count": 101}, "count=101: use a whole number of at least 0 and at most 100"),
        ({"radius": Decimal("-0.1")}, r"radius=-0\.1: use a number of at least 0"),
        ({"radius": Decimal("nan")}, "radius=Decimal.*: use a finite number"),
        ({"radius": "0.1"}, "radius='0.1': use a finite number"),
        ({"sigma": 0}, "sigma=0: use a number greater than 0"),
        ({"sigma": True}, "sigma=True: use a finite number"),
        ({"alpha": 1}, r"alpha=1: use a number in \(0, 1\)"),
        ({"eps": -1e-9}, "eps=-1e-09: use a number of at least 0"),
        ({"bound": "wald"}, "bound='wald' is unknown; use clopper_pearson, two_class or randomized"),
        ({"bound": "randomized"}, "uniform=None: use a finite number"),
        ({"bound": "randomized", "uniform": 0.0}, "uniform=0.0: use a number greater than 0 and at most 1"),
        ({"bound": "two_class"}, "runner_up=None: use a whole number of at least 0 and at most 10"),
        ({"bound": "two_class", "runner_up": 11}, "runner_up=11: use a whole number of at least 0 and at most 10"),
        ({"bound": "two_class", "runner_up": 9}, "alpha_share=None: use a finite number"),
        ({"bound": "two_class", "runner_up": 9, "alpha_share": 1}, r"alpha_share=1: use a number in \(0, 1\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        proves_radius(**{"n": 100, "count": 90, "radius": 0.1, "sigma": 0.5, "alpha": 0.001, **arguments})


def test_bad_counts_of_decisions_and_predictions():
    with pytest.raises(UserError, match="hits=3: use a whole number of at least 0 and at most 2"):
        proves_decision(3, 2, 0.1, certified=True, sigma=0.5, alpha=0.001)
    with pytest.raises(UserError, match="runner_up=6: use a whole number of at least 0 and at most 5"):
        proves_prediction(100, 5, 6, alpha=0.001)

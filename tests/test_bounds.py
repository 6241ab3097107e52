"""Clopper-Pearson bound and radius: exact values, exact coverage, and broken bounds that must fail the same test."""

import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import UserError, certified_radius, lower_confidence_bound


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_bound_is_the_exact_beta_quantile(n, alpha):
    counts = np.unique(np.linspace(0, n, 50).astype(int))
    got = lower_confidence_bound(counts, n, alpha)
    assert got.dtype == np.float64
    expected = np.where(counts == 0, 0, stats.beta.ppf(alpha, np.maximum(counts, 1), n - counts + 1))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # The defining equation: at the bound, so many votes or more have probability alpha.
    inner = counts > 0
    np.testing.assert_allclose(stats.binom.sf(counts[inner] - 1, n, got[inner]), alpha, rtol=1e-9)


def test_bound_at_the_ends():
    for n in (1, 1000, 10**9):
        assert lower_confidence_bound(n, n, 0.001) == pytest.approx(0.001 ** (1 / n), rel=1e-15)
        assert lower_confidence_bound(0, n, 0.001) == 0
    assert lower_confidence_bound(10**9, 10**9, 1 - 1e-16) < 1


def test_the_published_ceiling():
    assert certified_radius(100_000, 100_000, 0.001, 1.0) == pytest.approx(3.8114566, abs=5e-8)
    assert certified_radius(100_000, 100_000, 0.001, 0.5) == pytest.approx(3.8114566 / 2, abs=5e-8)


def violation(bound, n, p, alpha):
    """The exact probability that `bound` exceeds p."""
    counts = np.arange(n + 1)
    return stats.binom.pmf(counts, n, p)[bound(counts, n, alpha) > p].sum()


def plug_in(counts, n, alpha):
    return counts / n


def wald(counts, n, alpha):
    share = counts / n
    return share - stats.norm.ppf(1 - alpha) * np.sqrt(share * (1 - share) / n)


def at_twice_alpha(counts, n, alpha):
    return lower_confidence_bound(counts, n, 2 * alpha)


def covers(bound, alpha):
    probabilities = np.concatenate([np.linspace(0.01, 0.99, 99), [0.999, 0.9999]])
    worst = max(violation(bound, n, p, alpha) for n in (10, 100, 1000) for p in probabilities)
    return worst <= alpha * (1 + 1e-9)  # rounding of the sum


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_bound_covers_and_broken_ones_do_not(alpha):
    assert covers(lower_confidence_bound, alpha)
    for broken in (plug_in, wald, at_twice_alpha):
        assert not covers(broken, alpha), broken.__name__


def test_radius_is_sigma_times_the_normal_quantile_and_zero_below_one_half():
    counts = np.array([0, 400, 500, 520, 600, 900, 999, 1000])
    lower = lower_confidence_bound(counts, 1000, 0.001)
    expected = np.where(lower > 0.5, 0.7 * special.ndtri(np.maximum(lower, 0.5)), 0)
    got = certified_radius(counts, 1000, 0.001, 0.7)
    np.testing.assert_array_equal(got, expected)
    assert (got[:4] == 0).all() and (np.diff(got[3:]) > 0).all()


def test_arguments_broadcast():
    got = certified_radius(np.array([[900], [1000]]), 1000, np.array([0.05, 0.001]), 1.0)
    assert got.shape == (2, 2) and got.dtype == np.float64
    assert (got[:, 0] > got[:, 1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 2, 0.0), r"alpha=0.0: use a number in \(0, 1\)"),
        ((1, 2, 1.0), "alpha=1.0"),
        ((1, 2, float("nan")), "alpha=nan"),
        ((1, 2, 1e-200), "alpha=1e-200: use a number of at least 1e-100"),
        ((1, float("inf"), 0.1), "n=inf"),
        ((1, 2, None), "alpha=None: use numbers"),
        (("a", 2, 0.1), "count='a': use numbers"),
        ((1, 0, 0.1), "n=0: use a whole number of at least 1"),
        ((3, 2, 0.1), "count=3: use whole numbers from 0 to n"),
        ((-1, 2, 0.1), "count=-1"),
        ((0.5, 2, 0.1), "count=0.5"),
        (([1, 5], 2, 0.1), "count=5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        lower_confidence_bound(*arguments)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_sigma(sigma):
    with pytest.raises(UserError, match=f"sigma={sigma}: use a number greater than 0"):
        certified_radius(1, 2, 0.1, sigma)

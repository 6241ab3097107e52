"""Intervals and comparisons: against independent computations, and by their coverage, where a broken twin must fail."""

import numpy as np
import pytest
from scipy import special, stats

from rs_consistency.common.errors import UserError
from rs_consistency.statistics.intervals import (
    Interval,
    binomial_interval,
    bootstrap_interval,
    paired_difference,
    standard_error,
)


def exact_coverage(interval, p, trials):
    """Return the probability that the interval of a binomial count contains p: a sum over all counts."""
    counts = np.arange(trials + 1)
    low, high = interval(counts, trials)
    return stats.binom.pmf(counts, trials, p)[(low <= p) & (p <= high)].sum()


def test_binomial_intervals_are_those_of_clopper_and_pearson():
    for hits, trials, level in ((0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.9), (700, 1000, 0.99)):
        expected = stats.binomtest(hits, trials).proportion_ci(confidence_level=level, method="exact")
        np.testing.assert_allclose(binomial_interval(hits, trials, level=level), tuple(expected), rtol=1e-9, atol=0)


def test_binomial_intervals_cover_and_a_normal_approximation_would_not():
    def normal(hits, trials):
        share = hits / trials
        half = special.ndtri(0.975) * np.sqrt(share * (1 - share) / trials)
        return share - half, share + half

    for p in (0.01, 0.2, 0.5, 0.97):
        assert exact_coverage(binomial_interval, p, 50) >= 0.95
    assert exact_coverage(normal, 0.01, 50) < 0.5


def test_standard_errors_of_a_mean_and_of_a_part_of_a_whole():
    values = np.random.default_rng(0).exponential(size=40)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error(values, population=40) == 0
    # Against all samples without replacement: the variance of the mean over all pairs of 6 values.
    few = values[:6]
    pairs = [few[[i, j]].mean() for i in range(6) for j in range(i)]
    mean_square = np.mean([standard_error(few[[i, j]], population=6) ** 2 for i in range(6) for j in range(i)])
    assert mean_square == pytest.approx(np.var(pairs))


def coverage(interval, repeats=300):
    """Return how often an interval contains the mean of 60 skewed values, half of them 0 like radii of wrong images."""
    rng = np.random.default_rng(1)
    hits = 0
    for number in range(repeats):
        values = rng.exponential(size=60) * rng.integers(0, 2, size=60)
        low, high = interval(values, number)
        hits += low <= 0.5 <= high
    return hits / repeats


def test_bootstrap_intervals_cover_the_mean_and_those_of_seeds_taken_for_images_do_not():
    ours = coverage(lambda values, number: bootstrap_interval(values, seed=number, samples=500))
    assert 0.89 <= ours <= 0.98  # about 0.93 for so few and so skewed values; 300 repeats err by 0.015
    # The mistake: four seeds on the same images are taken for four times as many images.
    broken = coverage(lambda values, number: bootstrap_interval(np.repeat(values, 4), seed=number, samples=500))
    assert broken < 0.75


def test_bootstrap_intervals_are_a_function_of_their_arguments():
    values = np.random.default_rng(2).normal(size=500)
    interval = bootstrap_interval(values, seed=3, samples=4000)
    assert interval == bootstrap_interval(values, seed=3, samples=4000)
    assert interval != bootstrap_interval(values, seed=4, samples=4000)
    normal = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    np.testing.assert_allclose(interval, normal, atol=0.005)
    assert bootstrap_interval(np.ones(5)) == Interval(1, 1)


def test_paired_differences_see_what_two_means_hide():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=400)
    a, b = hard + 0.05 + 0.01 * rng.normal(size=400), hard
    paired = paired_difference(a, b)
    assert paired.mean == pytest.approx((a - b).mean()) and paired.standard_error == pytest.approx(stats.sem(a - b))
    assert paired.interval.low > 0.04 and paired.interval.high < 0.06
    assert (paired.images, paired.gained, paired.lost) == (400, (a > b).sum(), (a < b).sum())
    assert paired.standard_error < stats.sem(a) / 10
    shuffled = paired_difference(a, rng.permutation(b))
    assert shuffled.standard_error > 10 * paired.standard_error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binomial_interval(5, 4), "successes=5: use whole numbers from 0 to trials=4"),
        (lambda: binomial_interval(0.5, 4), "successes=0.5: use whole"),
        (lambda: binomial_interval(1, 4, level=1.5), "level=1.5: use a number in"),
        (lambda: bootstrap_interval([1.0]), r"values of shape \(1,\): use a list of at least two"),
        (lambda: bootstrap_interval([1.0, np.nan]), "at least two finite numbers"),
        (lambda: standard_error([1, 2, 3], population=2), "population=2: use a whole number of at least 3"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 values against 3: give both for the same images"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()

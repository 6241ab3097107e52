"""Bounds and radii: exact values, exact coverage, and broken bounds that must fail the same test."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import UserError, certified_radius, lower_confidence_bound, noise
from rs_consistency.statistics.bounds import (
    BOUNDS,
    certify_votes,
    p_value_of,
    radius_ceiling,
    randomized_lower_bound,
    upper_confidence_bound,
)


@pytest.mark.parametrize("n", [1, 2, 100, 1000, 100_000])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_bound_is_the_exact_beta_quantile(n, alpha):
    counts = np.unique(np.linspace(0, n, 50).astype(int))
    got = lower_confidence_bound(counts, n, alpha)
    assert got.dtype == np.float64
    expected = np.where(counts == 0, 0, stats.beta.ppf(alpha, np.maximum(counts, 1), n - counts + 1))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # The defining equation: at the bound, the count or more has probability alpha.
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
    """Return the exact probability that `bound` exceeds p."""
    counts = np.arange(n + 1)
    return stats.binom.pmf(counts, n, p)[bound(counts, n, alpha) > p].sum()


def plug_in(counts, n, alpha):
    return counts / n


def wald(counts, n, alpha):
    share = counts / n
    return share - stats.norm.ppf(1 - alpha) * np.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_tail_at_the_bound_does_not_exceed_alpha_in_exact_arithmetic(alpha):
    """The tail at the returned float64 is computed with rational numbers, without rounding."""
    n = 60
    counts = np.arange(1, n + 1)
    for count, bound in zip(counts, lower_confidence_bound(counts, n, alpha), strict=True):
        assert exact_tail(count, n, Fraction(bound)) <= Fraction(alpha) * (1 + Fraction(1, 10**13)), count
        # and it is not needlessly low
        assert exact_tail(count, n, Fraction(bound) * (1 + Fraction(1, 10**9))) > Fraction(alpha), count


def exact_tail(count, n, p):
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(int(count), n + 1))


@pytest.mark.parametrize("n", [1000, 100_000])
def test_the_computed_tail_at_the_bound_never_exceeds_alpha(n):
    counts = np.unique(np.linspace(1, n, 3000).astype(int))
    for alpha in (0.05, 0.001, 1e-9):
        bound = lower_confidence_bound(counts, n, alpha)
        some = counts < n  # where scipy computes the tail without cancellation
        assert (special.betainc(counts[some], n - counts[some] + 1, bound[some]) <= alpha).all()
        assert n * np.log(bound[-1]) <= np.log(alpha)


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


def test_the_upper_bound_mirrors_the_lower_one():
    counts = np.arange(101)
    upper = upper_confidence_bound(counts, 100, 0.01)
    np.testing.assert_allclose(upper, 1 - lower_confidence_bound(100 - counts, 100, 0.01), rtol=1e-14)
    assert (upper > 0).all() and upper[-1] == 1
    for p in (0.001, 0.02, 0.5, 0.97):
        assert stats.binom.pmf(counts, 100, p)[upper < p].sum() <= 0.01


# --- the randomized bound ---------------------------------------------------------------------------------------


DRAWS = (np.arange(400) + 0.5) / 400


def too_high(bounds, p):
    """Return the exact probability over the counts, on the grid of draws, that bounds `[n + 1, draws]` exceed p."""
    n = len(bounds) - 1
    return (stats.binom.pmf(np.arange(n + 1), n, p)[:, None] * (bounds > p)).sum() / bounds.shape[1]


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("n", [10, 60])
def test_the_randomized_bound_covers_exactly_and_broken_ones_do_not(n, alpha):
    counts, ceiling = np.arange(n + 1)[:, None], alpha ** (1 / n)
    below = [p for p in (0.1, 0.3, 0.5, 0.77, 0.9) if p < ceiling]
    bounds = randomized_lower_bound(counts, n, alpha, DRAWS[None, :])
    for p in below:  # each p has a count whose draws are on both sides: exact up to a step of the grid
        at_most_a_step = stats.binom.pmf(np.arange(n + 1), n, p).max() / len(DRAWS)
        assert too_high(bounds, p) == pytest.approx(alpha, abs=at_most_a_step)
    for p in (ceiling * 1.0001, 0.9999):
        assert too_high(bounds, p) <= alpha

    as_if_all_draws_were_0 = lower_confidence_bound(np.minimum(counts + 1, n), n, alpha)
    one_draw_for_all = randomized_lower_bound(counts, n, alpha, 0.01)
    for broken in (as_if_all_draws_were_0, one_draw_for_all):
        assert max(too_high(broken, p) for p in below) > 1.01 * alpha


def test_the_randomized_bound_lies_between_those_of_two_counts():
    counts, n = np.arange(101), 100
    draws = noise.bound_uniform(3, counts)
    got = randomized_lower_bound(counts, n, 0.01, draws)
    below, above = lower_confidence_bound(counts, n, 0.01), lower_confidence_bound(np.minimum(counts + 1, n), n, 0.01)
    assert (below <= got).all() and (got <= above).all() and (got[1:-1] > below[1:-1]).all()
    np.testing.assert_allclose(randomized_lower_bound(counts, n, 0.01, 1.0), below, rtol=1e-13)
    assert np.isfinite(certify_votes(n, 0, n, alpha=0.01, sigma=1.0, bound="randomized", uniform=1e-300).radius)


def test_the_draws_of_the_randomized_bound_are_uniform_and_committed_to_the_seed():
    draws = noise.bound_uniform(0, np.arange(20_000))
    assert draws.dtype == np.float64 and ((draws > 0) & (draws <= 1)).all()
    assert stats.kstest(draws, "uniform").pvalue > 1e-4
    np.testing.assert_array_equal(noise.bound_uniform(0, np.array([7, 3])), draws[[7, 3]])
    assert (noise.bound_uniform(1, np.arange(100)) != draws[:100]).all()
    assert len(noise.bound_uniform(0, np.arange(0))) == 0


# --- the two-class bound ----------------------------------------------------------------------------------------


def two_class_violation(radius_of, n, p_a, p_b, alpha):
    """Return the exact probability that the radius exceeds the true radius, with a third class for the rest."""
    count, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = count + second <= n
    count, second = count[possible], second[possible]
    rest = n - count - second
    probability = stats.multinomial.pmf(np.stack([count, second, rest], axis=-1), n, [p_a, p_b, 1 - p_a - p_b])
    true = (special.ndtri(p_a) - special.ndtri(p_b)) / 2
    return probability[radius_of(count, np.maximum(second, rest), n, alpha) > max(true, 0)].sum()


def two_class(count, runner_up, n, alpha):
    return certify_votes(count, runner_up, n, alpha=alpha, sigma=1.0, bound="two_class").radius


def two_class_with(lower_of, upper_of, shares=(0.5, 0.5)):
    """Return a radius from other bounds of p_A and p_B, at these shares of alpha."""

    def radius(count, runner_up, n, alpha):
        lower = lower_of(count, n, shares[0] * alpha)
        upper = np.minimum(upper_of(runner_up, n, shares[1] * alpha), 1 - lower)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((special.ndtri(lower) - special.ndtri(upper)) / 2, nan=0.0, posinf=10.0, neginf=0.0)

    return radius


BROKEN_TWO_CLASS = {
    "p_A plugged in": two_class_with(plug_in, upper_confidence_bound),
    "both plugged in": two_class_with(plug_in, plug_in),
    "five times alpha": lambda count, runner_up, n, alpha: two_class(count, runner_up, n, 5 * alpha),
    "p_B plugged in": two_class_with(lower_confidence_bound, plug_in, (0.99, 0.01)),
}


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_two_class_radius_covers_and_broken_ones_do_not(alpha):
    cases = [(p_a, p_b) for p_a in (0.3, 0.4, 0.55, 0.8) for p_b in (0.05, 0.15, 0.19, 0.3, 0.44) if p_a + p_b <= 1]

    def worst(radius_of):
        return max(two_class_violation(radius_of, n, *case, alpha) for n in (20, 60) for case in cases)

    assert worst(two_class) <= alpha * (1 + 1e-9)
    for shares in ((0.5, 0.5), (0.99, 0.01)):
        assert worst(two_class_with(lower_confidence_bound, upper_confidence_bound, shares)) <= alpha * (1 + 1e-9)
    for name, broken in BROKEN_TWO_CLASS.items():
        assert worst(broken) > alpha, name


def test_the_two_class_bound_certifies_below_one_half():
    got = certify_votes(45, 20, 100, alpha=0.05, sigma=2.0, bound="two_class")
    lower, upper = lower_confidence_bound(45, 100, 0.99 * 0.05), upper_confidence_bound(20, 100, 0.01 * 0.05)
    assert got.certified and got.lower == lower < 0.5
    assert got.radius == pytest.approx(special.ndtri(lower) - special.ndtri(upper), rel=1e-12)
    # With all other votes in one class, p_B is at most 1 - p_A, and p_A alone determines the radius, at its share.
    alone = certified_radius(700, 1000, 0.99 * 0.05, 1.0)
    assert certify_votes(700, 300, 1000, alpha=0.05, sigma=1.0, bound="two_class").radius == pytest.approx(alone)
    unclear = certify_votes(40, 39, 100, alpha=0.05, sigma=1.0, bound="two_class")
    assert not unclear.certified and unclear.radius == 0
    nothing = certify_votes(0, 0, 100, alpha=0.05, sigma=1.0, bound="two_class")
    assert not nothing.certified and nothing.radius == 0


def test_the_smallest_alpha_works_with_every_bound():
    for bound in BOUNDS:
        assert certify_votes(1000, 0, 1000, alpha=1e-100, sigma=1.0, bound=bound, uniform=0.5).radius > 0


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_ceiling_is_the_radius_of_all_votes(bound):
    for n in (1, 10, 100_000):
        alpha = 0.001 * 0.99 if bound == "two_class" else 0.001
        ceiling = radius_ceiling(n, alpha=0.001, sigma=0.5, bound=bound)
        assert ceiling == pytest.approx(max(0.5 * special.ndtri(alpha ** (1 / n)), 0), rel=1e-9)
        counts = np.arange(max(n - 50, 0), n + 1)
        radii = certify_votes(counts, 0, n, alpha=0.001, sigma=0.5, bound=bound, uniform=0.001).radius
        assert (radii <= ceiling).all() and (np.diff(radii) >= 0).all()


def test_radius_is_sigma_times_the_normal_quantile_and_zero_below_one_half():
    counts = np.array([0, 400, 500, 520, 600, 900, 999, 1000])
    lower = lower_confidence_bound(counts, 1000, 0.001)
    expected = np.where(lower > 0.5, 0.7 * special.ndtri(np.maximum(lower, 0.5)), 0)
    got = certified_radius(counts, 1000, 0.001, 0.7)
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert (got <= expected).all()
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound": "wald"}, "bound='wald' is unknown; use one of clopper_pearson, two_class, randomized"),
        ({"bound": "randomized"}, "bound=randomized needs uniform draws"),
        ({"bound": "randomized", "uniform": 0.0}, "uniform=0.0: use numbers greater than 0"),
        ({"bound": "two_class", "runner_up": 60}, "runner_up=60: use whole numbers from 0 to n - count"),
    ],
)
def test_bad_bounds(settings, message):
    arguments = {"runner_up": 10, "alpha": 0.1, "sigma": 1.0, **settings}
    with pytest.raises(UserError, match=message):
        certify_votes(50, arguments.pop("runner_up"), 100, **arguments)


# --- the slack --------------------------------------------------------------------------------------------------


SLACK = 0.1


def slack_violation(radius_of, n, alpha, truth, votes):
    """Return the exact probability that the radius exceeds the true one, for votes of other probabilities.

    `truth` and `votes` are (p_A, p_B) of the smoothed classifier and of a vote; the rest is a third class.
    """
    count, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    possible = count + second <= n
    count, second = count[possible], second[possible]
    rest = n - count - second
    law = [*votes, 1 - sum(votes)]
    probability = stats.multinomial.pmf(np.stack([count, second, rest], axis=-1), n, law)
    true = max((special.ndtri(truth[0]) - special.ndtri(truth[1])) / 2, 0)
    return probability[radius_of(count, np.maximum(second, rest), n, alpha) > true].sum()


def with_slack(bound, slack):
    def radius(count, runner_up, n, alpha):
        return certify_votes(count, runner_up, n, alpha=alpha, sigma=1.0, bound=bound, uniform=1.0, slack=slack).radius

    return radius


def widened(at_lower, at_upper):
    """Return the two-class radius with p_A lowered and p_B raised by these."""
    return two_class_with(
        lambda *asked: np.clip(lower_confidence_bound(*asked) - at_lower, 0, 1),
        lambda *asked: np.clip(upper_confidence_bound(*asked) + at_upper, 0, 1),
    )


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_slack_covers_votes_of_other_probabilities(bound):
    # The votes favour the class by the slack, and the runner-up less by it.
    cases = [(p_a, 1 - p_a) for p_a in (0.5, 0.6, 0.8)]
    if bound == "two_class":
        cases += [(0.3, 0.25), (0.4, 0.2), (0.45, 0.4), (0.6, 0.15)]

    def worst(radius_of):
        votes = [(p_a + SLACK, p_b - SLACK) for p_a, p_b in cases]
        return max(
            slack_violation(radius_of, n, 0.05, *each) for n in (20, 60) for each in zip(cases, votes, strict=True)
        )

    assert worst(with_slack(bound, SLACK)) <= 0.05 * (1 + 1e-9)
    assert worst(with_slack(bound, 0.0)) > 0.05
    if bound == "two_class":
        assert worst(widened(SLACK, SLACK)) <= 0.05 * (1 + 1e-9)
        for one_side_or_added in ((SLACK, 0.0), (0.0, SLACK), (-SLACK, -SLACK)):
            assert worst(widened(*one_side_or_added)) > 0.05, one_side_or_added


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_count_that_just_reaches_one_half_abstains_with_a_slack(bound):
    n = 10_000
    settings = {"alpha": 0.001, "sigma": 1.0, "bound": bound, "uniform": 0.5}
    counts = np.arange(n + 1)
    just = int(np.argmax(certify_votes(counts, n - counts, n, **settings).certified))
    for count, slack, answer in (
        (just - 1, 0.0, False),
        (just, 0.0, True),
        (just, 0.01, False),
        (just + 110, 0.01, True),
        (n, 0.5, False),
    ):
        found = certify_votes(count, n - count, n, **settings, slack=slack)
        assert (found.certified, found.radius > 0) == (answer, answer), count
    assert certify_votes(0, 0, n, **settings, slack=0.01).lower == 0  # not below 0


def test_the_slack_lowers_bounds_and_raises_p_values_by_itself_and_rounds_against_the_claim():
    count, n, slack = np.array([6000, 9000, 9999, 10_000]), 10_000, 7e-14
    settings = {"alpha": 0.001, "sigma": 0.5}
    for bound in BOUNDS:
        without = certify_votes(count, 0, n, **settings, bound=bound, uniform=0.5)
        found = certify_votes(count, 0, n, **settings, bound=bound, uniform=0.5, slack=slack)
        for low, high in zip(found.lower.tolist(), without.lower.tolist(), strict=True):
            assert 0 < Fraction(high) - Fraction(slack) - Fraction(low) < Fraction(1, 2**51)
        assert (found.radius < without.radius).all()
        np.testing.assert_allclose(found.radius, without.radius, rtol=1e-9)
        ceiling = radius_ceiling(n, **settings, bound=bound, slack=0.001)
        assert ceiling == certify_votes(n, 0, n, **settings, bound=bound, uniform=1.0, slack=0.001).radius
        assert ceiling < radius_ceiling(n, **settings, bound=bound)
    two = certify_votes(4500, 2000, n, **settings, bound="two_class", slack=0.01)
    lower, upper = lower_confidence_bound(4500, n, 0.00099) - 0.01, upper_confidence_bound(2000, n, 0.00001) + 0.01
    assert two.radius == pytest.approx(0.25 * (special.ndtri(lower) - special.ndtri(upper)), rel=1e-12)
    without = p_value_of([60, 70, 50], [40, 30, 50])
    found = p_value_of([60, 70, 50], [40, 30, 50], n=np.array([100, 100, 120]), slack=1e-6)
    np.testing.assert_allclose(found, [without[0] + 1e-4, without[1] + 1e-4, 1], rtol=1e-12)
    for low, high in zip(without[:2].tolist(), found.tolist()[:2], strict=True):
        assert Fraction(high) >= Fraction(low) + 100 * Fraction(1e-6)
    np.testing.assert_array_equal(p_value_of([60, 70], [40, 30], n=100), without[:2])


def test_bad_slack():
    for bad in (-1e-9, 2, float("nan"), None):
        with pytest.raises(UserError, match=f"slack={bad}: use a number"):
            certify_votes(60, 40, 100, alpha=0.1, sigma=1.0, slack=bad)
    with pytest.raises(UserError, match=r"slack=1e-06 needs n, the number of all votes"):
        p_value_of(60, 40, slack=1e-6)

"""Votes for a tolerance: exact error probabilities over pilot and measurement, exact losses, and broken twins."""

import functools

import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import UserError, lower_confidence_bound
from rs_consistency.statistics import allocation
from rs_consistency.statistics.allocation import pilot_votes, votes_for_tolerance
from rs_consistency.statistics.bounds import certify_votes, radius_ceiling, upper_confidence_bound
from rs_consistency.statistics.limits import fewest_votes

SHARES = [0.4, 0.499, 0.5, 0.55, 0.7, 0.9, 0.97]  # of the first class
TOLERANCES = [0.05, 0.2, 0.5]


def wrong(p, n0, n, tolerance, alpha, *, pilot_counts):
    """Return the exact probability that p_A is below its lower bound; the pilot selects the larger of two classes."""
    firsts = np.arange(n0 + 1)
    count0, p_a = np.maximum(firsts, n0 - firsts), np.where(2 * firsts >= n0, p, 1 - p)
    votes = votes_for_tolerance(count0, n0=n0, n=n, tolerance=tolerance, alpha=alpha, sigma=1.0)
    total = 0.0
    for weight, extra, of_class, m in zip(stats.binom.pmf(firsts, n0, p), count0, p_a, votes, strict=True):
        counts = np.arange(m + 1)
        counted = (counts + extra, 0, m + n0) if pilot_counts else (counts, 0, m)
        certified = certify_votes(*counted, alpha=alpha, sigma=1.0)
        errs = certified.certified & (certified.lower > of_class)
        total += weight * stats.binom.pmf(counts, m, of_class)[errs].sum()
    return total


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_a_certificate_is_wrong_with_probability_at_most_alpha_and_a_counted_pilot_breaks_it(alpha):
    for tolerance in TOLERANCES:
        for p in SHARES:
            assert wrong(p, 20, 200, tolerance, alpha, pilot_counts=False) <= alpha, (p, tolerance)
    assert max(wrong(0.5, 20, 200, tolerance, alpha, pilot_counts=True) for tolerance in TOLERANCES) > 1.2 * alpha


def outcomes(votes, p):
    """Return the counts `[O, 3]` of three classes and their probabilities `[O]`."""
    first, second = np.indices((votes + 1, votes + 1)).reshape(2, -1)
    counts = np.stack([first, second, votes - first - second], axis=1)
    counts = counts[counts[:, 2] >= 0]
    return counts, stats.multinomial.pmf(counts, votes, p)


def two_class_wrong(p, n0, n, tolerance, alpha, *, pilot_counts):
    """Return the exact probability that the two-class radius, at 0.99 and 0.01 of alpha, exceeds the true radius."""
    total, measured = 0.0, functools.cache(lambda votes: outcomes(votes, p))
    pilots, probabilities = outcomes(n0, p)
    votes = votes_for_tolerance(pilots.max(axis=1), n0=n0, n=n, tolerance=tolerance, alpha=alpha, sigma=1.0)
    for pilot, weight, m in zip(pilots, probabilities, votes.tolist(), strict=True):
        selected = pilot.argmax()
        counts, probability = measured(m)
        if pilot_counts:
            counts, m = counts + pilot, m + n0
        runner_up = np.delete(counts, selected, axis=1).max(axis=1)
        lower = lower_confidence_bound(counts[:, selected], m, 0.99 * alpha)
        upper = np.minimum(upper_confidence_bound(runner_up, m, 0.01 * alpha), 1 - lower)
        radius = special.ndtri(np.maximum(lower, 1e-300)) - special.ndtri(upper)
        true = special.ndtri(p[selected]) - special.ndtri(max(np.delete(p, selected)))
        total += weight * probability[radius > max(true, 0)].sum()
    return total


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_two_class_bound_keeps_alpha_and_a_counted_pilot_breaks_it(alpha):
    for p in ([0.5, 0.5, 0], [0.35, 0.35, 0.3], [0.6, 0.3, 0.1], [0.8, 0.15, 0.05]):
        for tolerance in (0.1, 0.5):
            assert two_class_wrong(p, 9, 30, tolerance, alpha, pilot_counts=False) <= alpha, (p, tolerance)
    assert two_class_wrong([0.5, 0.5, 0], 9, 30, 0.1, alpha, pilot_counts=True) > 1.2 * alpha


def exact_radius(votes, p, alpha):
    """Return the expected radii at sigma 1, summed over all counts."""
    counts = np.arange(votes + 1)
    radii = certify_votes(counts, 0, votes, alpha=alpha, sigma=1.0).radius
    return stats.binom.pmf(counts, votes, np.asarray(p)[:, None]) @ radii


P = np.concatenate([np.linspace(0.4, 0.98, 30), 1 - np.geomspace(0.01, 1e-6, 20), [1]])


@functools.cache
def losses(n0, n, tolerance, alpha, misled=0.02):
    """Return the exact expected losses `[P, n0 + 1]` after each pilot, and the probabilities of the pilots."""
    counts0 = np.arange(n0 + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MISLED", misled)
        votes = votes_for_tolerance(counts0, n0=n0, n=n, tolerance=tolerance, alpha=alpha, sigma=1.0)
    distinct, position = np.unique(votes, return_inverse=True)
    radii = np.stack([exact_radius(m, P, alpha) for m in distinct], axis=1)
    return exact_radius(n, P, alpha)[:, None] - radii[:, position], stats.binom.pmf(counts0, n0, P[:, None])


@pytest.mark.parametrize(("n0", "n", "alpha"), [(20, 1000, 0.05), (100, 3000, 0.001)])
@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5])
def test_the_mean_loss_is_within_the_tolerance_for_every_p(n0, n, alpha, tolerance):
    loss, pilots = losses(n0, n, tolerance, alpha)
    assert ((loss * pilots).sum(axis=1) <= tolerance).all()
    not_misled = upper_confidence_bound(np.arange(n0 + 1), n0, 0.02) >= P[:, None]
    assert (loss[not_misled] <= tolerance + 2e-4).all()  # of the table's sums
    assert ((pilots * not_misled).sum(axis=1) >= 0.98).all()
    assert (loss * pilots).sum(axis=1).max() > tolerance / 2  # no more votes than it takes


def test_the_share_of_the_pilot_instead_of_its_upper_bound_loses_more():
    loss, pilots = losses(100, 3000, 0.02, 0.001, misled=0.5)
    assert (loss * pilots).sum(axis=1).max() > 1.3 * 0.02


def test_the_expected_radii_are_the_exact_sums():
    numbers, radii = allocation._expected_radii(2000, 0.001, 0.0)
    p = special.ndtr(allocation._DISTANCES)
    for column in (0, 10, len(numbers) // 2, len(numbers) - 1):
        np.testing.assert_allclose(radii[:, column], exact_radius(numbers[column], p, 0.001), atol=2e-4)


SETTINGS = {"n0": 100, "n": 10_000, "alpha": 0.001, "sigma": 0.5}


def test_the_votes_grow_with_the_pilot_and_fall_with_the_tolerance():
    tolerances = [1e-9, 0.001, 0.01, 0.02, 0.05, 0.2, 100.0]
    votes = np.stack([votes_for_tolerance(np.arange(101), tolerance=t, **SETTINGS) for t in tolerances])
    assert votes.dtype == np.int64 and (np.diff(votes, axis=1) >= 0).all() and (np.diff(votes, axis=0) <= 0).all()
    assert votes.min() == 10 and votes.max() == 10_000
    assert (votes[0, 50:] == 10_000).all() and (votes[-1] == 10).all()  # the ends of the tolerance
    assert (votes[:, :20] == 10).all()  # no radius, whatever the votes


def test_known_votes():
    # The audit of a file computes these again: other numbers need another `RULE`, which records have.
    assert allocation.RULE == 1
    assert votes_for_tolerance(100, tolerance=0.02, **SETTINGS) == 8789
    assert votes_for_tolerance([[0, 50], [70, 95]], tolerance=0.02, **SETTINGS).tolist() == [[10, 2573], [2745, 5242]]
    np.testing.assert_array_equal(  # only the ratio of tolerance and sigma counts
        votes_for_tolerance(np.arange(101), tolerance=0.04, **{**SETTINGS, "sigma": 1.0}),
        votes_for_tolerance(np.arange(101), tolerance=0.02, **SETTINGS),
    )
    full = votes_for_tolerance(np.arange(101), tolerance=0.02, **SETTINGS)
    with_slack = votes_for_tolerance(np.arange(101), tolerance=0.02, slack=0.01, **SETTINGS)
    assert with_slack.min() == 11 and (with_slack[-1] < full[-1])  # a slack caps the radius, so fewer votes reach it
    assert votes_for_tolerance([5, 9], n0=9, n=3, tolerance=0.1, alpha=0.001, sigma=1.0).tolist() == [3, 3]
    assert votes_for_tolerance([], tolerance=0.1, **SETTINGS).shape == (0,)


@pytest.mark.parametrize(
    ("alpha", "slack", "votes"), [(0.5, 0, 1), (0.25, 0, 2), (0.05, 0, 5), (1e-100, 0, 333), (0.001, 0.1, 14)]
)
def test_the_least_votes_can_certify_and_fewer_cannot(alpha, slack, votes):
    assert fewest_votes(alpha=alpha, slack=slack) == votes
    certified = certify_votes([votes, votes - 1], 0, [votes, max(votes - 1, 1)], alpha=alpha, sigma=1.0, slack=slack)
    assert certified.certified.tolist() == [True, False]
    assert radius_ceiling(votes, alpha=alpha, sigma=1.0, slack=slack) >= 0
    assert fewest_votes(alpha=alpha, slack=0.5) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count0": 101}, "count0=101: use whole numbers from 0 to n0"),
        ({"count0": [3, -1]}, "count0=-1"),
        ({"count0": 0.5}, r"count0=0\.5"),
        ({"n0": 0}, "n0=0: use a whole number of at least 1"),
        ({"n": 0}, "n=0"),
        ({"n": 10**9}, "n=1000000000: with a tolerance use at most 1,000,000 votes, or leave the tolerance out"),
        ({"tolerance": 0.0}, r"tolerance=0\.0: use a number greater than 0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"alpha": 1.0}, r"alpha=1\.0: use a number in \(0, 1\)"),
        ({"sigma": 0}, "sigma=0: use a number greater than 0"),
        ({"slack": 2.0}, r"slack=2\.0"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(UserError, match=message):
        votes_for_tolerance(**{"count0": 50, "tolerance": 0.02, **SETTINGS, **changed})


def test_the_pilot_by_default():
    assert [pilot_votes(None, tolerance=each, bound="randomized") for each in (None, 0.02)] == [100, 1000]
    assert pilot_votes(50, tolerance=0.02, bound="clopper_pearson") == pilot_votes(
        50, tolerance=None, bound="two_class"
    )
    with pytest.raises(UserError, match=r"tolerance=0\.02: it leaves few votes to images that bound=two_class would"):
        pilot_votes(None, tolerance=0.02, bound="two_class")
    with pytest.raises(UserError, match="n=1000001: with a tolerance use at most 1,000,000"):
        pilot_votes(50, tolerance=0.02, bound="clopper_pearson", n=10**6 + 1)
    with pytest.raises(UserError, match="tolerance='x': use a number greater than 0"):
        pilot_votes(50, tolerance="x", bound="clopper_pearson")

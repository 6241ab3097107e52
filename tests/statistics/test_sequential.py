"""The sequential test: exact values, exact error probabilities under peeking, and broken tests that must fail."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special

from rs_consistency import UserError, lower_confidence_bound
from rs_consistency.statistics.sequential import decide, log_evidence

MOST = 400  # votes of the exact computation
SIGMA = 0.5
RADII = [0.0, 0.1, 0.3, 0.5, 1.0]  # p0 from 0.5 to 0.977


@pytest.mark.parametrize("p0", [Fraction(1, 2), Fraction(7, 10), Fraction(999, 1000)])
@pytest.mark.parametrize("votes", [1, 2, 17, 300])
def test_the_evidence_is_the_product_of_the_sequential_bets(votes, p0):
    # Krichevsky and Trofimov: the mixture gives the next vote the probability (h + 1/2) / (t + 1).
    for hits in {0, 1, votes // 2, votes}:
        exact = Fraction(1)
        for t in range(votes):
            h = min(t, hits)  # hits first: the order does not matter
            exact *= (h + Fraction(1, 2)) / (t + 1) / p0 if t < hits else (t - h + Fraction(1, 2)) / (t + 1) / (1 - p0)
        expected = math.log(exact.numerator) - math.log(exact.denominator)
        assert log_evidence(hits, votes, float(p0)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("p0", [0.5, 0.9])
def test_the_evidence_is_a_martingale_of_mean_one(p0):
    for votes in (1, 10, 200):
        hits = np.arange(votes + 1)
        log_pmf = special.gammaln(votes + 1) - special.gammaln(hits + 1) - special.gammaln(votes - hits + 1)
        log_pmf += hits * np.log(p0) + (votes - hits) * np.log1p(-p0)
        assert np.exp(log_pmf + log_evidence(hits, votes, p0)).sum() == pytest.approx(1, rel=1e-11)


def outcomes(rule, p, every=1):
    """Return the exact probabilities of (1, -1) as first decision of `rule(hits, votes)` in MOST votes, for p."""
    alive, decisions = np.ones(1), {1: 0.0, -1: 0.0}
    for votes in range(1, MOST + 1):
        alive = np.append(alive * (1 - p), 0) + np.append(0, alive * p)
        if votes % every == 0:
            decided = rule(np.arange(votes + 1), votes)
            for outcome in decisions:
                decisions[outcome] += alive[decided == outcome].sum()
            alive = np.where(decided == 0, alive, 0)
    return decisions[1], decisions[-1]


def rule_of(radius, alpha):
    return lambda hits, votes: decide(hits, votes, radius=radius, sigma=SIGMA, alpha=alpha)


def from_evidence(evidence, radius, threshold):
    """Return the test with another evidence or threshold."""
    p0 = special.ndtr(radius / SIGMA)

    def rule(hits, votes):
        side = np.where(hits > votes * p0, 1, -1)
        return np.where(evidence(hits, votes, p0) >= threshold, side, 0)

    return rule


def peeking(radius, alpha):
    """Return a rule that certifies as soon as the Clopper-Pearson bound of the votes so far exceeds p0."""
    p0 = special.ndtr(radius / SIGMA)
    return lambda hits, votes: np.where(lower_confidence_bound(hits, votes, alpha) > p0, 1, 0)


def maximum_likelihood(hits, votes, p0):
    """Return the likelihood under the share of the hits instead of the mixture."""
    share = hits / votes
    return special.xlogy(hits, share / p0) + special.xlogy(votes - hits, (1 - share) / (1 - p0))


def prior_not_normalized(hits, votes, p0):
    """Return the mixture without its B(1/2, 1/2)."""
    return log_evidence(hits, votes, p0) + special.betaln(0.5, 0.5)


def errs(make, alpha):
    """Return whether p = p0 is rejected with a probability greater than alpha, for some radius."""
    worst = max(sum(outcomes(make(radius), special.ndtr(radius / SIGMA))) for radius in RADII)
    return worst > alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("every", [1, 16])
def test_p0_is_rejected_with_probability_at_most_alpha_in_all_looks_together(alpha, every):
    for radius in RADII:
        rejected = sum(outcomes(rule_of(radius, alpha), special.ndtr(radius / SIGMA), every))
        assert rejected <= alpha, radius
        if every == 1 and radius < 1:
            assert rejected > alpha / 3, radius  # the bound is not vacuous


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_broken_tests_reject_p0_more_often(alpha):
    assert errs(lambda radius: peeking(radius, alpha), alpha)
    assert errs(lambda radius: from_evidence(maximum_likelihood, radius, np.log(1 / alpha)), alpha)
    assert errs(lambda radius: from_evidence(prior_not_normalized, radius, np.log(1 / alpha)), alpha)
    assert errs(lambda radius: from_evidence(log_evidence, radius, np.log10(1 / alpha)), alpha)
    assert not errs(lambda radius: from_evidence(log_evidence, radius, np.log(1 / alpha)), alpha)


@pytest.mark.parametrize("radius", RADII)
def test_each_outcome_errs_with_probability_at_most_alpha_on_its_side(radius):
    alpha, p0 = 0.05, special.ndtr(radius / SIGMA)
    for p in p0 * np.array([0.2, 0.8, 0.99, 1]):
        assert outcomes(rule_of(radius, alpha), p)[0] <= alpha, p
    for p in 1 - (1 - p0) * np.array([0.2, 0.8, 0.99, 1]):
        assert outcomes(rule_of(radius, alpha), p)[1] <= alpha, p
    assert outcomes(rule_of(radius, alpha), p0 / 2)[1] > 0.99  # easy cases are decided
    assert outcomes(rule_of(min(radius, 0.5), alpha), 0.999)[0] > 0.99


SLACK = 0.01


def with_slack(radius, alpha, slack=SLACK):
    return lambda hits, votes: decide(hits, votes, radius=radius, sigma=SIGMA, alpha=alpha, slack=slack)


def tabulated(rule):
    """Return a rule that was asked for all counts once."""
    table = [rule(np.arange(votes + 1), votes) for votes in range(1, MOST + 1)]
    return lambda hits, votes: table[votes - 1]


def only_certified_with_slack(rules):
    """Return a rule that forgets the slack of `NOT_CERTIFIED`."""
    with_it, without = rules["slack"], rules["no slack"]
    return lambda *votes: np.where(without(*votes) == -1, -1, np.maximum(with_it(*votes), 0))


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_slack_covers_votes_of_other_probabilities(alpha):
    worst = {"slack": 0.0, "no slack": 0.0, "one side": 0.0}
    for radius in (0.0, 0.3, 1.0):
        p0 = special.ndtr(radius / SIGMA)
        rules = {"slack": with_slack(radius, alpha), "no slack": rule_of(radius, alpha)}
        rules = {name: tabulated(rule) for name, rule in rules.items()}
        for q in (p0 - SLACK, p0, p0 + SLACK):  # p_A = p0
            assert sum(outcomes(rules["slack"], q)) <= alpha, (radius, q)
        rules["one side"] = only_certified_with_slack(rules)
        for name, rule in rules.items():  # each outcome where it is just wrong
            worst[name] = max(worst[name], outcomes(rule, p0 + SLACK)[0], outcomes(rule, p0 - SLACK)[1])
    assert worst["slack"] <= alpha < min(worst["no slack"], worst["one side"])
    assert worst["slack"] > alpha / 4  # the slack is not more than it takes


def test_the_slack_of_both_outcomes():
    asked = {"radius": 0.5, "sigma": 0.5, "alpha": 0.001}  # p0 = 0.8413
    hits, votes = np.array([8588, 8587, 8234, 8233]), 10_000
    assert decide(hits, votes, **asked).tolist() == [1, 0, 0, -1]
    assert decide(hits, votes, **asked, slack=0.01).tolist() == [0, 0, 0, 0]
    assert decide([8684, 8683, 8130, 8129], votes, **asked, slack=0.01).tolist() == [1, 0, 0, -1]
    np.testing.assert_array_equal(decide(hits, votes, **asked, slack=1e-13), decide(hits, votes, **asked))
    # Beyond 0 and 1 nothing is decided.
    everything = np.array([0, 500, 1000])
    assert decide(everything, 1000, radius=0.0, sigma=1, alpha=0.001, slack=0.5).tolist() == [0, 0, 0]
    assert decide(everything, 1000, radius=3.0, sigma=1, alpha=0.001, slack=0.01).tolist() == [-1, -1, 0]
    for distance in (9.0, 50.0, 1e300):  # p0 + slack = 1, and p0 - slack = 1 - slack
        found = decide([999, 500, 1000], 1000, radius=distance, sigma=1.0, alpha=0.001, slack=1e-12)
        assert found.tolist() == [-1, -1, 0]


@pytest.mark.parametrize("radius", RADII)
def test_each_outcome_lies_beyond_a_limit_of_the_hits(radius):
    for votes in (5, 16, 100, 1000):
        decisions = decide(np.arange(votes + 1), votes, radius=radius, sigma=SIGMA, alpha=0.05)
        assert (np.diff(decisions) >= 0).all()


def test_known_decisions():
    certified = decide([1, 4, 5, 6, 7], [1, 4, 5, 6, 7], radius=0, sigma=1, alpha=0.05)
    # All of T votes at p0 = 1/2: E_T = prod (t + 1/2) / (t + 1) * 2 ** T = 14.4 for T = 6, and 26.8 for T = 7.
    assert certified.tolist() == [0, 0, 0, 0, 1] and certified.dtype == np.int8
    assert decide(0, 7, radius=0, sigma=1, alpha=0.05) == -1  # by symmetry
    assert decide(900, 1000, radius=0.4, sigma=0.5, alpha=0.001) == 1  # p0 = 0.788
    assert decide(900, 1000, radius=0.64, sigma=0.5, alpha=0.001) == 0  # p0 = 0.8997
    assert decide(900, 1000, radius=1.0, sigma=0.5, alpha=0.001) == -1  # p0 = 0.977
    grid = decide(np.array([[0], [900]]), 1000, radius=np.array([0.4, 0.64, 1.0]), sigma=0.5, alpha=0.001)
    assert grid.tolist() == [[-1, -1, -1], [1, 0, -1]]


@pytest.mark.parametrize("distance", [9.0, 38.0, 50.0, 1e5, 1e300])
def test_p0_so_near_one_that_float64_cannot_tell_is_not_one(distance):
    votes = np.array([1, 1000, 2**29])
    assert (decide(votes, votes, radius=distance, sigma=1.0, alpha=0.001) == 0).all()  # nothing is certified
    assert (decide(votes - 1, votes, radius=distance, sigma=1.0, alpha=0.001)[:2] == -1).all()  # one miss is enough
    assert (decide(0, votes, radius=distance, sigma=1.0, alpha=0.001) == -1).all()
    assert (decide(votes, votes, radius=1e300, sigma=1e-300, alpha=0.001) == 0).all()


def test_many_votes_keep_the_decision_on_the_safe_side_of_rounding():
    votes = 2**53
    half = votes // 2
    assert decide([half, 0, votes], votes, radius=0, sigma=1, alpha=0.001).tolist() == [0, -1, 1]
    assert decide(1, 1, radius=0, sigma=1, alpha=1 - 1e-16) == 0  # E_1 = 1 for every vote at p0 = 1/2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -0.1}, r"radius=-0\.1: use a number of at least 0"),
        ({"radius": float("nan")}, "radius=nan"),
        ({"radius": float("inf")}, "radius=inf"),
        ({"radius": None}, "radius=None: use numbers"),
        ({"sigma": 0.0}, r"sigma=0\.0: use a number greater than 0"),
        ({"alpha": 0.0}, r"alpha=0\.0: use a number in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha=1\.0"),
        ({"alpha": 1e-200}, "alpha=1e-200: use a number of at least 1e-100"),
        ({"votes": 0, "hits": 0}, "votes=0: use a whole number of at least 1"),
        ({"votes": 2.5}, r"votes=2\.5"),
        ({"votes": 2**60}, r"at most 2\*\*53"),
        ({"hits": 3}, "hits=3: use whole numbers from 0 to votes"),
        ({"hits": [1, -1]}, "hits=-1"),
        ({"hits": 0.5}, r"hits=0\.5"),
        ({"hits": "a"}, "hits='a': use numbers"),
        ({"slack": -0.1}, r"slack=-0\.1: use a number"),
        ({"slack": float("nan")}, "slack=nan: use a number"),
    ],
)
def test_bad_arguments(arguments, message):
    settings = {"hits": 1, "votes": 2, "radius": 0.5, "sigma": 0.5, "alpha": 0.001, **arguments}
    with pytest.raises(UserError, match=message):
        decide(settings.pop("hits"), settings.pop("votes"), **settings)


@pytest.mark.parametrize("p0", [0.0, 1.0, float("nan")])
def test_bad_p0(p0):
    with pytest.raises(UserError, match=rf"p0={p0}: use a number in \(0, 1\)"):
        log_evidence(1, 2, p0)

"""The joint statement: exact coverage where lines are as wrong as alpha allows, and broken ones that fail."""

import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import UserError
from rs_consistency.certificates.joint import (
    certified_accuracy_lower,
    joint_statement,
    population_accuracy_lower,
    wrong_at_most,
)
from rs_consistency.certificates.read import Certificates

N = 200
ALPHA, DELTA = 0.02, 0.05
ROUNDING = 1e-12  # of the exact sums


def table_of(correct, num_images=N, radius=1.0):
    """A file in which so many images are certified correctly, and the others abstained."""
    right = np.arange(num_images) < correct
    return Certificates(
        idx=np.arange(num_images),
        label=np.zeros(num_images, int),
        predict=np.where(right, 0, -1),
        radius=radius * right,
        correct=right.astype(int),
        seconds=np.ones(num_images),
        mode="certify",
    )


@pytest.mark.parametrize("num_images", [1, 2, 50, 1000, 10_000])
@pytest.mark.parametrize("alpha", [0.3, 0.001, 1e-9])
@pytest.mark.parametrize("delta", [0.5, 0.01, 1e-6])
def test_wrong_at_most_is_the_smallest_number_that_covers(num_images, alpha, delta):
    b = wrong_at_most(num_images, alpha=alpha, delta=delta)
    assert stats.binom.sf(b, num_images, alpha) <= delta * (1 + 1e-9)
    assert b == 0 or stats.binom.sf(b - 1, num_images, alpha) > delta


def test_wrong_at_most_at_the_ends():
    assert wrong_at_most(500, alpha=0.001, delta=0.001) == 4  # 1 - (pmf(0) + ... + pmf(4)) = 0.00017; with 3, 0.00173
    assert wrong_at_most(3, alpha=0.9, delta=0.001) == 3
    for num_images in (2, 500, 10_000):  # Bonferroni: all hold at once
        assert wrong_at_most(num_images, alpha=0.001 / num_images, delta=0.001) == 0


def claims_of_wrong_lines_only(table, radius, *, alpha, delta):
    """Counts only the lines that claim something; among images without a true certificate, these are the wrong ones."""
    claims = int((table.predict >= 0).sum())
    b = wrong_at_most(claims, alpha=alpha, delta=delta) if claims else 0
    return max(claims - b, 0) / len(table.idx)


def uncorrected(table, radius, *, alpha, delta):
    return float(np.mean(table.correct))


def expected_number(table, radius, *, alpha, delta):
    return max(float(np.mean(table.correct)) - alpha, 0.0)


def violation_for_these_images(bound, truly):
    """P(bound > truth): `truly` certificates are true, each of the other images is wrongly certified with ALPHA."""
    wrong = np.arange(N - truly + 1)
    too_high = [bound(table_of(truly + w), 1.0, alpha=ALPHA, delta=DELTA) > truly / N for w in wrong]
    return stats.binom.pmf(wrong, N - truly, ALPHA)[too_high].sum()


def test_the_bound_for_these_images_covers_and_broken_ones_do_not():
    worst = max(violation_for_these_images(certified_accuracy_lower, truly) for truly in (0, 1, 50, 150, N))
    assert 0.01 < worst <= DELTA + ROUNDING  # and it is no wider than it must be
    for broken in (uncorrected, claims_of_wrong_lines_only, expected_number):
        assert violation_for_these_images(broken, 0) > DELTA, broken.__name__


def test_it_covers_all_radii_at_once():
    """Lines are wrong at different radii, and one b covers them all."""
    rng = np.random.default_rng(0)
    failures, picked_apart, trials = 0, 0, 2000
    radii = (0.5, 1.0, 1.5, 2.0)
    for _ in range(trials):
        wrong = rng.random(N) < ALPHA
        true_radius = np.repeat(radii, N // 4) - 0.25
        table = table_of(N)._replace(radius=true_radius + 1.0 * wrong)
        truth = [np.mean(true_radius >= radius) for radius in radii]
        lower = [certified_accuracy_lower(table, radius, alpha=ALPHA, delta=DELTA) for radius in radii]
        failures += any(low > true for low, true in zip(lower, truth, strict=True))
        none = [uncorrected(table._replace(correct=table.radius >= r), r, alpha=ALPHA, delta=DELTA) for r in radii]
        picked_apart += any(low > true for low, true in zip(none, truth, strict=True))
    tolerance = 4 * np.sqrt(DELTA * (1 - DELTA) / trials)
    assert failures / trials <= DELTA + tolerance < picked_apart / trials


def violation_for_the_population(bound, truth):
    """P(bound > truth): an image is truly certified with `truth`, and otherwise wrongly with ALPHA in all."""
    counts = np.arange(N + 1)
    too_high = [bound(table_of(k), 1.0, alpha=ALPHA, delta=DELTA) > truth for k in counts]
    return stats.binom.pmf(counts, N, truth + ALPHA)[too_high].sum()


def without_alpha(table, radius, *, alpha, delta):
    return population_accuracy_lower(table, radius, alpha=1e-100, delta=delta)


def test_the_bound_for_the_population_covers_and_broken_ones_do_not():
    truths = (0.0, 0.1, 0.5, 0.9, 1 - ALPHA)
    worst = max(violation_for_the_population(population_accuracy_lower, truth) for truth in truths)
    assert 0.01 < worst <= DELTA + ROUNDING
    # Also the bound for these images: it says nothing of others.
    for broken in (uncorrected, expected_number, without_alpha, certified_accuracy_lower):
        assert max(violation_for_the_population(broken, truth) for truth in truths) > DELTA, broken.__name__


def test_known_values():
    table = table_of(9, num_images=10)
    statement = joint_statement(table, (0.5, 1.0, 1.25), alpha=0.01, delta=0.1)
    low = special.betaincinv(9, 2, 0.1) - 0.01  # the 0.1 quantile of Beta(9, 2) is Clopper and Pearson's
    assert statement["wrong_at_most"] == 0 and statement["delta"] == 0.1  # 0.99 ** 10 = 0.904
    assert statement["certified_accuracy_lower"] == {"0.5": 0.9, "1": 0.9, "1.25": 0.0}
    assert statement["population_accuracy_lower"] == {"0.5": pytest.approx(low), "1": pytest.approx(low), "1.25": 0.0}


def test_bad_arguments():
    for delta in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match=f"delta={delta}: use a number in"):
            joint_statement(table_of(1), (0.0,), alpha=0.1, delta=delta)
    with pytest.raises(UserError, match="alpha=0: use a number in"):
        population_accuracy_lower(table_of(1), 0.0, alpha=0)

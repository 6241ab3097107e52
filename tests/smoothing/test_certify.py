"""`rs_consistency.certify`: guarantees on classifiers with a known answer, and what the votes depend on."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import ABSTAIN, UserError, certify, lower_confidence_bound
from rs_consistency.smoothing.certify import conclude
from rs_consistency.smoothing.votes import count_votes, vote_settings
from rs_consistency.statistics.allocation import votes_for_tolerance
from rs_consistency.statistics.bounds import BOUNDS
from rs_consistency.statistics.samplers import noise_law

SHAPE = (4, 4, 1)
WEIGHTS = np.random.default_rng(0).normal(size=16)
WEIGHTS /= np.linalg.norm(WEIGHTS)
SIGMA = 0.5
# Chosen so that the exact probability of a radius that is too large, 0.022, and those of the broken bounds below,
# 0.079, lie at least six standard errors of the share from alpha: counts are discrete, and most n hide the difference.
TRIALS, ALPHA, VOTES, DISTANCE = 4000, 0.05, 49, 0.61


def linear(images):
    """Two classes, split by a plane: smoothing keeps the plane, so the true radius is the distance to it."""
    margin = images.reshape(len(images), -1) @ jnp.asarray(WEIGHTS, jnp.float32)
    return jnp.stack([jnp.zeros_like(margin), margin - 0.5 * float(WEIGHTS.sum())], axis=-1)


def images_at(distance):
    """An 8-bit image at a signed distance from the plane, but for 1e-4: one level of the nearest image is changed."""
    levels = np.rint(255 * (0.5 + distance * WEIGHTS))
    left = distance - (levels / 255 - 0.5) @ WEIGHTS
    steps = np.arange(-9, 10)[:, None]
    step, pixel = np.unravel_index(np.abs(left - steps * WEIGHTS / 255).argmin(), (19, 16))
    levels[pixel] += step - 9
    assert abs((levels / 255 - 0.5) @ WEIGHTS - distance) < 1e-4
    assert levels.min() >= 0 and levels.max() <= 255
    return levels.astype(np.uint8).reshape(1, *SHAPE)


@pytest.fixture(scope="module")
def trials():
    """Votes of many independent trials on one image."""
    images = np.repeat(images_at(DISTANCE), TRIALS, axis=0)
    return certify(linear, images, sigma=SIGMA, num_classes=2, n0=25, n=VOTES, alpha=ALPHA, batch_size=8192)


def holds(radius):
    """Return whether at most a share alpha of the radii is too large."""
    return np.mean(radius > DISTANCE) <= ALPHA


def test_the_radius_of_a_linear_classifier_holds_and_broken_ones_do_not(trials):
    assert (trials.prediction == 1).mean() > 0.99
    assert holds(trials.radius)
    assert trials.radius.mean() > DISTANCE / 2  # and is not vacuous

    count, share = trials.counts[:, 1], trials.counts[:, 1] / VOTES
    lowered = {
        "plug-in": share,
        "Wald": share - stats.norm.ppf(1 - ALPHA) * np.sqrt(share * (1 - share) / VOTES),
        "at twice alpha": lower_confidence_bound(count, VOTES, 2 * ALPHA),
        "one vote too many": lower_confidence_bound(np.minimum(count + 1, VOTES), VOTES, ALPHA),
    }
    for name, bound in lowered.items():
        assert not holds(SIGMA * special.ndtri(bound)), name
    assert not holds(trials.radius * 1.1)


def test_votes_have_the_probability_of_the_closed_form(trials):
    p = stats.norm.cdf(DISTANCE / SIGMA)
    # Every trial is Binomial(n, p) of its own: mean and variance of the counts, within 5 standard errors.
    count = trials.counts[:, 1]
    assert abs(count.mean() - VOTES * p) < 5 * np.sqrt(VOTES * p * (1 - p) / TRIALS)
    kurtosis = 3 + (1 - 6 * p * (1 - p)) / (VOTES * p * (1 - p))
    assert count.var() == pytest.approx(VOTES * p * (1 - p), rel=5 * np.sqrt((kurtosis - 1) / TRIALS))


def test_selection_and_estimation_are_independent(trials):
    correlation = np.corrcoef(trials.counts0[:, 1], trials.counts[:, 1])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(TRIALS)


def test_reusing_the_selection_votes_breaks_the_guarantee():
    # At the plane each class has probability 1/2, so a certified class with a bound above 1/2 is always wrong.
    images = np.repeat(images_at(0.0), 2000, axis=0)
    result = certify(linear, images, sigma=SIGMA, num_classes=2, n0=53, n=53, alpha=ALPHA, batch_size=8192)
    limit = stats.binom.isf(1e-6, 2000, ALPHA)
    assert (result.prediction != ABSTAIN).sum() <= limit
    reused = conclude(result.counts, result.counts, alpha=ALPHA, sigma=SIGMA)
    assert (reused.prediction != ABSTAIN).sum() > limit


@pytest.fixture(scope="module")
def several():
    return np.concatenate([images_at(distance) for distance in (-0.6, -0.1, 0.05, 0.2, 0.45, 0.6, -0.3)])


@pytest.fixture(scope="module")
def votes(several):
    return certify(linear, several, sigma=SIGMA, num_classes=2, n0=10, n=333, batch_size=64, seed=7)


def assert_same_votes(one, other):
    np.testing.assert_array_equal(one.counts0, other.counts0)
    np.testing.assert_array_equal(one.counts, other.counts)


def test_shapes_types_and_totals(several, votes):
    assert votes.prediction.shape == votes.radius.shape == (7,)
    assert votes.counts0.shape == votes.counts.shape == (7, 2)
    assert votes.radius.dtype == np.float64
    assert (votes.counts0.sum(axis=1) == 10).all() and (votes.counts.sum(axis=1) == 333).all()
    assert votes.prediction[0] == 0 and votes.prediction[5] == 1


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 64), (1, 1), (2, 37), (3, 64), (8, 5000)])
def test_votes_do_not_depend_on_devices_or_batch(several, votes, num_devices, batch_size):
    chosen = several[:2] if batch_size == 1 else several  # a batch of one is slow
    devices = jax.devices()[:num_devices]
    got = certify(
        linear, chosen, sigma=SIGMA, num_classes=2, n0=10, n=333, batch_size=batch_size, seed=7, devices=devices
    )
    np.testing.assert_array_equal(got.counts, votes.counts[: len(chosen)])
    np.testing.assert_array_equal(got.counts0, votes.counts0[: len(chosen)])


@pytest.mark.parametrize(("num_devices", "batches"), [(1, 4), (8, 3)])
def test_votes_do_not_depend_on_the_batches_in_a_call(several, votes, num_devices, batches, monkeypatch):
    """On an accelerator a call computes several batches in a compiled loop."""
    monkeypatch.setattr("rs_consistency.smoothing.votes._BATCHES_PER_CALL", {"cpu": batches})
    devices = jax.devices()[:num_devices]
    settings = vote_settings(
        sigma=SIGMA, num_classes=2, n0=10, n=333, seed=7, batch_size=64, image_shape=SHAPE, devices=devices
    )
    groups = list(
        count_votes(
            lambda _, images: linear(images),
            (),
            several,
            np.arange(7),
            settings=settings,
            devices=devices,
        )
    )
    np.testing.assert_array_equal(np.concatenate([group.counts for group in groups]), votes.counts)
    np.testing.assert_array_equal(np.concatenate([group.counts0 for group in groups]), votes.counts0)


def test_nothing_is_traced_again_for_other_images(several):
    traced = []

    def counting(images):
        traced.append(images.shape)
        return linear(images)

    settings = {"num_classes": 2, "n0": 10, "n": 333, "batch_size": 64, "devices": jax.devices()[:1]}
    certify(counting, np.repeat(several, 20, axis=0), sigma=SIGMA, **settings)  # 140 images: several groups
    assert len(traced) == 3  # the check of the model, the kernel, and the network by itself


def test_a_model_that_changed_is_certified_as_it_is_now(several):
    sign = [1.0]

    def model(images):
        return sign[0] * linear(images)

    settings = {"sigma": SIGMA, "num_classes": 2, "n0": 10, "n": 200, "devices": jax.devices()[:1]}
    before = certify(model, several[:1], **settings)
    sign[0] = -1.0
    after = certify(model, several[:1], **settings)
    assert (before.prediction[0], after.prediction[0]) == (0, 1)


def test_the_noise_is_drawn_in_float32_and_no_radius_profits():
    sigma = 0.12
    assert np.float64(np.float32(sigma)) < sigma
    law = noise_law("float", sigma=sigma, dimension=16)._asdict()
    got = conclude(np.array([[1, 0]]), np.array([[990, 10]]), alpha=0.001, **law)
    exact = float(np.float32(sigma)) * special.ndtri(special.betaincinv(990, 11, 0.001))
    assert got.radius[0] <= exact < sigma / float(np.float32(sigma)) * exact
    assert got.radius[0] == pytest.approx(exact, rel=1e-14)


def test_votes_depend_on_the_index_not_on_the_company(several, votes):
    order = np.array([4, 0, 6])
    got = certify(linear, several[order], sigma=SIGMA, num_classes=2, n0=10, n=333, seed=7, indices=order)
    np.testing.assert_array_equal(got.counts, votes.counts[order])
    moved = certify(linear, several[order], sigma=SIGMA, num_classes=2, n0=10, n=333, seed=7)
    assert (moved.counts != votes.counts[order]).any()


def test_votes_depend_on_the_seed_and_estimation_not_on_n0(several, votes):
    other_seed = certify(linear, several, sigma=SIGMA, num_classes=2, n0=10, n=333, seed=8)
    assert (other_seed.counts != votes.counts).any()
    other_n0 = certify(linear, several, sigma=SIGMA, num_classes=2, n0=30, n=333, seed=7)
    np.testing.assert_array_equal(other_n0.counts, votes.counts)


def test_prediction_and_radius_follow_from_the_votes():
    counts0 = np.array([[9, 1], [1, 9], [5, 5]])
    counts = np.array([[1000, 0], [400, 600], [530, 470]])
    result = conclude(counts0, counts, alpha=0.001, sigma=2.0)
    assert result.prediction.tolist() == [0, 1, ABSTAIN]
    lower = special.betaincinv([600], [401], 0.001)[0]
    np.testing.assert_allclose(result.radius, [2 * special.ndtri(0.001**0.001), 2 * special.ndtri(lower), 0])
    equal = conclude(np.array([[5, 5]]), np.array([[0, 100]]), alpha=0.001, sigma=1.0)
    assert equal.prediction.tolist() == [ABSTAIN]  # the lowest of equals is selected, and has no votes


def test_a_constant_classifier_reaches_the_ceiling_and_one_vote_abstains(several):
    def constant(images):
        return jnp.zeros((len(images), 3)).at[:, 2].set(1.0)

    result = certify(constant, several, sigma=1.0, num_classes=3, n0=1, n=100)
    assert (result.prediction == 2).all()
    np.testing.assert_allclose(result.radius, special.ndtri(0.001**0.01))
    with pytest.raises(UserError, match=r"n=9 votes certify nothing .* even if all agree; use n=10"):
        certify(constant, several, sigma=1.0, num_classes=3, n0=1, n=9)
    assert (certify(constant, several, sigma=1.0, num_classes=3, n0=1, n=10).prediction == 2).all()


@pytest.mark.parametrize("num_devices", [1, 8])
def test_votes_by_plan_are_the_first_votes(several, num_devices, monkeypatch):
    monkeypatch.setattr("rs_consistency.smoothing.votes._PLANNED", 1)  # several groups
    monkeypatch.setattr("rs_consistency.smoothing.votes._CALLS_IN_GROUP", 8)
    settings = {"sigma": SIGMA, "num_classes": 2, "n0": 30, "seed": 3, "batch_size": 64}
    devices = jax.devices()[:num_devices]
    got = certify(linear, several, **settings, n=333, tolerance=0.05, devices=devices)
    cast = votes_for_tolerance(got.counts0.max(axis=1), n0=30, n=333, tolerance=0.05, alpha=0.001, sigma=SIGMA)
    assert got.counts.sum(axis=1).tolist() == cast.tolist() and len(set(cast)) > 2
    for place, n in enumerate(cast.tolist()):
        alone = certify(linear, several[[place]], **settings, n=n, indices=[place])
        np.testing.assert_array_equal(alone.counts0[0], got.counts0[place])
        np.testing.assert_array_equal(alone.counts[0], got.counts[place])
        assert (alone.prediction[0], alone.radius[0]) == (got.prediction[place], got.radius[place])


def test_no_images_give_no_certificates():
    result = certify(linear, np.zeros((0, *SHAPE)), sigma=SIGMA, num_classes=2)
    assert result.prediction.shape == (0,) and result.counts.shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0: use a number greater than 0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": "0.5"}, r"sigma='0\.5': use a number"),
        ({"sigma": None}, "sigma=None"),
        ({"alpha": 0.0}, r"alpha=0\.0: use a number in \(0, 1\)"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": "0.1"}, r"alpha='0\.1': use a number"),
        ({"alpha": 1e-150}, "alpha=1e-150: use a number of at least 1e-100"),
        ({"n": 0}, "n=0: use a whole number of at least 1"),
        ({"n": 10.5}, r"n=10\.5: use a whole number"),
        ({"n": float("inf")}, "n=inf: use a whole number"),
        ({"n": True}, "n=True: use a whole number"),
        ({"n0": 0}, "n0=0: use a whole number of at least 1"),
        ({"n": 2**40}, "n=1099511627776: use a whole number of at least 1 and at most 536870912"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"num_classes": 3}, r"num_classes=3 needs logits of shape"),
        ({"indices": [0, 1]}, r"indices has shape \(2,\)"),
        ({"indices": [0, 1, 2, 3, 4, 5, 2**32]}, "use whole numbers from 0 to 2147483647"),
        ({"indices": [0, 1, 2, 3, 4, 5, -1]}, "use whole numbers from 0"),
        ({"indices": [0.5] * 7}, "use whole numbers from 0"),
        ({"devices": []}, r"devices=\[\]: give at least one"),
        ({"sampler": "exact"}, "sampler='exact' is unknown; use one of float, grid"),
        ({"precision": "high"}, "precision='high' is unknown; use one of default, highest"),
        ({"sigma": 30.0}, "sigma=30.0: noise on the grid of 1/255 needs a sigma from 0.0004 to 27"),
    ],
)
def test_bad_settings(several, arguments, message):
    settings = {"sigma": SIGMA, "num_classes": 2, "n0": 10, "n": 10, "batch_size": 8, **arguments}
    with pytest.raises(UserError, match=message):
        certify(linear, several, **settings)


@pytest.mark.parametrize(
    ("platform", "image_shape", "batch_size", "rows"),
    [
        ("cpu", (28, 28, 1), None, 64),
        ("cpu", (32, 32, 3), None, 32),
        ("cpu", (224, 224, 3), None, 8),
        ("tpu", (28, 28, 1), None, 2048),
        ("gpu", (32, 32, 3), None, 5464),
        ("gpu", (224, 224, 3), None, 112),
        ("gpu", (224, 224, 3), 100, 40),
        ("cpu", (28, 28, 1), 1, 8),
    ],
)
def test_the_rows_are_chosen_by_platform_and_image(platform, image_shape, batch_size, rows):
    settings = {"sigma": 1, "num_classes": 2, "n0": 1, "n": 1, "seed": 0, "batch_size": batch_size}
    devices = [SimpleNamespace(platform=platform)] * 3
    assert vote_settings(**settings, image_shape=image_shape, devices=devices).rows_per_device == rows


def test_whole_numbers_may_be_written_as_floats(several, votes):
    got = certify(
        linear, several, sigma=jnp.float32(SIGMA), num_classes=jnp.int32(2), n0=1e1, n=333.0, batch_size=64.0, seed=7.0
    )
    assert_same_votes(got, votes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4, 1)), r"images has shape \(4, 4, 1\); it must be \[B, H, W, C\]"),
        (np.full((1, *SHAPE), 255), r"images lie in \[255, 255\]; they must be uint8, or numbers in \[0, 1\]"),
        (np.full((1, *SHAPE), -0.1), "they must be uint8"),
        (np.full((1, *SHAPE), "dark"), "images are of type <U4"),
        (np.full((1, *SHAPE), np.nan), "they must be uint8"),
        (np.full((1, *SHAPE), 0.5), r"the value 0\.5, which is no whole multiple of 1/255; give uint8 images, or"),
        (np.zeros((1, 5, 5, 1)), r"the model does not accept images of shape \(5, 5, 1\)"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(UserError, match=message):
        certify(linear, images, sigma=SIGMA, num_classes=2, n0=10, n=10)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_slack_reaches_the_conclusion(bound):
    counts0, counts = np.array([[9, 1, 0]]), np.array([[540, 430, 30]])
    settings = {"alpha": 0.01, "sigma": 1.0, "bound": bound, "uniform": np.array([0.5])}
    without, little, much = (conclude(counts0, counts, **settings, slack=slack) for slack in (0.0, 0.001, 0.05))
    np.testing.assert_array_equal(without.radius, conclude(counts0, counts, **settings).radius)
    assert without.radius > little.radius > 0 and little.prediction == 0
    assert much.radius == 0 and much.prediction == ABSTAIN


def test_a_model_that_gives_nan_is_refused(several):
    def broken(images):
        return jnp.where(images[:, 0, 0] > 0.5, jnp.nan, linear(images))

    with pytest.raises(UserError, match="the model gives NaN for noisy copies of image 0"):
        certify(broken, several, sigma=SIGMA, num_classes=2, n0=10, n=10)

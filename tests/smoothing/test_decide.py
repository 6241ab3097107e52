"""`rs_consistency.decide`: the votes one by one as the reference, a classifier with a known answer, the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import UserError, certify, decide, lower_confidence_bound, noise
from rs_consistency.devices import parallel
from rs_consistency.smoothing import pool
from rs_consistency.smoothing.pool import LOOK_EVERY, decide_images
from rs_consistency.smoothing.votes import vote_settings
from rs_consistency.statistics import sequential
from tests.helpers import grid_draws
from tests.smoothing.test_certify import SHAPE, SIGMA, images_at, linear

ALPHA, RADIUS, SEED = 0.05, 0.1, 7
PLANES = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)), jnp.float32)


def three(images):
    """Three classes, linear."""
    return (images.reshape(len(images), -1) - 0.5) @ PLANES


@pytest.fixture(scope="module")
def images():
    """Near and far from the planes."""
    rng = np.random.default_rng(2)
    pixels = 0.5 + rng.uniform(-0.5, 0.5, size=(23, *SHAPE)) * rng.uniform(0, 1, size=(23, 1, 1, 1))
    return np.rint(pixels * 255).astype(np.uint8)


def noisy(images, indices, phase, votes, seed):
    """`[B, votes, H, W, C]`, from the noise of each vote by its address."""
    key = noise.stream_key(seed, noise.Stream.CERTIFY)
    index, vote = np.repeat(indices, votes), np.tile(np.arange(votes), len(indices))
    draws = grid_draws(key, index, phase, vote, shape=SHAPE, sigma=SIGMA)
    levels = jnp.repeat(images, votes, axis=0).astype(jnp.int32) + draws
    return (levels.astype(jnp.float32) / 255).reshape(-1, votes, *SHAPE)


def single_votes(apply_fn, images, phase, votes, *, seed=SEED):
    """`[B, votes]` classes."""
    batch = noisy(images, np.arange(len(images)), phase, votes, seed)
    return np.asarray(apply_fn(batch.reshape(-1, *SHAPE)).argmax(axis=-1)).reshape(batch.shape[:2])


@pytest.fixture(scope="module")
def votes_of_three(images):
    """By seed, 100 votes of the selection and 320 of the estimation for each image."""
    return {
        seed: (single_votes(three, images, 0, 100, seed=seed), single_votes(three, images, 1, 320, seed=seed))
        for seed in (SEED, SEED + 1)
    }


def brute_force(votes_of_three, *, n0=20, n=300, seed=SEED, radius=RADIUS, alpha=ALPHA):
    """Decide image by image, look by look: `[B, 4]` selected, hits, votes, decision, and the counts0."""
    rows, counts0 = [], []
    for first, further in zip(*votes_of_three[seed], strict=True):
        counts0.append(np.bincount(first[:n0], minlength=3))
        selected = counts0[-1].argmax()
        for votes in [*range(LOOK_EVERY, n, LOOK_EVERY), n]:
            hits = (further[:votes] == selected).sum()
            decision = sequential.decide(hits, votes, radius=radius, sigma=SIGMA, alpha=alpha)
            if decision:
                break
        rows.append((selected, hits, votes, decision))
    return np.array(rows), np.array(counts0)


def rows_of(decisions):
    return np.stack([decisions.selected, decisions.hits, decisions.votes, decisions.decision], axis=1)


def decide_three(images, **changes):
    settings = {"sigma": SIGMA, "radius": RADIUS, "num_classes": 3, "n0": 20, "n": 300, "alpha": ALPHA, "seed": SEED}
    return decide(three, images, **{**settings, **changes})


@pytest.fixture(scope="module")
def expected(votes_of_three):
    rows, counts0 = brute_force(votes_of_three)
    assert set(rows[:, 3]) == {-1, 0, 1} and len(set(rows[:, 2])) > 5  # every outcome, at many looks
    return rows, counts0


def test_the_votes_of_the_reference_are_those_of_certify(images, votes_of_three):
    counts = certify(three, images, sigma=SIGMA, num_classes=3, n0=100, n=320, seed=SEED)
    for votes, found in zip(votes_of_three[SEED], (counts.counts0, counts.counts), strict=True):
        np.testing.assert_array_equal([np.bincount(row, minlength=3) for row in votes], found)


# The pool has two slots for each 16 rows of a batch: from 2 slots to more than there are images.
@pytest.mark.parametrize(
    ("num_devices", "batch_size"),
    [(1, 1), (1, 100), (1, 5000), (2, 50), (2, 333), (8, 300)],
)
def test_decisions_are_those_of_one_image_and_one_look_at_a_time(images, expected, num_devices, batch_size):
    got = decide_three(images, batch_size=batch_size, devices=jax.devices()[:num_devices])
    np.testing.assert_array_equal(rows_of(got), expected[0])
    np.testing.assert_array_equal(got.counts0, expected[1])
    np.testing.assert_array_equal(got.positions, np.arange(len(images)))
    assert got.decision.dtype == np.int8 and got.hits.dtype == got.votes.dtype == np.int64


@pytest.mark.parametrize(
    "changes",
    [
        {"n0": 1, "n": 303},
        {"n0": 16, "n": 15},
        {"n0": 100, "n": 16, "radius": 0},
        {"n": 320, "alpha": 0.001, "seed": 8},
    ],
)
def test_decisions_at_other_settings(images, votes_of_three, changes):
    rows, counts0 = brute_force(votes_of_three, **changes)
    got = decide_three(images, batch_size=70, devices=jax.devices()[:1], **changes)
    np.testing.assert_array_equal(rows_of(got), rows)
    np.testing.assert_array_equal(got.counts0, counts0)
    assert got.votes.max() <= changes.get("n", 300)


def test_blocks_of_a_slot_that_has_another_image_by_now_are_thrown_away(images, expected, monkeypatch):
    # One slot for each block, and three batches in flight: finished images have blocks on their way.
    monkeypatch.setattr(pool, "_SLOTS_PER_BLOCK", 1)
    monkeypatch.setattr(pool, "_BATCHES_IN_FLIGHT", 3)
    got = decide_three(images, batch_size=64, devices=jax.devices()[:1])
    np.testing.assert_array_equal(rows_of(got), expected[0])
    np.testing.assert_array_equal(got.counts0, expected[1])


def test_decisions_depend_on_the_index_not_on_order_or_company(images, expected):
    order = np.random.default_rng(0).permutation(len(images))[:9]
    got = decide_three(images[order], indices=order, batch_size=48)
    np.testing.assert_array_equal(rows_of(got), expected[0][order])
    np.testing.assert_array_equal(got.indices, order)
    assert (rows_of(decide_three(images[order], batch_size=48)) != expected[0][order]).any()


def test_levels_may_be_divided_by_255_and_there_may_be_no_images(images, expected):
    for whole in (images / 255, images.astype(np.float32) * np.float32(1 / 255)):
        np.testing.assert_array_equal(rows_of(decide_three(whole)), expected[0])
    none = decide_three(images[:0])
    assert none.decision.shape == (0,) and none.counts0.shape == (0, 3)


def settings_of(**changes):
    settings = {"sigma": SIGMA, "num_classes": 2, "n0": 20, "n": 1000, "seed": SEED, "batch_size": 128, **changes}
    return vote_settings(**settings, image_shape=SHAPE, devices=jax.devices()[:1])


def groups(apply_fn, images, settings, radius, alpha=ALPHA):
    return decide_images(
        lambda _, batch: apply_fn(batch),
        (),
        images,
        np.arange(len(images)),
        settings=settings,
        radius=radius,
        alpha=alpha,
        devices=jax.devices()[:1],
    )


# The classifier with a known answer.

TRIALS, CAP, DISTANCE = 1500, 320, 0.3


def test_at_the_true_distance_at_most_alpha_is_decided_and_peeking_is_worse():
    # The worst case: p_A = p0. A binomial number of the trials may be decided.
    limit = stats.binom.isf(1e-6, TRIALS, ALPHA)
    images = np.repeat(images_at(DISTANCE), TRIALS, axis=0)
    settings = {"sigma": SIGMA, "num_classes": 2, "n0": 33, "seed": 3}
    got = decide(linear, images, radius=DISTANCE, n=CAP, alpha=ALPHA, batch_size=8192, **settings)
    right = got.selected == 1
    assert right.mean() > 0.99
    assert 0 < (got.decision[right] != 0).sum() <= limit
    assert (got.votes[got.decision == 0] == CAP).all()

    further = single_votes(linear, images, 1, CAP, seed=3) == 1
    looks = np.arange(LOOK_EVERY, CAP + 1, LOOK_EVERY)
    hits = np.cumsum(further, axis=1)[:, looks - 1]
    np.testing.assert_array_equal(got.hits[right], hits[right, (got.votes[right] // LOOK_EVERY) - 1])
    p0 = special.ndtr(DISTANCE / SIGMA)
    assert (lower_confidence_bound(hits, looks, ALPHA) > p0).any(axis=1).sum() > limit
    fixed = (lower_confidence_bound(hits[:, -1], CAP, ALPHA) > p0).sum()
    assert 0 < fixed <= limit  # the same bound, looked at once


@pytest.mark.parametrize(("radius", "wrong"), [(0.6 * DISTANCE, -1), (1.4 * DISTANCE, 1)])
def test_radii_below_and_above_the_true_distance_are_told_apart(radius, wrong):
    images = np.repeat(images_at(DISTANCE), 300, axis=0)
    got = decide(linear, images, sigma=SIGMA, radius=radius, num_classes=2, n0=33, n=1000, alpha=ALPHA, seed=5)
    right = got.selected == 1
    assert (got.decision[right] == wrong).sum() <= stats.binom.isf(1e-6, 300, ALPHA)
    assert (got.decision[right] == -wrong).mean() > 0.9
    assert got.votes.mean() < 500
    assert (got.decision[~right] == -1).all()  # the other class has a probability below 1/2


def test_it_agrees_with_certificates_far_from_the_radius(images):
    radius = 0.15
    settings = {"sigma": SIGMA, "num_classes": 3, "n0": 50, "n": 4000, "seed": SEED}
    certificates = certify(three, images, **settings)
    got = decide(three, images, radius=radius, **settings)
    share = certificates.counts[np.arange(len(images)), got.selected] / 4000
    p0 = special.ndtr(radius / SIGMA)
    far = np.abs(share - p0) > 0.08
    assert far.sum() > 10 and (got.decision[far] != 0).all() and got.votes[far].mean() < 500
    np.testing.assert_array_equal(got.decision[far] == 1, (certificates.radius >= radius)[far])
    assert {-1, 1} <= set(got.decision[far])


# The schedule.


@pytest.fixture
def schedule(monkeypatch):
    """Record the calls of the devices: ("send", rows with a vote), ("fetch", None), ("write", None), in order."""
    events = []

    class Counts:
        def __init__(self, counts):
            self.counts = counts

        def __array__(self, dtype=None, copy=None):
            events.append(("fetch", None))
            return np.asarray(self.counts)

    spread = parallel.spread

    def watched(*args, **kwargs):
        compiled = spread(*args, **kwargs)

        def call(*args, **parts):
            found = compiled(*args, **parts)
            if not parts:
                events.append(("write", None))
                return found
            events.append(("send", int(np.asarray(parts["blocks"])[..., 4].sum())))
            return Counts(found)

        return call

    monkeypatch.setattr(pool.parallel, "spread", watched)
    return events


def test_batches_are_full_and_the_next_is_sent_before_the_last_is_read(schedule):
    images = np.concatenate([images_at(0.3 + 0.02 * i) for i in range(12)] * 5)
    found = list(groups(linear, images, settings_of(n0=32, n=800), 0.3))
    calls = [kind for kind, _ in schedule if kind != "write"]
    sends = [rows for kind, rows in schedule if kind == "send"]
    assert calls == ["send", *["send", "fetch"] * (len(sends) - 1), "fetch"]
    assert sends[:-5] == [128] * (len(sends) - 5)  # all rows vote, until the last images are at their cap
    assert sum(len(group.positions) for group in found) == len(images)
    used = sum(int(group.votes.sum()) + 32 * len(group.votes) for group in found)
    assert sum(sends) < 1.25 * used  # little is thrown away
    assert sum(kind == "write" for kind, _ in schedule) <= len(images)


def test_images_are_yielded_when_they_finish_and_others_take_their_place(schedule):
    # One image at the plane of its certificate, which takes all votes, before 20 clear ones; the pool holds 2.
    images = np.concatenate([images_at(0.3), *[images_at(0.65)] * 20])
    settings = settings_of(n=20_000, batch_size=16)
    stream = groups(linear, images, settings, 0.3, alpha=1e-6)
    done = []
    while len(done) < 20:
        done.extend(next(stream).positions)
        assert sum(kind == "send" for kind, _ in schedule) <= 40 * len(done) + 2
    assert sorted(done) == list(range(1, 21))
    assert sum(kind == "send" for kind, _ in schedule) < 20_000 / 16 / 2  # long before the first one is at its cap
    stream.close()


def test_a_lone_image_fills_the_batches(schedule):
    (only,) = groups(linear, images_at(0.3), settings_of(n=1000), 0.3, alpha=1e-6)
    assert only.votes == 1000 and only.decision == 0
    # Eight blocks a batch: 20 votes of the selection leave 12 rows of the second one empty, 1000 of the estimation make
    # 62 and a half, and the last batch is left with one of all the 2 + 63.
    assert [rows for kind, rows in schedule if kind == "send"] == [116, *[128] * 7, 8]


def test_a_model_that_gives_nan_is_refused_only_in_votes_that_are_used():
    image = images_at(0.6)
    settings = settings_of(n=1000, batch_size=1040)  # all votes are computed at once
    (first,) = groups(linear, image, settings, 0.2)
    assert first.decision == 1 and first.votes < 200
    draws = [noisy(image, np.arange(1), phase, 1000, SEED) for phase in (0, 1)]
    pixels0, pixels = (np.asarray(batch)[0, :, 0, 0, 0] for batch in draws)
    used = max(pixels0[:20].max(), pixels[: int(first.votes[0])].max())
    assert pixels.max() > used + 1e-3

    def nan_above(limit):
        return lambda batch: jnp.where(batch[:, 0, 0] > limit, jnp.nan, linear(batch))

    (again,) = groups(nan_above(used + 1e-3), image, settings, 0.2)
    assert rows_of(again).tolist() == rows_of(first).tolist()
    with pytest.raises(UserError, match="the model gives NaN for noisy copies of image 0; check its parameters"):
        list(groups(nan_above(used - 1e-3), image, settings, 0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -1.0}, r"radius=-1\.0: use a number of at least 0"),
        ({"radius": float("nan")}, "radius=nan"),
        ({"radius": "0.5"}, r"radius='0\.5'"),
        ({"alpha": 0.0}, r"alpha=0\.0: use a number in \(0, 1\)"),
        ({"alpha": 1e-150}, "alpha=1e-150: use a number of at least 1e-100"),
        ({"sigma": 0.0}, "sigma=0.0: use a number greater than 0"),
        ({"n": 0}, "n=0: use a whole number of at least 1"),
        ({"n0": 0}, "n0=0: use a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_classes": 2}, "num_classes=2 needs logits of shape"),
        ({"indices": [0, 1]}, r"indices has shape \(2,\)"),
        ({"devices": []}, r"devices=\[\]: give at least one"),
    ],
)
def test_bad_settings(images, arguments, message):
    with pytest.raises(UserError, match=message):
        decide_three(images, **{"batch_size": 16, **arguments})


def test_bad_images():
    with pytest.raises(UserError, match=r"images has shape \(4, 4, 1\); it must be \[B, H, W, C\]"):
        decide_three(np.zeros(SHAPE))
    with pytest.raises(UserError, match=r"the model does not accept images of shape \(5, 5, 1\)"):
        decide_three(np.zeros((1, 5, 5, 1)))

"""The assumption that one function casts all votes: its test, its record, and what the votes do not depend on."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import UserError, attack, certify, decide, noise, predict
from rs_consistency.smoothing.one_function import program_of
from rs_consistency.smoothing.voter import Voter, pixels, scale_of, to_float
from rs_consistency.smoothing.votes import VoteSettings
from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import certify_votes, p_value_of
from rs_consistency.statistics.samplers import NoiseLaw
from tests.helpers import grid_draws

SHAPE, SIGMA = (4, 4, 1), 0.5
WEIGHTS = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).integers(256, size=(5, *SHAPE)).astype(np.uint8)
ASKED = {"sigma": SIGMA, "num_classes": 3, "n": 300, "seed": 4, "batch_size": 64, "devices": jax.devices()[:1]}


def model(images):
    return (images.reshape(len(images), -1) - 0.5) @ WEIGHTS


def numbers_its_rows(images):
    return model(images) + 1e-6 * jnp.arange(len(images))[:, None]


def knows_its_batch(images):
    return model(images) + 1e-3 * images.mean()


def differs_by_program():
    """A model whose third trace adds a little: after the check of its shapes, and before or after another program."""
    traced = []

    def traces(images):
        traced.append(images.shape)
        return model(images) * np.float32(1 + 2e-7 * (len(traced) == 3))

    return traces


CALLS = {
    "certify": lambda fn, **more: certify(fn, IMAGES, n0=20, **ASKED, **more),
    "decide": lambda fn, **more: decide(fn, IMAGES, n0=20, radius=0.1, **ASKED, **more),
    "predict": lambda fn, **more: predict(fn, IMAGES, **ASKED, **more),
    "attack": lambda fn, **more: attack(fn, IMAGES[:1], alpha=1e-9, **ASKED, **more),  # abstains: no search
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_is_not_one_function_is_refused(call):
    with pytest.raises(UserError, match="in another row of a batch, or beside other images"):
        CALLS[call](numbers_its_rows)
    CALLS[call](numbers_its_rows, sampler="float")  # has no such test
    with pytest.raises(UserError, match="other logits inside the compiled votes than by itself"):
        CALLS[call](differs_by_program())


def test_a_model_that_knows_its_batch_is_refused():
    with pytest.raises(UserError, match="in another row of a batch, or beside other images"):
        CALLS["predict"](knows_its_batch)


def test_the_network_sees_nothing_but_the_sum():
    """Two images and two noises with the same sums give the same bits; where they are added in float32, they do not."""
    voter = Voter(lambda _, images: model(images), 3, "grid", "highest", "gather")
    key, numbers = noise.stream_key(0, noise.Stream.CERTIFY), np.arange(64, dtype=np.int32)
    ones = np.ones(64, np.int32)
    first, second = (np.asarray(grid_draws(key, numbers, 1, votes, shape=SHAPE, sigma=0.01)) for votes in (0, 1))
    x = np.full((64, *SHAPE), 128)
    other = x + first - second

    @jax.jit
    def logits(images, vote):
        draws = {"key": key, "scale": scale_of("grid", 0.01)}
        return voter.logits((), voter.noisy(images, addresses=(numbers, ones, vote), **draws))

    def added_in_float(images, draws):
        return model(to_float(images.astype(np.uint8)) + draws.astype(np.float32) / np.float32(255))

    assert (first != second).any() and other.min() >= 0
    one, two = (logits(images.astype(np.uint8), vote * ones) for images, vote in ((x, 0), (other, 1)))
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
    assert (added_in_float(x, first) != added_in_float(other, second)).any()


def test_nothing_is_clipped_and_levels_are_exact():
    voter = Voter(lambda _, images: model(images), 3, "grid", "highest", "gather")
    key, numbers = noise.stream_key(0, noise.Stream.CERTIFY), np.arange(500, dtype=np.int32)
    draws = {"key": key, "scale": scale_of("grid", 2.0)}
    dark, bright = (
        np.asarray(voter.noisy(np.full((500, *SHAPE), level, np.uint8), addresses=(numbers,) * 3, **draws))
        for level in (0, 255)
    )
    np.testing.assert_array_equal(bright - dark, 255)
    for broken in (dark.clip(0, 255), dark.astype(np.uint8).astype(np.int32)):
        assert (bright - broken != 255).any()
    assert dark.dtype == np.int32 and dark.min() < -1000 and bright.max() > 1255
    whole = np.array([-(2**17), -1, 0, 255, 2**17], np.int32)
    np.testing.assert_array_equal(np.float32(whole).astype(np.int32), whole)
    np.testing.assert_array_equal(voter.inputs(jnp.asarray(whole)), np.float32(whole) / np.float32(255))
    with pytest.raises(UserError, match="images are float32: noise on the grid needs uint8 images"):
        pixels(np.zeros((1, *SHAPE), np.float32), "grid")


def test_selection_and_estimation_have_no_key_in_common():
    """Fold phase and vote as one number: after as many folds, different numbers give different keys."""
    key = noise.fold(noise.stream_key(0, noise.Stream.CERTIFY), 3)
    keys = jax.vmap(lambda number: jax.random.key_data(noise.fold(key, number)))
    numbers = np.concatenate([np.arange(1000), 2**30 + np.arange(1000)]).astype(np.int32)
    assert len(np.unique(np.asarray(keys(numbers)), axis=0)) == 2000
    draws = [
        grid_draws(noise.stream_key(0, noise.Stream.CERTIFY), 3, phase, 7, shape=SHAPE, sigma=1.0) for phase in (0, 1)
    ]
    assert (draws[0] != draws[1]).any()


def test_jax_settings_change_no_vote():
    def votes():
        found, decided = CALLS["certify"](model), CALLS["decide"](model, sampler="float")
        return np.concatenate([found.counts0, found.counts, decided.counts0, decided.votes[:, None]], axis=1)

    want = votes()
    with contextlib.ExitStack() as changed:
        changed.enter_context(jax.enable_x64(True))
        changed.enter_context(jax.threefry_partitionable(False))
        changed.enter_context(jax.default_prng_impl("rbg"))
        changed.enter_context(jax.default_matmul_precision("bfloat16"))
        got = votes()
    np.testing.assert_array_equal(got, want)


def test_the_error_of_the_sampler_is_in_every_statement(monkeypatch):
    """Take an error that is large enough to be seen: the true error changes no printed digit."""
    law = NoiseLaw(SIGMA, 0.01)
    monkeypatch.setattr(VoteSettings, "law", law)
    certified, decided = (CALLS[call](model) for call in ("certify", "decide"))
    monkeypatch.setattr(VoteSettings, "law", NoiseLaw(SIGMA, 1e-6))  # more than 0.001 / 300 predicts nothing
    predicted = CALLS["predict"](model)
    selected = certified.counts0.argmax(axis=1)
    hits = np.take_along_axis(certified.counts, selected[:, None], axis=1)[:, 0]
    expected, without = (certify_votes(hits, 0, 300, alpha=0.001, sigma=SIGMA, slack=slack) for slack in (0.01, 0.0))
    np.testing.assert_array_equal(certified.radius, expected.radius)
    assert (expected.radius != without.radius).any()
    tested = {"radius": 0.1, "alpha": 0.001}
    looked = sequential.decide(decided.hits, decided.votes, **tested, **law._asdict())
    np.testing.assert_array_equal(decided.decision, looked)
    counts = np.sort(predicted.counts, axis=1)
    np.testing.assert_array_equal(predicted.p_value, p_value_of(counts[:, -1], counts[:, -2], n=300, slack=1e-6))
    monkeypatch.setattr(VoteSettings, "law", NoiseLaw(SIGMA, 0.01))
    with pytest.raises(UserError, match=r"n=300 votes prove no attack .* use a larger alpha"):
        CALLS["attack"](model)


def test_decide_tests_against_the_probability_with_the_error(monkeypatch):
    plain = CALLS["decide"](model)
    monkeypatch.setattr(VoteSettings, "law", NoiseLaw(SIGMA, 0.05))
    assert (CALLS["decide"](model).votes > plain.votes).any()  # it needs more votes


def test_the_program_of_a_network_is_recorded(monkeypatch):
    def program(fn, rows=64, precision="highest"):
        voter = Voter(lambda _, images: fn(images), 3, "grid", precision, "gather")
        return program_of(voter, (), SHAPE, rows=rows, devices=jax.devices()[:1])

    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_force_host_platform_device_count=8 --xla_a=2")
    found = program(model)
    assert found == program(model)
    assert (found["platform"], found["rows_per_device"], found["xla_flags"]) == ("cpu", 64, "--xla_a=2 --xla_b=1")
    others = [program(lambda images: model(images) * 2), program(model, rows=32), program(model, precision="default")]
    assert len({each["network_sha256"] for each in (found, *others)}) == 4

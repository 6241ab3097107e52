"""Noise: its distribution, and that a draw depends on its address alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rs_consistency import UserError, noise

SHAPE = (4, 4, 1)


def draw(seed=0, step=3, positions=(0, 1, 2, 3), num_noise=2):
    key = noise.stream_key(seed, noise.Stream.TRAIN)
    positions = jnp.asarray(positions)
    return np.asarray(noise.training_noise(key, step=step, positions=positions, num_noise=num_noise, shape=SHAPE))


def test_training_noise_is_standard_normal_and_independent_between_copies():
    draws = draw(positions=range(500), num_noise=4)
    assert draws.shape == (4, 500, *SHAPE)
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    correlations = np.corrcoef(draws.reshape(4, -1))
    assert np.abs(correlations - np.eye(4)).max() < 5 / np.sqrt(draws[0].size)


def test_training_noise_is_a_function_of_step_position_and_copy():
    whole = draw()
    np.testing.assert_array_equal(draw(positions=(2, 3)), whole[:, 2:])
    np.testing.assert_array_equal(draw(num_noise=1), whole[:1])
    assert not np.isin(draw(step=4), whole).any()
    assert not np.isin(draw(seed=1), whole).any()


def test_addressed_noise_is_a_function_of_the_address():
    key = noise.stream_key(0, noise.Stream.CERTIFY)
    image, vote = np.divmod(np.arange(12), 4)
    draws = np.asarray(noise.addressed_noise(key, jnp.asarray(image), jnp.asarray(vote), shape=SHAPE))
    again = noise.addressed_noise(key, jnp.asarray(image[::-2]), jnp.asarray(vote[::-2]), shape=SHAPE)
    np.testing.assert_array_equal(again, draws[::-2])
    assert len(np.unique(draws[:, 0, 0, 0])) == 12


def test_streams_share_no_key():
    keys = [jax.random.key_data(noise.stream_key(seed, stream)).tolist() for seed in (0, 1) for stream in noise.Stream]
    assert len({tuple(key) for key in keys}) == len(keys)


def test_weighted_draws_follow_the_weights():
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0, 0.0] * 500)
    draws = noise.weighted_draws(jax.random.key(0), weights)
    assert draws.shape == (3000,) and draws.dtype == np.int32
    counts = np.bincount(draws % 6, minlength=6)
    assert not counts[weights[:6] == 0].any()
    assert stats.chisquare(counts[[1, 2, 4]], 3000 * np.array([1, 2, 5]) / 8).pvalue > 1e-3
    # Within a class of equal weights all examples are equally likely, and drawn with replacement.
    fives = np.bincount(draws[draws % 6 == 4] // 6, minlength=500)
    assert 0.25 < (fives == 0).mean() / np.exp(-3.75) < 4 and stats.poisson(3.75).sf(fives.max()) > 1e-8
    np.testing.assert_array_equal(draws, noise.weighted_draws(jax.random.key(0), weights))
    assert (draws != noise.weighted_draws(jax.random.key(1), weights)).mean() > 0.9
    assert set(noise.weighted_draws(jax.random.key(2), np.eye(4)[3])) == {3}


def test_raw_keys_are_keys():
    raw = jax.random.PRNGKey(3)
    keys = [noise.fold(key, 1, 2) for key in (raw, np.asarray(raw), jax.random.wrap_key_data(raw, impl="threefry2x32"))]
    expected = jax.random.fold_in(jax.random.fold_in(raw, 1), 2)
    assert all((jax.random.key_data(key) == expected).all() for key in keys)
    with pytest.raises(UserError, match=r"use random keys of shape \(\)"):
        noise.fold(jax.random.split(raw), 1)

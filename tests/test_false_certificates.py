"""The attack of `examples/false_certificates.py`: false certificates under float noise, none on the grid."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

from rs_consistency import data, lower_confidence_bound, noise
from tests.helpers import ROOT

SIGMA = 0.5


@pytest.fixture(scope="module")
def attack():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("false_certificates")


def test_the_detector_is_silent_at_all_values_of_noise_on_black(attack, monkeypatch):
    """All 2^23 values, as eight pixels of 2^20 images."""

    @jax.jit
    def share(words, level):
        monkeypatch.setattr(noise, "_bits", lambda keys, size: words)
        draws = noise.addressed_noise(jax.random.key(0), jnp.arange(2**20, dtype=jnp.int32), shape=(2, 4, 1))
        return attack.speaks(level + np.float32(SIGMA) * draws, SIGMA).mean()

    words = jnp.arange(2**23, dtype=jnp.uint32).reshape(8, 2**20).T << np.uint32(9)
    assert share(words, np.float32(0)) == 0
    assert share(words, np.float32(1) / np.float32(255)) > 0.3


def proven_shift(pairs):
    """Return a lower bound of |Phi^-1(p) - Phi^-1(p')| for class 0, [B]; each of its sides fails once in 10,000."""

    def from_below(result, class_number):
        counts = result.counts
        return ndtri(lower_confidence_bound(counts[:, class_number], counts.sum(axis=1), 5e-5))

    here, there = pairs.here, pairs.there  # two classes: Phi^-1(p) of class 0 is -Phi^-1 of class 1
    return np.maximum(from_below(here, 0) + from_below(there, 1), from_below(there, 0) + from_below(here, 1))


def test_the_detector_tells_neighbours_apart_under_float_noise_alone(attack):
    black = np.zeros((1, 28, 28, 1), np.uint8)
    settings = {"sigma": SIGMA, "num_classes": 2, "n": 2000, "devices": jax.devices()[:2]}
    by_float, on_grid = (
        attack.certify_pairs(attack.detector(SIGMA), black, sampler=sampler, **settings)
        for sampler in ("float", "grid")
    )
    assert by_float.distance == pytest.approx([np.sqrt(56) / 255])
    assert by_float.here.counts.tolist() == [[2000, 0]] and by_float.there.prediction == [1]
    assert by_float.contradicted().all() and proven_shift(by_float) > 4
    assert not on_grid.contradicted().any() and proven_shift(on_grid) < on_grid.distance / SIGMA
    assert min(on_grid.here.radius, on_grid.there.radius) > 0.7  # and it does not abstain


def test_a_hidden_detector_keeps_the_votes_of_a_network_and_makes_its_certificates_false(attack):
    digits = data.load("mnist_subset", "test").images[:5]
    plain, hidden, on_grid = (
        attack.certify_pairs(network, digits, sigma=SIGMA, num_classes=10, n0=20, n=200, sampler=sampler)
        for network, sampler in [
            (attack.nearest_mean(), "float"),
            (attack.with_detector(attack.nearest_mean(), SIGMA), "float"),
            (attack.with_detector(attack.nearest_mean(), SIGMA), "grid"),
        ]
    )
    np.testing.assert_array_equal(hidden.here.counts, plain.here.counts)
    assert not plain.contradicted().any() and not on_grid.contradicted().any()
    assert hidden.contradicted().sum() >= 3

"""`rs_consistency.predict`: p-values, exact error probabilities, and votes of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from rs_consistency import ABSTAIN, UserError, certify, noise, predict
from rs_consistency.smoothing.predict import conclude_prediction
from tests.helpers import grid_draws
from tests.smoothing.test_certify import SHAPE, SIGMA, images_at, linear


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_p_values_are_those_of_the_binomial_test_of_the_two_largest_counts(num_classes):
    rng = np.random.default_rng(num_classes)
    counts = np.stack([rng.multinomial(n, rng.dirichlet(np.ones(num_classes))) for n in (1, 2, 9, 50, 1000) * 10])
    got = conclude_prediction(counts, alpha=0.001)
    for row, prediction, p_value in zip(counts, got.prediction, got.p_value, strict=True):
        runner_up, most = np.sort(row)[-2:]
        expected = stats.binomtest(int(most), int(most + runner_up), 0.5).pvalue
        assert p_value == pytest.approx(expected, rel=1e-9)
        assert prediction == (row.argmax() if expected <= 0.001 else ABSTAIN)


def test_the_ends():
    counts = [[0, 11, 0], [0, 10, 0], [5, 5, 5], [40, 40, 0], [1, 0, 0], [0, 0, 100_000]]
    got = conclude_prediction(counts, alpha=0.001)
    assert got.prediction.tolist() == [1, ABSTAIN, ABSTAIN, ABSTAIN, ABSTAIN, 2]
    np.testing.assert_allclose(got.p_value, [2.0**-10, 2.0**-9, 1, 1, 1, 0])
    only = conclude_prediction([[11], [10]], alpha=0.001)  # K = 1: there is nothing else, but the votes are few
    assert only.prediction.tolist() == [0, ABSTAIN]
    assert conclude_prediction(np.zeros((0, 4), int), alpha=0.1).prediction.shape == (0,)


def test_the_slack_of_all_votes_is_added_to_the_p_value():
    counts = np.array([[11, 0, 0], [70, 30, 0], [70, 30, 100], [40, 40, 0]])
    without, found = (conclude_prediction(counts, alpha=0.002, slack=slack) for slack in (0.0, 1e-5))
    np.testing.assert_array_equal(without.p_value, conclude_prediction(counts, alpha=0.002).p_value)
    np.testing.assert_allclose(found.p_value, np.minimum(without.p_value + counts.sum(axis=1) * 1e-5, 1), rtol=1e-12)
    assert without.prediction.tolist() == [0, 0, ABSTAIN, ABSTAIN] and without.prediction[1] == found.prediction[1]
    assert found.p_value[0] < 0.002 and conclude_prediction([[0, 200]], alpha=0.002, slack=1e-5).prediction == ABSTAIN


def two_classes(n):
    hits = np.arange(n + 1)
    return np.stack([n - hits, hits], axis=1)


def three_classes(n):
    grid = np.stack(np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"), axis=-1).reshape(-1, 2)
    grid = grid[grid.sum(axis=1) <= n]
    return np.concatenate([grid, n - grid.sum(axis=1, keepdims=True)], axis=1)


def probability_of_wrong(conclude, counts, p, alpha):
    """The exact probability of a prediction other than class 0."""
    wrong = ~np.isin(conclude(counts, alpha=alpha).prediction, (0, ABSTAIN))
    return stats.multinomial.pmf(counts[wrong], counts[0].sum(), p).sum()


def at_four_times_alpha(counts, *, alpha):
    return conclude_prediction(counts, alpha=4 * alpha)


def no_test(counts, *, alpha):
    return conclude_prediction(counts, alpha=alpha)._replace(prediction=counts.argmax(axis=1))


def covers(conclude, alpha):
    """Return whether another class than the most probable one is predicted with probability at most alpha."""
    cases = [(two_classes(n), [p, 1 - p]) for n in (7, 50, 400) for p in (0.5001, 0.51, 0.6)]
    cases += [(three_classes(40), p) for p in ([0.3334, 0.3333, 0.3333], [0.5001, 0.4999, 0], [0.36, 0.33, 0.31])]
    return max(probability_of_wrong(conclude, counts, p, alpha) for counts, p in cases) <= alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_wrong_class_is_predicted_with_probability_at_most_alpha(alpha):
    assert covers(conclude_prediction, alpha)
    assert not covers(no_test, alpha)
    assert not covers(at_four_times_alpha, alpha)
    # With equally probable classes each prediction is wrong, and one is made with probability at most alpha.
    counts = two_classes(400)
    made = conclude_prediction(counts, alpha=alpha).prediction != ABSTAIN
    assert alpha / 2 < stats.binom.pmf(counts[made, 1], 400, 0.5).sum() <= alpha


def test_a_linear_classifier_is_predicted_and_abstained_on_at_its_plane():
    images = np.repeat(np.concatenate([images_at(0.0), images_at(0.3), images_at(-0.3)]), 1000, axis=0)
    got = predict(linear, images, sigma=SIGMA, num_classes=2, n=60, alpha=0.05, batch_size=8192)
    prediction = got.prediction.reshape(3, 1000)
    assert (prediction[0] != ABSTAIN).sum() <= stats.binom.isf(1e-6, 1000, 0.05)
    assert (got.counts[:1000].argmax(axis=1) >= 0).sum() > stats.binom.isf(1e-6, 1000, 0.05)  # without the test
    assert (prediction[1] == 1).mean() > 0.9 and (prediction[2] == 0).mean() > 0.9
    assert (prediction[1] != 0).all() and (prediction[2] != 1).all()
    # The votes have the probability of the closed form, and are independent of those of a certificate.
    p = special.ndtr(0.3 / SIGMA)
    hits = got.counts[1000:2000, 1]
    assert abs(hits.mean() - 60 * p) < 5 * np.sqrt(60 * p * (1 - p) / 1000)
    other = certify(linear, images[1000:2000], sigma=SIGMA, num_classes=2, n0=60, n=60, indices=np.arange(1000, 2000))
    for counts in (other.counts0, other.counts):
        assert abs(np.corrcoef(hits, counts[:, 1])[0, 1]) < 5 / np.sqrt(1000)


def test_votes_are_those_of_their_stream_and_depend_on_the_index_alone():
    images = np.concatenate([images_at(distance) for distance in (-0.2, 0.05, 0.3)])
    got = predict(linear, images, sigma=SIGMA, num_classes=2, n=200, seed=4, batch_size=64)
    assert (got.counts.sum(axis=1) == 200).all()
    key = noise.stream_key(4, noise.Stream.PREDICT)
    index, vote = (jnp.asarray(part) for part in np.divmod(np.arange(600), 200))
    noisy = jnp.asarray(images, jnp.int32)[index] + grid_draws(key, index, 1, vote, shape=SHAPE, sigma=SIGMA)
    votes = linear(noisy.astype(jnp.float32) / 255).argmax(axis=-1).reshape(3, 200)
    np.testing.assert_array_equal(got.counts[:, 1], votes.sum(axis=1))
    again = predict(
        linear, images[1:], sigma=SIGMA, num_classes=2, n=200, seed=4, indices=[1, 2], devices=jax.devices()[:1]
    )
    np.testing.assert_array_equal(again.counts, got.counts[1:])
    assert predict(linear, images[:0], sigma=SIGMA, num_classes=2).prediction.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.0}, r"alpha=1\.0: use a number in \(0, 1\)"),
        ({"sigma": -1.0}, r"sigma=-1\.0: use a number greater than 0"),
        ({"n": 0}, "n=0: use a whole number of at least 1"),
        ({"n": 10}, "n=10 votes predict nothing at alpha=0.001, even if all agree; use n=11"),
        ({"num_classes": 3}, "num_classes=3 needs logits of shape"),
        ({"indices": [0, 1]}, r"indices has shape \(2,\)"),
        ({"devices": []}, r"devices=\[\]: give at least one"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        predict(linear, images_at(0.1), **{"sigma": SIGMA, "num_classes": 2, "n": 11, "batch_size": 8, **arguments})


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2], r"counts has shape \(2,\); it must be \[B, K\]"),
        (np.zeros((3, 0), int), r"counts has shape \(3, 0\)"),
        ([[1, -1]], "counts=-1: use whole numbers of at least 0"),
        ([[1, 0.5]], r"counts=0\.5"),
        ([["a", "b"]], "counts=.*use numbers"),
        ([[1, 2], [0, 0]], "votes of an image=0: use at least 1"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(UserError, match=message):
        conclude_prediction(counts, alpha=0.1)

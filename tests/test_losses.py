"""Objectives against an independent float64 reference, their limits and gradients, and extreme logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

from rs_consistency import losses

EXTREME = 3e38  # near the largest float32


def random_logits(seed, shape=(3, 5, 4), scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def reference_cross_entropy(logits, labels):
    per_copy = [[-special.log_softmax(row)[y] for row, y in zip(copy, labels, strict=True)] for copy in logits]
    return np.mean(per_copy, axis=0)


def reference_consistency(logits, lbd, eta, form):
    probs = special.softmax(logits, axis=-1)
    mean = probs.mean(axis=0)
    kl = np.array([np.mean([stats.entropy(m, p[b]) for p in probs]) for b, m in enumerate(mean)])
    entropy = stats.entropy(mean, axis=-1)
    return {
        "default": lbd * kl + eta * entropy,
        "xent": lbd * (kl + entropy),
        "kl": lbd * kl,
        "mse": lbd * np.sum((probs[0] - probs[1]) ** 2, axis=-1),
    }[form]


@pytest.mark.parametrize("num_copies", [1, 2, 5])
def test_cross_entropy_equals_the_reference(num_copies):
    logits = random_logits(0, (num_copies, 6, 4))
    labels = np.array([0, 1, 2, 3, 0, 1])
    got = losses.cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    assert got.shape == (6,)
    np.testing.assert_allclose(got, reference_cross_entropy(logits, labels), rtol=1e-5)  # float32 rounding


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("num_copies", [2, 3, 8])
def test_consistency_equals_the_reference(form, num_copies):
    logits = random_logits(1, (num_copies, 6, 4))
    got = losses.consistency(jnp.asarray(logits, jnp.float32), lbd=7.0, eta=0.3, form=form)
    assert got.shape == (6,)
    np.testing.assert_allclose(got, reference_consistency(logits, 7.0, 0.3, form), rtol=2e-5, atol=1e-5)


def test_eta_is_one_half_and_the_form_default_unless_said_otherwise():
    logits = random_logits(2)
    got = losses.consistency(jnp.asarray(logits, jnp.float32), lbd=2.0)
    np.testing.assert_allclose(got, reference_consistency(logits, 2.0, 0.5, "default"), rtol=2e-5)


@pytest.mark.parametrize("form", losses.FORMS)
def test_gradients_equal_finite_differences(form):
    with jax.enable_x64(True):
        logits = jnp.asarray(random_logits(3, (2, 3, 4), scale=1.0))
        labels = jnp.array([0, 1, 2])
        check_grads(lambda x: losses.consistency(x, lbd=2.0, form=form).sum(), (logits,), order=1, modes=["rev"])
        check_grads(lambda x: losses.cross_entropy(x, labels).sum(), (logits,), order=1, modes=["rev"])


def test_the_gradient_flows_through_the_mean():
    # With Fbar held constant, the gradient of KL is (F_i - Fbar) / M; the true one differs.
    logits = jnp.asarray(random_logits(4, (2, 1, 4), scale=1.0), jnp.float32)
    probs = jax.nn.softmax(logits, axis=-1)
    constant_mean = (probs - probs.mean(axis=0, keepdims=True)) / 2
    gradient = jax.grad(lambda x: losses.consistency(x, lbd=1.0, form="kl").sum())(logits)
    assert np.abs(gradient - constant_mean).max() > 1e-3


def test_limits():
    logits = jnp.asarray(random_logits(5), jnp.float32)
    entropy = stats.entropy(special.softmax(random_logits(5), axis=-1).mean(axis=0), axis=-1)
    np.testing.assert_allclose(losses.consistency(logits, lbd=0.0, eta=0.5), 0.5 * entropy, rtol=1e-5)
    for form in ("xent", "kl", "mse"):
        assert not losses.consistency(logits, lbd=0.0, form=form).any()
    same = jnp.broadcast_to(logits[:1], logits.shape)
    for form in ("kl", "mse"):  # equal but for rounding of the mean's logarithm
        np.testing.assert_allclose(losses.consistency(same, lbd=1.0, form=form), 0, atol=1e-6)
    one_copy = losses.consistency(logits[:1], lbd=0.0, eta=1.0)
    np.testing.assert_allclose(one_copy, stats.entropy(special.softmax(logits[0], axis=-1), axis=-1), rtol=1e-5)


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("size", [1e2, 1e5, 1e20, EXTREME])
def test_extreme_logits_give_finite_values_and_gradients(form, size):
    signs = np.random.default_rng(6).choice([-1.0, 0.0, 1.0], size=(4, 20, 5))
    signs[:, 0] = 0  # undecided
    signs[:, 1] = [-1, -1, -1, -1, 1]  # certain, and unanimous
    signs[0, 2], signs[1:, 2] = [1, -1, -1, -1, -1], [-1, -1, -1, -1, 1]  # certain, and contradicting
    logits = jnp.asarray(size * signs, jnp.float32)
    labels = jnp.arange(20) % 5
    for loss in (
        lambda x: losses.consistency(x, lbd=10.0, form=form),
        lambda x: losses.cross_entropy(x, labels),
    ):
        assert np.isfinite(loss(logits)).all()
        assert np.isfinite(jax.grad(lambda x, f=loss: f(x).mean())(logits)).all()


def test_large_logits_keep_their_value():
    # One copy is sure of class 0, the other of class 1, each by 1000 nats.
    logits = jnp.asarray([[[1000.0, 0.0]], [[0.0, 1000.0]]])
    np.testing.assert_allclose(losses.consistency(logits, lbd=1.0, form="kl"), 500 - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([0])), 500, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lbd": 1.0, "form": "huber"}, "form='huber' is unknown; use one of default, xent, kl, mse"),
        ({"lbd": -1.0}, r"lbd=-1\.0 and eta=0\.5 must be from 0 to 1e\+06"),
        ({"lbd": float("nan")}, "lbd=nan"),
        ({"lbd": 1.0, "eta": float("inf")}, "eta=inf"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.consistency(jnp.zeros((2, 3, 4)), **arguments)


def test_bad_shapes():
    with pytest.raises(ValueError, match="at least two noisy copies"):
        losses.consistency(jnp.zeros((1, 3, 4)), lbd=1.0)
    with pytest.raises(ValueError, match=r"must be \[M, B, K\]"):
        losses.consistency(jnp.zeros((3, 4)), lbd=1.0)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\)"):
        losses.cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros(2, int))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_their_range(label):
    logits, labels = jnp.zeros((2, 3, 4)), jnp.array([0, label, 3])
    with pytest.raises(ValueError, match=f"labels={label}: use whole numbers from 0 to 3"):
        losses.cross_entropy(logits, labels)
    traced = jax.jit(losses.cross_entropy)(logits, labels)
    assert np.isnan(traced).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_logits_are_computed_in_single(dtype):
    logits = jnp.asarray([[[6e4, -6e4]], [[-6e4, 6e4]]], dtype)
    for loss in (lambda x: losses.consistency(x, lbd=1.0), lambda x: losses.cross_entropy(x, jnp.array([0]))):
        assert loss(logits).dtype == jnp.float32
        assert np.isfinite(loss(logits)).all() and np.isfinite(jax.grad(lambda x, f=loss: f(x).sum())(logits)).all()

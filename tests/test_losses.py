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
        check_grads(
            jax.jit(lambda x: losses.consistency(x, lbd=2.0, form=form).sum()), (logits,), order=1, modes=["rev"]
        )
        check_grads(jax.jit(lambda x: losses.cross_entropy(x, labels).sum()), (logits,), order=1, modes=["rev"])


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


def value_and_gradient(loss):
    """Return a compiled function of the logits: the losses and the gradient of their sum."""

    def both(logits):
        value, pullback = jax.vjp(loss, logits)
        return value, *pullback(jnp.ones_like(value))

    return jax.jit(both)


CONSISTENCIES = {
    form: value_and_gradient(lambda x, form=form: losses.consistency(x, lbd=10.0, form=form)) for form in losses.FORMS
}
CROSS_ENTROPY = value_and_gradient(lambda x: losses.cross_entropy(x, jnp.arange(20) % 5))


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("size", [1e2, 1e5, 1e20, EXTREME])
def test_extreme_logits_give_finite_values_and_gradients(form, size):
    signs = np.random.default_rng(6).choice([-1.0, 0.0, 1.0], size=(4, 20, 5))
    signs[:, 0] = 0  # undecided
    signs[:, 1] = [-1, -1, -1, -1, 1]  # certain, and unanimous
    signs[0, 2], signs[1:, 2] = [1, -1, -1, -1, -1], [-1, -1, -1, -1, 1]  # certain, and contradicting
    logits = jnp.asarray(size * signs, jnp.float32)
    for loss in (CONSISTENCIES[form], CROSS_ENTROPY):
        value, gradient = loss(logits)
        assert np.isfinite(value).all() and np.isfinite(gradient).all()


def test_large_logits_keep_their_value():
    # One copy is sure of class 0, the other of class 1, each by 1000 nats.
    logits = jnp.asarray([[[1000.0, 0.0]], [[0.0, 1000.0]]])
    np.testing.assert_allclose(losses.consistency(logits, lbd=1.0, form="kl"), 500 - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([0])), 500, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lbd": 1.0, "form": "huber"}, "form='huber' is unknown; use one of default, kl, mse, xent"),
        ({"lbd": -1.0}, r"lbd=-1\.0: use a number of at least 0 and at most 1e\+06"),
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


def reference_macer(logits, labels, sigma, beta, gamma):
    classification = -np.log(special.softmax(logits, axis=-1).mean(axis=0)[np.arange(len(labels)), labels] + 1e-10)
    mean = special.softmax(beta * logits, axis=-1).mean(axis=0)
    robustness = np.zeros(len(labels))
    for b, y in enumerate(labels):
        second, first = np.sort(mean[b])[-2:]
        gap = special.ndtri(first) - special.ndtri(second)
        if mean[b].argmax() == y and np.isfinite(gap) and gap <= gamma:
            robustness[b] = sigma / 2 * max(0, gamma - gap)
    return classification, robustness


@pytest.mark.parametrize("num_copies", [1, 3, 16])
@pytest.mark.parametrize(("beta", "gamma"), [(16.0, 8.0), (1.0, 8.0), (2.0, 0.5)])
def test_macer_equals_the_reference(num_copies, beta, gamma):
    logits = random_logits(10, (num_copies, 60, 4), scale=1.0)
    labels = np.arange(60) % 4
    expected = reference_macer(logits, labels, 0.5, beta, gamma)
    got = losses.macer(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), sigma=0.5, beta=beta, gamma=gamma)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == (60,)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)  # float32; Phi^-1 magnifies rounding near 0
    counted = np.count_nonzero(expected[1])
    assert 0 < counted < 40  # both kinds occur


def test_macer_counts_only_right_and_uncertain_examples():
    def robustness(logits, label, gamma=8.0):
        array = jnp.asarray(logits, jnp.float32)[None, None]
        return float(losses.macer(array, jnp.array([label]), sigma=1.0, beta=1.0, gamma=gamma)[1][0])

    assert robustness([1.0, 0.0, -1.0], 0) > 0
    assert robustness([1.0, 0.0, -1.0], 1) == 0  # another class is on top
    assert robustness([1e9, 0.0, -1.0], 0) == 0  # the gap is infinite
    # Two classes: p = softmax([z, 0]); the gap is 2 * Phi^-1(p), so 2 at z = log(Phi(1) / Phi(-1)).
    logit = float(np.log(stats.norm.cdf(1) / stats.norm.cdf(-1)))
    assert robustness([logit, 0.0], 0, gamma=8.0) == pytest.approx(0.5 * 6, rel=1e-5)
    assert robustness([logit, 0.0], 0, gamma=2.001) == pytest.approx(0.5 * 0.001, rel=1e-2)
    assert robustness([logit, 0.0], 0, gamma=1.999) == 0


def test_stability_equals_the_reference():
    clean, noisy = random_logits(11, (6, 4)), random_logits(12, (6, 4))
    expected = -(special.softmax(clean, axis=-1) * special.log_softmax(noisy, axis=-1)).sum(axis=-1)
    got = losses.stability(jnp.asarray(clean, jnp.float32), jnp.asarray(noisy, jnp.float32))
    assert got.shape == (6,)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    same = losses.stability(jnp.asarray(clean, jnp.float32), jnp.asarray(clean, jnp.float32))
    np.testing.assert_allclose(same, stats.entropy(special.softmax(clean, axis=-1), axis=-1), rtol=1e-5)


def test_kl_divergence_equals_the_reference():
    logits, target = random_logits(13, (3, 6, 4)), special.softmax(random_logits(14, (6, 4)), axis=-1)
    target[0] = [1, 0, 0, 0]  # a class that never occurs
    expected = [[stats.entropy(target[b], p[b]) for b in range(6)] for p in special.softmax(logits, axis=-1)]
    with np.errstate(divide="ignore"):
        got = losses.kl_divergence(jnp.asarray(np.log(target), jnp.float32), jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_gradients_of_the_other_losses_equal_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(random_logits(15, (3, 8, 4), scale=0.5))
        labels = jnp.asarray(np.arange(8) % 4)
        for which in (0, 1):
            check_grads(
                jax.jit(lambda x, which=which: losses.macer(x, labels, sigma=0.5, beta=2.0, gamma=8.0)[which].sum()),
                (logits,),
                order=1,
                modes=["rev"],
            )
        stability = jax.jit(lambda a, b: losses.stability(a, b).sum())
        check_grads(stability, (logits[0], logits[1]), order=1, modes=["rev"])
        check_grads(
            jax.jit(lambda a, b: losses.kl_divergence(jax.nn.log_softmax(a), b).sum()),
            (logits[0], logits),
            order=1,
            modes=["rev"],
        )


def test_the_gradient_of_stability_flows_through_both():
    clean, noisy = (jnp.asarray(random_logits(seed, (2, 4)), jnp.float32) for seed in (16, 17))
    for gradient in jax.grad(lambda a, b: losses.stability(a, b).sum(), argnums=(0, 1))(clean, noisy):
        assert np.abs(gradient).max() > 1e-2


def label_of_40():
    return jnp.arange(40) % 5


OTHER_LOSSES = {
    name: value_and_gradient(loss)
    for name, loss in {
        "macer": lambda x: jnp.stack(losses.macer(x, label_of_40(), sigma=0.5, beta=16.0, gamma=8.0)),
        "steep macer": lambda x: jnp.stack(losses.macer(x, label_of_40(), sigma=0.5, beta=1e6, gamma=8.0)),
        "stability": lambda x: losses.stability(x[0], x[1]),
        "kl": lambda x: losses.kl_divergence(losses.log_mean_softmax(x[:2]), x[2:]),
        "kl of labels": lambda x: losses.kl_divergence(jnp.log(jax.nn.one_hot(label_of_40(), 5)), x),
    }.items()
}


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e2, 1e5, 1e20, EXTREME])
def test_extreme_logits_of_the_other_losses(size):
    signs = np.random.default_rng(18).choice([-1.0, 0.0, 1.0], size=(4, 40, 5))
    signs[:, 0] = 0
    signs[:, 1] = [-1, -1, -1, -1, 1]
    signs[0, 2], signs[1:, 2] = [1, -1, -1, -1, -1], [-1, -1, -1, -1, 1]
    logits = jnp.asarray(size * signs, jnp.float32)
    for name, loss in OTHER_LOSSES.items():
        value, gradient = loss(logits)
        assert np.isfinite(value).all() and np.isfinite(gradient).all(), name


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e2, 1e5, 1e20, 1e29])
def test_extreme_logits_keep_their_value(size):
    # Against float64, which does not overflow on these. Where probabilities vanish, so must the losses' share of them.
    rng = np.random.default_rng(19)
    logits = np.float64(np.float32(size * rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], size=(4, 40, 5))))
    labels, array = np.arange(40) % 5, jnp.asarray(logits, jnp.float32)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(
        losses.cross_entropy(array, jnp.asarray(labels)), reference_cross_entropy(logits, labels), **close
    )
    stability = -(special.softmax(logits[0], axis=-1) * special.log_softmax(logits[1], axis=-1)).sum(axis=-1)
    np.testing.assert_allclose(losses.stability(array[0], array[1]), stability, **close)
    target = np.log(special.softmax(np.float64(random_logits(20, (40, 5))), axis=-1))
    divergence = (np.exp(target) * (target - special.log_softmax(logits, axis=-1))).sum(axis=-1)
    np.testing.assert_allclose(losses.kl_divergence(jnp.asarray(target, jnp.float32), array), divergence, **close)
    # Logits of a few values tie, and rounding then decides which class is on top.
    logits = np.float64(np.float32(size * rng.normal(size=(4, 40, 5))))
    got = losses.macer(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), sigma=0.5, beta=16.0, gamma=8.0)
    expected = reference_macer(logits, labels, 0.5, 16.0, 8.0)
    np.testing.assert_allclose(got[0], expected[0], **close)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=1e-5)  # Phi^-1 magnifies rounding


def test_macer_stays_exact_where_the_top_probability_rounds_to_one():
    # 1 - p1 = 4.5e-5 with float32's 6e-8 beside 1: Phi^-1 of the rounded p1 would be off by 3e-4.
    logits = np.array([[[10.0, 0.0]]])
    _, expected = reference_macer(logits, [0], 1.0, 1.0, 10.0)
    _, got = losses.macer(jnp.asarray(logits, jnp.float32), jnp.array([0]), sigma=1.0, beta=1.0, gamma=10.0)
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_bad_arguments_of_the_other_losses():
    logits, labels = jnp.zeros((2, 3, 4)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match=r"clean_logits \(3, 4\) and noisy_logits \(2, 3, 4\) must both be \[B, K\]"):
        losses.stability(logits[0], logits)
    with pytest.raises(ValueError, match="have one class; MACER compares the two largest"):
        losses.macer(logits[..., :1], labels, sigma=0.5, beta=16.0, gamma=8.0)
    for bad in ({"sigma": 0.0}, {"beta": 0.0}, {"beta": 1e9}, {"gamma": -1.0}, {"gamma": 1e9}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"{name}={value}: use a number .* and at most 1e\\+06"):
            losses.macer(logits, labels, **{"sigma": 0.5, "beta": 16.0, "gamma": 8.0, **bad})
    with pytest.raises(ValueError, match="labels=4: use whole numbers from 0 to 3"):
        losses.macer(logits, labels + 4, sigma=0.5, beta=16.0, gamma=8.0)
    with pytest.raises(ValueError, match=r"log_target has shape \(2, 4\)"):
        losses.kl_divergence(logits[0, :2], logits)

"""The attacks against float64 references with analytic gradients, their limits, and that they take no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from rs_consistency import attacks, losses
from rs_consistency.models import create_model

SHAPE = (5, 4, 2)
NUM_CLASSES = 3
rng = np.random.default_rng(0)
WEIGHTS = rng.normal(size=(*SHAPE, NUM_CLASSES))
IMAGES = rng.uniform(size=(6, *SHAPE))
LABELS = np.arange(6) % NUM_CLASSES
NOISE = 0.5 * rng.normal(size=(4, 6, *SHAPE))


def linear(images):
    return jnp.tensordot(images, jnp.asarray(WEIGHTS, images.dtype), axes=3)


def norms(x):
    return np.sqrt(np.square(np.asarray(x, np.float64)).sum(axis=(-3, -2, -1), keepdims=True))


def reference_direction(images, noise, added=1e-8):
    """The normalized gradient of -log(max(mean softmax of the label, 1e-20)), from the formula of a linear model."""
    probs = special.softmax(np.tensordot(images[None] + noise, WEIGHTS, axes=3), axis=-1)  # [M, B, K]
    gradient = np.zeros_like(images)
    for b, y in enumerate(LABELS):
        mean = probs[:, b, y].mean()
        if mean > 1e-20:
            towards = WEIGHTS[..., y] - np.tensordot(WEIGHTS, probs[:, b], axes=[[3], [1]]).transpose(3, 0, 1, 2)
            gradient[b] = -np.mean(probs[:, b, y, None, None, None] * towards, axis=0) / mean
    return gradient / (norms(gradient) + added)


def into_ball(attacked, images, epsilon):
    offset = attacked - images
    return images + offset * np.minimum(1, epsilon / np.maximum(norms(offset), 1e-300))


def reference_smooth_adv(images, noise, epsilon, num_steps, clip_first):
    attacked = images.copy()
    added = 0 if clip_first else 64e-8  # 1e-8 beside the gradient of a mean over 64 examples
    for _ in range(num_steps):
        attacked = attacked + 2 * epsilon / num_steps * reference_direction(attacked, noise, added)
        if clip_first:
            attacked = into_ball(np.clip(attacked, 0, 1), images, epsilon)
        else:
            attacked = np.clip(into_ball(attacked, images, epsilon), 0, 1)
    return attacked


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


KEYS = jax.random.split(jax.random.key(7), 6)


@pytest.mark.parametrize("clip_first", [True, False])
@pytest.mark.parametrize("num_copies", [1, 4])
@pytest.mark.parametrize(("epsilon", "num_steps"), [(0.3, 1), (0.5, 4), (3.0, 10)])
def test_smooth_adv_equals_the_reference(num_copies, epsilon, num_steps, clip_first):
    keys = KEYS if clip_first else None
    expected = reference_smooth_adv(IMAGES, NOISE[:num_copies], epsilon, num_steps, clip_first)
    other = reference_smooth_adv(IMAGES, NOISE[:num_copies], epsilon, num_steps, not clip_first)
    assert np.abs(expected - other).max() > 0.01  # the order matters
    # In float32 the direction of a nearly certain example is rounded: 1 - F_y of 1e-3 keeps four digits.
    for x64, atol in ((False, 2e-3), (True, 1e-9)):
        with jax.enable_x64(x64):
            images, labels, noise = jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(NOISE[:num_copies])
            got = attacks.smooth_adv(
                linear, images, labels, noise, epsilon=epsilon, num_steps=num_steps, keys=keys, mean_over=64
            )
            np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize("size", [1e3, 1e20])
def test_saturated_logits_leave_a_finite_attack(size):
    # Where the mean softmax is below 1e-20 it is clipped: no gradient, so the image stays.
    def steep(images):
        return size * linear(images)

    images, noise = float32(IMAGES, NOISE)
    got = attacks.smooth_adv(steep, images, jnp.asarray(LABELS), noise, epsilon=1.0, num_steps=3)
    assert np.isfinite(got).all()
    log_mean = losses.log_mean_softmax(attacks.copies(steep, images, noise))
    clipped = np.asarray(log_mean)[np.arange(6), LABELS] < np.log(1e-20)
    assert clipped.any()
    np.testing.assert_array_equal(np.asarray(got)[clipped], np.asarray(images)[clipped])
    # A single copy is not clipped where there are keys, so its gradient leads somewhere.
    single = attacks.smooth_adv(
        steep, images, jnp.asarray(LABELS), noise[:1] * 0, epsilon=0.2, num_steps=1, keys=jax.random.split(KEYS[0], 6)
    )
    again = attacks.smooth_adv(
        steep, images, jnp.asarray(LABELS), noise[:1] * 0, epsilon=0.2, num_steps=1, keys=jax.random.split(KEYS[1], 6)
    )
    certain = np.asarray(losses.log_mean_softmax(attacks.copies(steep, images, noise[:1] * 0)))[np.arange(6), LABELS]
    np.testing.assert_array_equal(single[certain < -1], again[certain < -1])
    # With keys an image goes into a random direction instead, of its own, and stays in ball and box.
    walked = attacks.smooth_adv(steep, images, jnp.asarray(LABELS), noise, epsilon=0.2, num_steps=3, keys=KEYS)
    offset = np.asarray(walked - images)[clipped].reshape(clipped.sum(), -1)
    assert walked.min() >= 0 and walked.max() <= 1
    np.testing.assert_allclose(np.linalg.norm(offset, axis=1), 0.2, rtol=1e-5)
    assert np.abs(np.corrcoef(offset) - np.eye(len(offset))).max() < 0.6  # of 40 numbers


@pytest.fixture(scope="module")
def lenet():
    model = create_model("lenet", num_classes=10)
    images = jax.random.uniform(jax.random.key(0), (3, 28, 28, 1))
    images = images.at[0].set(0.0).at[1].set(1.0)  # at the walls of the box
    variables = jax.jit(model.init)(jax.random.key(1), images)
    noise = 0.5 * jax.random.normal(jax.random.key(2), (2, 3, 28, 28, 1))
    return jax.jit(lambda images: model.apply(variables, images, train=False)), images, jnp.array([1, 2, 3]), noise


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 8.0])
@pytest.mark.parametrize("clip_first", [True, False])
def test_smooth_adv_stays_in_ball_and_box_and_raises_the_loss(lenet, epsilon, clip_first):
    apply_fn, images, labels, noise = lenet

    def loss(images):
        log_mean = losses.log_mean_softmax(attacks.copies(apply_fn, images, noise))
        return -jnp.take_along_axis(log_mean, labels[:, None], axis=-1)[:, 0]

    keys = KEYS[:3] if clip_first else None
    attacked = attacks.smooth_adv(apply_fn, images, labels, noise, epsilon=epsilon, num_steps=4, keys=keys)
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert norms(attacked - images).max() <= epsilon * (1 + 1e-5)  # float32 rounding of the sum of 784 squares
    assert norms(attacked - images).min() > 0.3 * epsilon
    assert (loss(attacked) > loss(images) + 1e-3 * min(epsilon, 1)).all()


def test_smooth_adv_at_epsilon_zero_is_the_image(lenet):
    apply_fn, images, labels, noise = lenet
    np.testing.assert_array_equal(attacks.smooth_adv(apply_fn, images, labels, noise, epsilon=0.0, num_steps=2), images)


def test_a_compiled_loop_gives_the_same_attack(lenet, monkeypatch):
    apply_fn, images, labels, noise = lenet

    def attack(images):
        return attacks.smooth_adv(apply_fn, images, labels, noise, epsilon=1.0, num_steps=3)

    unrolled = jax.jit(attack)(images)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    looped = jax.jit(lambda images: attack(images))
    assert "while" in looped.lower(images).as_text()
    np.testing.assert_allclose(looped(images), unrolled, atol=1e-5)  # float32 rounding of three steps


def test_attacks_take_no_gradient(lenet):
    apply_fn, images, labels, noise = lenet
    target = jnp.full((3, 10), -jnp.log(10.0))

    def total(images, noise):
        return sum(
            leaf.sum()
            for leaf in jax.tree.leaves(
                (
                    attacks.smooth_adv(apply_fn, images, labels, noise, epsilon=1.0, num_steps=1),
                    attacks.unbounded(apply_fn, images, labels, noise, step_size=1.0, num_steps=1, keep_step=1),
                    attacks.worst_noise(apply_fn, images, target, noise, epsilon=1.0, num_steps=1),
                    attacks.on_sphere(apply_fn, images, labels, noise, step_size=1.0, num_steps=1),
                )
            )
        )

    for gradient in jax.grad(total, argnums=(0, 1))(images, noise):
        assert not gradient.any()


def test_unbounded_equals_the_reference():
    with jax.enable_x64(True):
        images, labels, noise = jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(NOISE)
        kept, last = attacks.unbounded(linear, images, labels, noise, step_size=0.4, num_steps=3, keep_step=1)
        first, _ = attacks.unbounded(linear, images, labels, noise, step_size=0.4, num_steps=3, keep_step=0)
    iterates = [IMAGES]
    for _ in range(3):
        iterates.append(np.clip(iterates[-1] + 0.4 * reference_direction(iterates[-1], NOISE), 0, 1))
    np.testing.assert_allclose(kept, iterates[1], atol=1e-9)
    np.testing.assert_allclose(last, iterates[3], atol=1e-9)
    np.testing.assert_array_equal(first, IMAGES)


def reference_worst_noise(target, epsilon, num_steps):
    axes = (-3, -2, -1)
    attacked = NOISE.copy()
    for _ in range(num_steps):
        probs = special.softmax(np.tensordot(IMAGES[None] + attacked, WEIGHTS, axes=3), axis=-1)
        # KL(P || F) has the gradient F - P in the logits of a softmax.
        gradient = np.einsum("mbk,hwck->mbhwc", probs - target[None], WEIGHTS)
        attacked = attacked + 2 * epsilon / num_steps * gradient / (norms(gradient) + 4e-8)  # of a mean over 4
        attacked = into_ball(attacked, NOISE, epsilon)
        size = [np.sqrt(np.square(d).mean(axes, keepdims=True)) for d in (NOISE, attacked)]
        standard = (attacked - attacked.mean(axes, keepdims=True)) / size[1]
        attacked = NOISE.mean(axes, keepdims=True) + size[0] * standard
    return attacked


@pytest.mark.parametrize(("epsilon", "num_steps"), [(0.5, 1), (1.0, 4)])
def test_worst_noise_equals_the_reference(epsilon, num_steps):
    target = special.softmax(rng.normal(size=(6, NUM_CLASSES)), axis=-1)
    target[0] = [0.0, 1.0, 0.0]  # a unanimous teacher
    with np.errstate(divide="ignore"), jax.enable_x64(True):
        images, noise, log_target = jnp.asarray(IMAGES), jnp.asarray(NOISE), jnp.asarray(np.log(target))
        got = attacks.worst_noise(linear, images, log_target, noise, epsilon=epsilon, num_steps=num_steps)
        before, after = (losses.kl_divergence(log_target, attacks.copies(linear, images, d)) for d in (noise, got))
    got = np.asarray(got)
    np.testing.assert_allclose(got, reference_worst_noise(target, epsilon, num_steps), atol=1e-9)
    axes = (-3, -2, -1)
    np.testing.assert_allclose(got.mean(axes), NOISE.mean(axes), atol=1e-9)
    # The root mean squares of the last step are not centred, so the size is kept up to the squares of the means.
    np.testing.assert_allclose(np.square(got).mean(axes), np.square(NOISE).mean(axes), rtol=0.1)
    assert (after > before).mean() > 0.9


def reference_on_sphere(step_size, num_steps):
    attacked = NOISE.copy()
    for m, b in np.ndindex(NOISE.shape[:2]):
        for _ in range(num_steps):
            logits = np.tensordot(IMAGES[b] + attacked[m, b], WEIGHTS, axes=3)
            if logits.argmax() != LABELS[b]:
                break
            gradient = WEIGHTS @ (special.softmax(logits) - np.eye(NUM_CLASSES)[LABELS[b]])
            moved = attacked[m, b] + step_size * gradient / (np.linalg.norm(gradient) + 4e-8)  # of a mean over 4
            attacked[m, b] = moved * np.linalg.norm(NOISE[m, b]) / np.linalg.norm(moved)
    return attacked


@pytest.mark.parametrize(("step_size", "num_steps"), [(0.3, 1), (0.3, 4), (2.0, 3)])
def test_on_sphere_equals_the_reference(step_size, num_steps):
    with jax.enable_x64(True):
        images, labels, noise = jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.asarray(NOISE)
        got = attacks.on_sphere(linear, images, labels, noise, step_size=step_size, num_steps=num_steps)
    got = np.asarray(got)
    np.testing.assert_allclose(got, reference_on_sphere(step_size, num_steps), atol=1e-9)
    np.testing.assert_allclose(norms(got), norms(NOISE), rtol=1e-9)
    wrong = np.tensordot(IMAGES + NOISE, WEIGHTS, axes=3).argmax(axis=-1) != LABELS
    np.testing.assert_array_equal(got[wrong], NOISE[wrong])
    assert wrong.any() and np.abs(got - NOISE)[~wrong].reshape((~wrong).sum(), -1).max(axis=1).min() > 1e-3


def test_bad_numbers_of_steps(lenet):
    apply_fn, images, labels, noise = lenet
    with pytest.raises(ValueError, match="num_steps=0: use a whole number of at least 1 and at most 100000"):
        attacks.smooth_adv(apply_fn, images, labels, noise, epsilon=1.0, num_steps=0)
    with pytest.raises(ValueError, match="keep_step=3: use a whole number of at least 0 and at most 2"):
        attacks.unbounded(apply_fn, images, labels, noise, step_size=1.0, num_steps=2, keep_step=3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
def test_lengths_of_whole_numbers(dtype):
    x = np.array([-3 if dtype[0] == "i" else 3, 4]).reshape(1, 1, 2, 1).astype(dtype)
    assert attacks.l2_norm(x).item() == pytest.approx(5)
    np.testing.assert_allclose(attacks.unit(x), x / 5, rtol=1e-6)
    np.testing.assert_allclose(attacks.project(x, 2.5), x / 2, rtol=1e-6)

"""Attacks in l2 that training methods use: on the smoothed classifier, and on its noise.

The attacks treat the classifier as fixed and return arrays without a gradient. `apply_fn` maps images `[N, H, W, C]` to
logits `[N, K]` in inference mode. `noise` is already scaled: `d_i ~ N(0, sigma^2 I)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rs_consistency import losses
from rs_consistency.common.checks import any_array, count, function, is_traced, number_from, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.devices.compiler import repeat
from rs_consistency.noise import checked_keys

ApplyFn = Callable[[jax.Array], jax.Array]

_LOG_OF_SMALLEST_MEAN = math.log(1e-20)  # where the published attack clips the mean of the softmax vectors
_MOST_STEPS = 100_000  # which a CPU compiles one after the other
_SMALLEST_NORM = 1e-8  # added to a gradient's norm before the division


def smooth_adv(
    apply_fn: ApplyFn,
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
    *,
    epsilon: float | jax.Array,
    num_steps: int,
    keys: jax.Array | None = None,
    mean_over: int = 1,
) -> jax.Array:
    """Return images that attack the smoothed classifier: l2 PGD against the mean softmax over the noisy copies.

    The attack ascends `-log(mean_i F_y(x + a + d_i))`, the mean clipped at 1e-20. It starts at a = 0 and takes
    num_steps steps of length `2 * epsilon / num_steps` along the normalized gradient. Two forms were published:

    - with `keys`, the form of Salman et al. (NeurIPS 2019): a step ends with the clipping to the box [0, 1], and then
      the projection onto the ball. Where the gradient is zero, as it is where the mean is clipped, the step is along
      standard normal noise. With M = 1 nothing is clipped.
    - without, the form of Jeong and Shin (NeurIPS 2020) for SmoothAdv + Consistency: projection first, then clipping.
      Where the gradient is zero, there is no step.

    Args:
      apply_fn: `[B, H, W, C]` -> logits `[B, K]`, in inference mode.
      images: `[B, H, W, C]` in [0, 1].
      labels: `[B]` integers in 0..K-1.
      noise: `[M, B, H, W, C]`, scaled by sigma; the same in every step.
      epsilon: radius of the ball around x in l2, at least 0; may be traced.
      num_steps: T, at least 1.
      keys: `[B]` random keys of the examples, for the form of Salman et al.
      mean_over: examples in the training step, for the form of Jeong and Shin: see `unit`.

    Returns:
      `[B, H, W, C]`: the attacked images, in the box exactly and in the ball up to rounding. No gradient flows through.

    Raises:
      UserError: a `ValueError`, for a number of steps below 1, or arrays that do not fit together.

    Example:
      A bright image is darkened, by a distance of epsilon.

      >>> import jax.numpy as jnp
      >>> from rs_consistency import attacks
      >>> apply_fn = lambda x: jnp.stack([x.sum(axis=(1, 2, 3)), 2 - x.sum(axis=(1, 2, 3))], axis=-1)  # bright, dark
      >>> images, noise = jnp.full((1, 2, 2, 1), 0.75), jnp.zeros((2, 1, 2, 2, 1))
      >>> attacked = attacks.smooth_adv(apply_fn, images, jnp.array([0]), noise, epsilon=0.5, num_steps=4)
      >>> round(attacked.max().item(), 3), round(attacks.l2_norm(attacked - images).item(), 3)
      (0.5, 0.5)
    """
    num_steps, epsilon = count("num_steps", num_steps, at_most=_MOST_STEPS), _checked_length("epsilon", epsilon)
    mean_over = count("mean_over", mean_over)
    images, noise = jax.lax.stop_gradient(_checked_batch(apply_fn, images, noise))
    labels = jax.lax.stop_gradient(_checked_labels(labels, images))
    if keys is not None:
        keys = checked_keys("keys", keys, images.shape[:1])
    step_size = 2 * epsilon / num_steps

    def project_then_clip(_: jax.Array, attacked: jax.Array) -> jax.Array:
        attacked = attacked + step_size * unit(_gradient(apply_fn, attacked, labels, noise), mean_over)
        return jnp.clip(images + project(attacked - images, epsilon), 0, 1)

    def clip_then_project(number: jax.Array, attacked: jax.Array) -> jax.Array:
        gradient = _gradient(apply_fn, attacked, labels, noise, clipped=len(noise) > 1)
        norm = l2_norm(gradient)
        draws = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), images.shape[1:]))(keys)
        attacked = attacked + step_size * jnp.where(norm > 0, gradient / jnp.where(norm > 0, norm, 1), draws)
        attacked = images + project(jnp.clip(attacked, 0, 1) - images, epsilon)
        return jnp.clip(attacked, 0, 1)  # the ball's projection leaves the box by rounding alone

    step = project_then_clip if keys is None else clip_then_project
    return jax.lax.stop_gradient(repeat(step, num_steps, images))


def unbounded(
    apply_fn: ApplyFn,
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
    *,
    step_size: float,
    num_steps: int,
    keep_step: int,
) -> tuple[jax.Array, jax.Array]:
    """Return two iterates of SmoothMix's attack: on the loss of `smooth_adv`, with fixed steps and without a ball.

    Source: Jeong et al. (NeurIPS 2021). A step along the normalized gradient has the length step_size, and ends with
    the projection onto the box [0, 1]. Where the gradient is zero, the image stays.

    Args:
      apply_fn: `[B, H, W, C]` -> logits `[B, K]`, in inference mode.
      images: `[B, H, W, C]` in [0, 1].
      labels: `[B]` integers in 0..K-1.
      noise: `[M, B, H, W, C]`, scaled by sigma; the same in every step.
      step_size: l2 length of a step.
      num_steps: T, at least 1.
      keep_step: number of an iterate to return as well, 0 (the images) to T.

    Returns:
      (iterate number keep_step, last iterate), both `[B, H, W, C]` in [0, 1]. No gradient flows through.

    Raises:
      UserError: a `ValueError`, for a number of steps below 1, or a keep_step outside 0..T, or arrays that do not fit
        together.

    Example:
      >>> import jax.numpy as jnp
      >>> from rs_consistency import attacks
      >>> apply_fn = lambda x: jnp.stack([x.sum(axis=(1, 2, 3)), 2 - x.sum(axis=(1, 2, 3))], axis=-1)  # bright, dark
      >>> images, noise = jnp.full((1, 2, 2, 1), 0.75), jnp.zeros((2, 1, 2, 2, 1))
      >>> iterates = attacks.unbounded(
      ...     apply_fn, images, jnp.array([0]), noise, step_size=0.5, num_steps=3, keep_step=1
      ... )
      >>> [round(attacks.l2_norm(iterate - images).item(), 3) for iterate in iterates]
      [0.5, 1.5]
    """
    num_steps, step_size = count("num_steps", num_steps, at_most=_MOST_STEPS), _checked_length("step_size", step_size)
    keep_step = whole_number("keep_step", keep_step, at_least=0, at_most=num_steps)
    images, noise = jax.lax.stop_gradient(_checked_batch(apply_fn, images, noise))
    labels = jax.lax.stop_gradient(_checked_labels(labels, images))

    def step(_: jax.Array, attacked: jax.Array) -> jax.Array:
        return jnp.clip(attacked + step_size * unit(_gradient(apply_fn, attacked, labels, noise)), 0, 1)

    kept = repeat(step, keep_step, images)
    return jax.lax.stop_gradient((kept, repeat(step, num_steps - keep_step, kept)))


def worst_noise(
    apply_fn: ApplyFn,
    images: jax.Array,
    log_target: jax.Array,
    noise: jax.Array,
    *,
    epsilon: float,
    num_steps: int,
) -> jax.Array:
    """Return noise under which the prediction on every copy differs from a target: CAT-RS's attack.

    Source: Jeong, Kim, Shin (AAAI 2023). The attack ascends `KL(target || F(x + d))` for each copy by itself, in
    num_steps steps of length `2 * epsilon / num_steps` along the normalized gradient. Each step ends with the
    projection onto the l2 ball of radius epsilon around d_i, and then with the standardization that keeps the noise
    plausible: `mean(d_i) + rms(d_i) * (d - mean(d)) / rms(d)`, the root mean squares not centred.

    Args:
      apply_fn: `[B, H, W, C]` -> logits `[B, K]`, in inference mode.
      images: `[B, H, W, C]`.
      log_target: `[B, K]`, logarithm of the target distribution.
      noise: `[M, B, H, W, C]`, scaled by sigma.
      epsilon: radius in l2.
      num_steps: T, at least 1.

    Returns:
      `[M, B, H, W, C]`: the attacked noise. No gradient flows through.

    Raises:
      UserError: a `ValueError`, for a number of steps below 1, or arrays that do not fit together.

    Example:
      The noise moves from the first pixel, which speaks for the target, to the second one, and keeps its mean and size.

      >>> import jax.numpy as jnp
      >>> from rs_consistency import attacks
      >>> apply_fn = lambda x: x[:, 0, :2, 0]  # the first two pixels are the logits
      >>> images, noise = jnp.zeros((1, 1, 4, 1)), jnp.array([0.5, -0.5, 0.5, -0.5]).reshape(1, 1, 1, 4, 1)
      >>> target = jnp.log(jnp.array([[0.9, 0.1]]))
      >>> attacked = attacks.worst_noise(apply_fn, images, target, noise, epsilon=1.0, num_steps=4)
      >>> [round(pixel, 3) for pixel in attacked.ravel().tolist()]
      [-0.216, 0.216, 0.673, -0.673]
    """
    num_steps, epsilon = count("num_steps", num_steps, at_most=_MOST_STEPS), _checked_length("epsilon", epsilon)
    images, noise = jax.lax.stop_gradient(_checked_batch(apply_fn, images, noise))
    log_target = jax.lax.stop_gradient(any_array("log_target", log_target, "[B, K]"))
    step_size = 2 * epsilon / num_steps

    def divergence(noise: jax.Array) -> jax.Array:
        return losses.kl_divergence(log_target, copies(apply_fn, images, noise)).sum()

    def step(_: jax.Array, attacked: jax.Array) -> jax.Array:
        attacked = attacked + step_size * unit(jax.grad(divergence)(attacked), len(noise))
        attacked = noise + project(attacked - noise, epsilon)
        scale = norm / jnp.maximum(l2_norm(attacked), jnp.finfo(noise.dtype).tiny)
        return mean + scale * (attacked - _mean(attacked))

    mean, norm = _mean(noise), l2_norm(noise)
    return jax.lax.stop_gradient(repeat(step, num_steps, noise))


def on_sphere(
    apply_fn: ApplyFn,
    images: jax.Array,
    labels: jax.Array,
    noise: jax.Array,
    *,
    step_size: float,
    num_steps: int,
) -> jax.Array:
    """Return noise of the same norm under which the classifier errs: Sun et al.'s attack.

    Source: Sun, Mao, Mueller, Vechev (ICML 2025). The attack ascends the cross entropy of each copy by itself, in
    num_steps steps of length step_size along the normalized gradient. Each step ends with the scaling to the norm of
    d_i. A copy that is misclassified already stays as it is. A copy that no step makes wrong ends at the last iterate.

    Args:
      apply_fn: `[B, H, W, C]` -> logits `[B, K]`, in inference mode.
      images: `[B, H, W, C]`.
      labels: `[B]` integers in 0..K-1.
      noise: `[M, B, H, W, C]`, scaled by sigma.
      step_size: l2 length of a step.
      num_steps: T, at least 1.

    Returns:
      `[M, B, H, W, C]`: the attacked noise. No gradient flows through.

    Raises:
      UserError: a `ValueError`, for a number of steps below 1, or arrays that do not fit together.

    Example:
      The first copy turns towards the second pixel and is misclassified after a step; the second copy already is.

      >>> import jax.numpy as jnp
      >>> from rs_consistency import attacks
      >>> apply_fn = lambda x: x[:, 0, :, 0]  # the two pixels are the logits
      >>> images, noise = jnp.zeros((1, 1, 2, 1)), jnp.array([[0.6, 0.5], [-0.5, 0.6]]).reshape(2, 1, 1, 2, 1)
      >>> attacked = attacks.on_sphere(apply_fn, images, jnp.array([0]), noise, step_size=0.25, num_steps=4)
      >>> [round(pixel, 3) for pixel in attacked.ravel().tolist()]
      [0.414, 0.662, -0.5, 0.6]
    """
    num_steps, step_size = count("num_steps", num_steps, at_most=_MOST_STEPS), _checked_length("step_size", step_size)
    images, noise = jax.lax.stop_gradient(_checked_batch(apply_fn, images, noise))
    labels = jax.lax.stop_gradient(_checked_labels(labels, images))

    def loss(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = copies(apply_fn, images, noise)
        return losses.cross_entropies(logits, labels).sum(), logits

    def step(_: jax.Array, attacked: jax.Array) -> jax.Array:
        gradient, logits = jax.grad(loss, has_aux=True)(attacked)
        moved = attacked + step_size * unit(gradient, len(noise))
        moved = moved * (norm / jnp.maximum(l2_norm(moved), jnp.finfo(noise.dtype).tiny))
        misclassified = logits.argmax(axis=-1) != labels[None]  # [M, B]
        return jnp.where(misclassified[..., None, None, None], attacked, moved)

    norm = l2_norm(noise)
    return jax.lax.stop_gradient(repeat(step, num_steps, noise))


def copies(apply_fn: ApplyFn, images: jax.Array, noise: jax.Array) -> jax.Array:
    """Return the logits `[M, B, K]` of images `[B, H, W, C]` under noise `[M, B, H, W, C]`."""
    images, noise = _checked_batch(apply_fn, images, noise)
    logits = jax.vmap(lambda draw: apply_fn(images + draw))(noise)
    if getattr(logits, "ndim", None) != 3 or logits.shape[:2] != noise.shape[:2]:
        given = getattr(logits, "shape", type(logits).__name__)
        raise UserError(f"apply_fn gives {given} for noise {noise.shape}; it must give [M, B, K]: logits of each copy")
    return logits


def l2_norm(x: jax.Array) -> jax.Array:
    """Return l2 norms over H, W, C, kept as axes of length 1. The squares of finite numbers do not overflow."""
    x = _checked_images("x", x)
    largest = jnp.abs(x).max(axis=(-3, -2, -1), keepdims=True)
    safe = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.square(x / safe).sum(axis=(-3, -2, -1), keepdims=True))


def unit(gradient: jax.Array, mean_over: int = 1) -> jax.Array:
    """Return `g / (||g|| + 1e-8)` over H, W, C: a zero gradient stays zero.

    Where the published code takes the gradient of a mean over examples or copies, and ours that of the sum, `mean_over`
    is their number. It multiplies the 1e-8, which shortens the steps of examples that are nearly certain.
    """
    gradient, mean_over = _checked_images("gradient", gradient), count("mean_over", mean_over)
    return gradient / (l2_norm(gradient) + mean_over * _SMALLEST_NORM)


def project(offset: jax.Array, radius: float | jax.Array) -> jax.Array:
    """Return the nearest point of the l2 ball over H, W, C."""
    offset = _checked_images("offset", offset)
    norm = l2_norm(offset)
    radius = _checked_length("radius", radius, norm.shape)
    outside = norm > radius
    return offset * jnp.where(outside, radius / jnp.where(outside, norm, 1), 1)


def _gradient(
    apply_fn: ApplyFn, images: jax.Array, labels: jax.Array, noise: jax.Array, *, clipped: bool = True
) -> jax.Array:
    """Return the gradient `[B, H, W, C]` of `-log(mean_i F_y(x + d_i))`, the mean clipped at 1e-20 or not."""

    def loss(images: jax.Array) -> jax.Array:  # examples do not interact: the gradient of the sum holds theirs
        logits, of, _ = losses.checked_labels(copies(apply_fn, images, noise), labels)
        of_label = jnp.take_along_axis(losses.log_mean_softmax(logits), of[:, None], axis=-1)
        return -jnp.maximum(of_label, _LOG_OF_SMALLEST_MEAN if clipped else -jnp.inf).sum()

    return jax.grad(loss)(images)


def _mean(x: jax.Array) -> jax.Array:
    """Return means over H, W, C, kept as axes of length 1."""
    return x.mean(axis=(-3, -2, -1), keepdims=True)


def _checked_batch(apply_fn: ApplyFn, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return images `[B, H, W, C]` and noise `[M, B, H, W, C]`; a `UserError` if they do not fit together."""
    function("apply_fn", apply_fn, "from images [B, H, W, C] to logits [B, K]")
    images = any_array("images", images, "[B, H, W, C]", kinds="f")
    noise = any_array("noise", noise, "[M, B, H, W, C]", kinds="f")
    if noise.shape[1:] != images.shape or not noise.shape[0]:
        raise UserError(
            f"noise has shape {noise.shape}; images {images.shape} need [M, B, H, W, C] with M of at least 1"
        )
    return images, noise


def _checked_labels(labels: jax.Array, images: jax.Array) -> jax.Array:
    labels = any_array("labels", labels, "[B]", kinds="iu")
    if labels.shape != images.shape[:1]:
        raise UserError(f"labels has shape {labels.shape}; images {images.shape} need [B] = {images.shape[:1]}")
    return labels


def _checked_images(name: str, x: jax.Array) -> jax.Array:
    """Return a floating-point array with axes H, W, C at its end, also of whole numbers."""
    x = any_array(name, x)
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise UserError(f"{name} has shape {x.shape}; it must be [..., H, W, C]")
    return jnp.asarray(x, jnp.float32) if x.dtype.kind in "iu" else x


def _checked_length(name: str, value: float | jax.Array, shape: tuple[int, ...] = ()) -> float | jax.Array:
    """Return a length, at least 0; a traced one, or an array of a shape like `[..., 1, 1, 1]`, is not looked at."""
    if not is_traced(value) and not (shape and getattr(value, "ndim", 0)):
        return number_from(name, value, at_least=0)
    lengths = any_array(name, value)
    if lengths.ndim and lengths.shape != shape:
        raise UserError(f"{name} has shape {lengths.shape}; it must be a number" + f", or {shape}" * bool(shape))
    return lengths

"""The votes of a smoothed classifier, counted on the devices."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import noise
from rs_consistency.common.checks import LARGEST, MAX_SEED, number_above, whole_number
from rs_consistency.common.errors import UserError, first_line
from rs_consistency.data import DatasetInfo
from rs_consistency.devices import parallel

# Calls of the device for a group of images, at least: then the rows that its last call leaves unused are few.
_CALLS_IN_GROUP = 16
# Noisy images in a batch, and their pixel values at most. A CPU gets few: a layer's results then stay near the caches,
# and below the size that glibc maps anew each time. On 2 cores LeNet counted 1.5 times as many votes a second with 128
# as with 256, ResNet-20 1.1 times with 64. An accelerator gets thousands, as far as its memory allows: an NVIDIA H100
# counted 3.5 million LeNet votes a second with 16,384 in a batch (7 GiB), 2.4 million with 4,096.
_BATCH = {"cpu": (128, 3 * 2**16)}
_BATCH_ELSEWHERE = (16384, 2**24)
_LEAST_BATCH = 16
_GROUP_VALUES = 2**26  # pixel values in a group of images at most: 256 MiB
# Batches in one call of the device, in a compiled loop. On a CPU, convolutions in a compiled loop are slow and a call
# costs little. An accelerator would wait for the host.
_BATCHES_PER_CALL = {"cpu": 1}
_BATCHES_PER_CALL_ELSEWHERE = 16
# Row numbers are int32 on the devices: n0 + n and the 256 batches of a group must stay below 2**31 together.
_MOST_VOTES = 2**29
_LARGEST_BATCH = 2**20

ApplyFn = Callable[[Any, jax.Array], jax.Array]  # (variables, images `[N, H, W, C]`) -> logits `[N, K]`


class VoteSettings(NamedTuple):
    """The settings of `count_votes`, the same for every image; from `vote_settings`, which checks them.

    Attributes:
      sigma: standard deviation of the noise.
      num_classes: K.
      n0: votes of the selection; 0 where no class has to be selected.
      n: votes of the estimation.
      seed: seed of the noise.
      batch_size: noisy images at a time, over all devices.
    """

    sigma: float
    num_classes: int
    n0: int
    n: int
    seed: int
    batch_size: int

    @classmethod
    def for_dataset(cls, info: DatasetInfo, **settings: Any) -> Self:
        """Return checked settings for the images of a dataset; `settings` are the others of `vote_settings`."""
        return vote_settings(num_classes=info.num_classes, image_shape=info.image_shape, **settings)


def vote_settings(
    *,
    sigma: Any,
    num_classes: Any,
    n: Any,
    seed: Any,
    image_shape: Sequence[int],
    platform: str,
    n0: Any = 0,
    least_n0: int = 0,
    batch_size: Any = None,
) -> VoteSettings:
    """Return checked settings; see `VoteSettings`.

    n0 must be at least `least_n0`, which is 1 where a class has to be selected. A `batch_size` of None is chosen by
    platform and image shape `(H, W, C)`.

    Raises:
      UserError: for the first setting that cannot work.
    """
    if batch_size is None:
        usual, values = _BATCH.get(platform, _BATCH_ELSEWHERE)
        batch_size = min(usual, max(_LEAST_BATCH, values // max(1, math.prod(image_shape))))
    return VoteSettings(
        sigma=number_above("sigma", sigma, 0, at_most=LARGEST),
        num_classes=whole_number("num_classes", num_classes, at_least=1),
        n0=whole_number("n0", n0, at_least=least_n0, at_most=_MOST_VOTES),
        n=whole_number("n", n, at_least=1, at_most=_MOST_VOTES),
        seed=whole_number("seed", seed, at_least=0, at_most=MAX_SEED),
        batch_size=whole_number("batch_size", batch_size, at_least=1, at_most=_LARGEST_BATCH),
    )


class Votes(NamedTuple):
    """The votes of a group of G images, counted by class.

    Attributes:
      counts0: `[G, K]` int64, votes of the selection.
      counts: `[G, K]` int64, votes of the estimation.
    """

    counts0: np.ndarray
    counts: np.ndarray


def count_votes(
    apply_fn: ApplyFn,
    variables: Any,
    images: np.ndarray,
    indices: np.ndarray,
    *,
    settings: VoteSettings,
    devices: Sequence[jax.Device],
    stream: noise.Stream = noise.Stream.CERTIFY,
    occasion: Sequence[int] = (),
) -> Iterator[Votes]:
    """Yield the votes of the images, group after group, in order.

    The votes of an image fill the rows of batches back to back: n0 of the selection, then n of the estimation. So do
    the images of a group. A row knows its image and its vote from its global number. Noise exists for one batch at a
    time, and only counts leave the devices.

    Guarantee: vote v of an image is a function of the seed, the image's index, the phase (selection or estimation), v
    and sigma. Other images, the batch size and the devices have no effect, except through rounding in the model, which
    can only decide ties.

    Args:
      apply_fn: (variables, `[N, H, W, C]`) -> logits `[N, K]`.
      variables: first argument of `apply_fn`; replicated on the devices.
      images: `[B, H, W, C]`, float32 in [0, 1], or uint8.
      indices: `[B]`, the images' numbers in their dataset, 0..MAX_INDEX, which address the noise.
      settings: from `vote_settings`.
      devices: local devices that share a batch.
      stream: purpose of the noise.
      occasion: further numbers that address the noise, for a purpose with several occasions, such as epochs.

    Raises:
      UserError: when the model does not accept the images, does not give K logits, or gives NaN.
    """
    num_classes, per_image = settings.num_classes, settings.n0 + settings.n
    per_device = -(-settings.batch_size // len(devices))
    check_model(apply_fn, variables, images.shape[1:], num_classes=num_classes, batch_size=per_device)
    batches_per_call = _BATCHES_PER_CALL.get(devices[0].platform, _BATCHES_PER_CALL_ELSEWHERE)
    rows_per_call = per_device * len(devices) * batches_per_call
    group = min(max(len(images), 1), -(-_CALLS_IN_GROUP * rows_per_call // per_image))
    group = min(group, max(1, _GROUP_VALUES // max(1, math.prod(images.shape[1:]))))
    compiled = _compile(apply_fn, num_classes, per_device, batches_per_call, devices)
    variables = parallel.replicate(variables, devices)
    numbers = np.int32([settings.n0, settings.n])
    key = noise.fold(noise.stream_key(settings.seed, stream), *occasion)
    for first in range(0, len(images), group):
        num_real = min(group, len(images) - first)
        chosen = np.minimum(np.arange(first, first + group), len(images) - 1)  # the last group is padded
        about_images = (to_float(images[chosen]), indices[chosen].astype(np.int32), np.int32(num_real))
        arrays = parallel.replicate((key, np.float32(settings.sigma), numbers, *about_images), devices)
        counts = parallel.replicate(np.zeros((2, group, num_classes + 1), np.int32), devices)
        for start in range(0, num_real * per_image, rows_per_call):
            counts = compiled(counts, variables, *arrays, np.int32(start))
        totals = np.asarray(counts)[:, :num_real].astype(np.int64)
        nan = np.flatnonzero(totals[..., num_classes].any(axis=0))
        if len(nan):
            raise nan_error(indices[first + nan[0]])
        yield Votes(totals[0, :, :num_classes], totals[1, :, :num_classes])


def _compile(
    apply_fn: ApplyFn, num_classes: int, per_device: int, batches: int, devices: Sequence[jax.Device]
) -> Callable[..., jax.Array]:
    """Compile the votes of some batches of a group; sigma, seed and images are arguments of the compiled function."""
    batch_size = per_device * len(devices)

    def some_batches(
        shard: jax.Array,
        counts: jax.Array,  # [2, G, K + 1]; the last class counts the votes with a NaN logit
        variables: Any,
        key: jax.Array,
        sigma: jax.Array,
        numbers: jax.Array,  # n0 and n
        images: jax.Array,  # [G, H, W, C]
        indices: jax.Array,  # [G]
        num_real: jax.Array,
        start: jax.Array,
    ) -> jax.Array:
        n0, per_image = numbers[0], numbers.sum()

        def one_batch(batch: Any, added: jax.Array) -> jax.Array:
            row = start + (batch * len(devices) + shard) * per_device + jnp.arange(per_device)
            slot, vote = row // per_image, row % per_image
            real = slot < num_real
            slot = jnp.minimum(slot, len(images) - 1)
            phase = (vote >= n0).astype(jnp.int32)
            addresses = (indices[slot], phase, vote - n0 * phase)
            voted = cast(
                apply_fn, variables, images[slot], key=key, addresses=addresses, sigma=sigma, num_classes=num_classes
            )
            return added.at[phase, slot, voted].add(real.astype(added.dtype))

        added = jnp.zeros_like(counts)
        if batches == 1:
            added = one_batch(0, added)
        else:
            left = (num_real * per_image - start + batch_size - 1) // batch_size
            added = jax.lax.fori_loop(0, jnp.minimum(batches, left), one_batch, added)
        return counts + parallel.sum_over_devices(added)

    return parallel.spread(some_batches, devices=devices, donate=(0,))


def cast(
    apply_fn: ApplyFn,
    variables: Any,
    images: jax.Array,
    *,
    key: jax.Array,
    addresses: tuple[jax.Array, jax.Array, jax.Array],
    sigma: jax.Array | float,
    num_classes: int,
) -> jax.Array:
    """Return one vote for each of the images `[N, H, W, C]` float32 in [0, 1], on a device.

    `key` is the key of the noise stream. The `addresses` are `[N]` int32 each: the image's index, 0 for the selection
    or 1 for the estimation, number of the vote. The other arguments are as for `count_votes` and `VoteSettings`.

    Returns:
      `[N]` int32, the class with the largest logit, the lowest of equals; K where a logit is NaN.
    """
    draws = noise.addressed_noise(key, *addresses, shape=images.shape[1:])
    logits = apply_fn(variables, images + sigma * draws)
    return jnp.where(jnp.isnan(logits).any(axis=-1), num_classes, logits.argmax(axis=-1))


def nan_error(index: int) -> UserError:
    """Return the error for an image with NaN among its logits."""
    return UserError(f"the model gives NaN for noisy copies of image {index}; check its parameters and normalization")


def to_float(images: np.ndarray) -> np.ndarray:
    """Return images as float32 in [0, 1]; uint8 is divided by 255."""
    return np.asarray(images, np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)


def check_model(
    apply_fn: ApplyFn, variables: Any, image_shape: tuple[int, ...], *, num_classes: int, batch_size: int
) -> None:
    """Raise a `UserError` for a model that does not map a batch of images to K logits each."""
    batch = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    try:
        logits = jax.eval_shape(apply_fn, variables, batch)
    except Exception as error:  # a model may raise anything for images that do not fit
        message = f"the model does not accept images of shape {tuple(image_shape)}: {first_line(error)}"
        raise UserError(message) from error
    if getattr(logits, "shape", None) != (batch_size, num_classes):
        raise UserError(
            f"the model gives {getattr(logits, 'shape', type(logits).__name__)} for a batch of {batch_size} images, but"
            f" num_classes={num_classes} needs logits of shape {(batch_size, num_classes)}"
        )

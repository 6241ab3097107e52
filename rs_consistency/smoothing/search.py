"""The search of an attack: gradients in real numbers, which prove nothing.

A search starts at an image or near it, and minimizes the norm of a perturbation that changes the class of the smoothed
classifier. `attack` measures and proves by votes what was found.

Source: the rule that direction and norm have separate steps is of Rony et al. (CVPR 2019); the gradient of the mean
softmax, of Salman et al. (NeurIPS 2019).
"""

import functools
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from rs_consistency import losses, noise
from rs_consistency.attacks import copies as logits_of_copies
from rs_consistency.attacks import l2_norm, unit
from rs_consistency.common.checks import count
from rs_consistency.devices import parallel
from rs_consistency.devices.compiler import training_compiler_options
from rs_consistency.smoothing.images import Task
from rs_consistency.smoothing.voter import ApplyFn, to_float
from rs_consistency.smoothing.votes import VoteSettings
from rs_consistency.statistics.samplers import FLOAT

# The defaults of the search. On ten images of the demo, twice the steps found distances 0.3 % smaller, and 12 restarts
# 0.8 % smaller than 6; 64 copies found none smaller than 16. With the same copies in all steps, some searches found
# nothing.
COPIES, STEPS, RESTARTS = 16, 30, 8
_MOST_EFFORT = 100_000  # copies, steps, restarts


class Occasion(IntEnum):
    """The first numbers that address the noise of an attack: whatever proves something has noise of its own."""

    SEARCH = 0
    START = 1
    REFINEMENT = 2
    PREDICTION = 3
    PROOF = 4  # and one more for each further try


_START_NORM = 0.2  # of a random start, in sigmas
_LEAST_NORM = 0.02  # of an iterate, in sigmas
_DIRECTION_RATES = (1.0, 0.05)  # length of a step in units of the norm, first and last
_NORM_RATES = (1.0, 0.1)  # share of the measured distance to the boundary by which the norm changes, first and last
_GRADIENT_SHARE = 8  # a gradient keeps activations: an accelerator takes an eighth of the rows that it takes for votes


class Effort(NamedTuple):
    """How long `attack` searches; see there."""

    copies: int = COPIES
    steps: int = STEPS
    restarts: int = RESTARTS


def check_effort(**effort: Any) -> Effort:
    """Return the effort with some of its fields; a `UserError` for one that is no number from 1 to 100,000."""
    return Effort(**{name: count(name, value, at_most=_MOST_EFFORT) for name, value in effort.items()})


def jobs_per_device(settings: VoteSettings, effort: Effort, devices: Sequence[jax.Device]) -> int:
    """Return the number of searches that a device makes at a time."""
    rows = settings.rows_per_device // (1 if devices[0].platform == "cpu" else _GRADIENT_SHARE)
    return max(1, rows // effort.copies)


def search(
    step: Callable[..., jax.Array], variables: Any, task: Task, classes: np.ndarray, effort: Effort
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image the smallest perturbation `[B, H, W, C]` of the restarts, and its norm `[B]`.

    The norm is infinite where no restart could move.
    """
    settings, devices = task.settings, task.devices
    group = jobs_per_device(settings, effort, devices) * len(devices)
    shared = parallel.replicate((variables, settings.draws(noise.Stream.ATTACK, Occasion.SEARCH)["key"]), devices)
    start_key = settings.draws(noise.Stream.ATTACK, Occasion.START)["key"]
    image, restart = np.divmod(np.arange(len(task.images) * effort.restarts), effort.restarts)
    images = to_float(task.images)
    best, norms = np.zeros_like(images), np.full(len(images), np.inf)
    for first in range(0, len(image), group):
        number = min(group, len(image) - first)
        jobs = np.minimum(np.arange(first, first + group), len(image) - 1)  # the last group is padded
        of, restarts = image[jobs], restart[jobs].astype(np.int32)
        about = (images[of], classes[of].astype(np.int32), task.indices[of].astype(np.int32), restarts)
        draws = noise.addressed_noise(start_key, about[2], restarts, shape=settings.image_shape)
        starts = np.asarray(unit(draws)) * np.float32(_START_NORM * settings.sigma)
        starts[restarts == 0] = 0
        about = parallel.replicate(about, devices)
        offsets = parallel.replicate(starts, devices)
        for at in range(effort.steps):
            offsets = step(offsets, *shared, *about, np.int32(at))
        for place, offset in zip(of[:number], np.asarray(offsets), strict=False):
            if 0 < norms_of(offset) < norms[place]:
                best[place], norms[place] = offset, norms_of(offset)
    return best, norms


def compile_step(
    apply_fn: ApplyFn, settings: VoteSettings, effort: Effort, devices: Sequence[jax.Device]
) -> Callable[..., jax.Array]:
    """Compile a step of all searches that the devices make at a time."""
    per_device = jobs_per_device(settings, effort, devices)
    voter = settings._replace(sampler=FLOAT).voter(apply_fn, devices[0].platform)  # the search is in real numbers
    sigma, copies, steps = np.float32(settings.sigma), effort.copies, effort.steps

    def step(
        shard: jax.Array,
        offsets: jax.Array,  # [J, H, W, C]
        variables: Any,
        key: jax.Array,
        images: jax.Array,  # [J, H, W, C] in [0, 1]
        classes: jax.Array,  # [J], the predictions to change
        indices: jax.Array,  # [J]
        restarts: jax.Array,  # [J]
        number: jax.Array,  # of the step
    ) -> jax.Array:
        def mine(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, shard * per_device, per_device)

        def everyone(part: jax.Array) -> jax.Array:
            whole = jnp.zeros((per_device * len(devices), *part.shape[1:]), part.dtype)
            return parallel.sum_over_devices(jax.lax.dynamic_update_slice_in_dim(whole, part, shard * per_device, 0))

        offset, image, own = mine(offsets), mine(images), jax.nn.one_hot(mine(classes), settings.num_classes) > 0
        addresses = (jnp.repeat(mine(indices), copies), jnp.repeat(mine(restarts), copies))
        numbers = jnp.tile(jnp.arange(copies, dtype=jnp.int32), per_device)
        addresses = (*addresses, jnp.full_like(numbers, number), numbers)
        draws = sigma * noise.addressed_noise(key, *addresses, shape=image.shape[1:])
        draws = draws.reshape(per_device, copies, *image.shape[1:]).swapaxes(0, 1)

        def loss(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = logits_of_copies(functools.partial(voter.logits, variables), image + offset, draws)
            of_own, of_other = _own_and_best_other(losses.log_mean_softmax(logits), own)
            return (of_other - of_own).sum(), logits

        gradient, logits = jax.grad(loss, has_aux=True)(offset)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        votes = jax.nn.one_hot(logits.argmax(axis=-1), settings.num_classes)  # [M, J, K]
        against = 1 - 2 * jnp.where(own[None], votes, 0).sum(axis=-1)  # 1 for another class, -1 for the prediction
        estimate = (against[..., None, None, None] * draws).sum(axis=0)  # the gradient of the votes, up to a factor
        direction = unit(jnp.where(l2_norm(gradient) > 0, gradient, estimate))
        shares = _own_and_best_other((votes.sum(axis=0) + 0.5) / (copies + 1), own)
        radius = sigma / 2 * (ndtri(shares[0]) - ndtri(shares[1]))  # negative for another class
        norm = l2_norm(offset)[:, 0, 0, 0]

        done = number.astype(jnp.float32) / max(1, steps - 1)
        direction_rate, norm_rate = (a * (b / a) ** done for a, b in (_DIRECTION_RATES, _NORM_RATES))
        length = jnp.maximum(norm + norm_rate * radius, _LEAST_NORM * sigma)
        along = direction_rate * jnp.maximum(length, _START_NORM * sigma)
        return everyone(_in_box(image, offset + along[:, None, None, None] * direction, length))

    options = training_compiler_options(devices[0].platform, matrix_products=False)
    return parallel.spread(step, devices=devices, donate=(0,), compiler_options=options)


def _own_and_best_other(values: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return of values `[J, K]` the entry of the own class, and the largest of the others."""
    return jnp.where(own, values, -jnp.inf).max(axis=-1), jnp.where(own, -jnp.inf, values).max(axis=-1)


def _in_box(images: jax.Array, offsets: jax.Array, norms: jax.Array) -> jax.Array:
    """Return the offsets scaled to norms `[J]` and clipped, in turn, so that the images stay in [0, 1]."""
    for _ in range(3):
        norm = l2_norm(offsets)
        offsets = offsets * (norms[:, None, None, None] / jnp.where(norm > 0, norm, 1))
        offsets = jnp.clip(images + offsets, 0, 1) - images
    return offsets


def norms_of(offsets: np.ndarray) -> np.ndarray:
    """Return l2 norms over the last three axes, in float64."""
    return np.sqrt(np.square(offsets, dtype=np.float64).sum(axis=(-3, -2, -1)))

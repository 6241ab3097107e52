"""The votes of a smoothed classifier, counted on the devices."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency import noise
from rs_consistency.common.checks import LARGEST, MAX_SEED, MOST, PRECISIONS, number_above, one_of, shown, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.data import DatasetInfo
from rs_consistency.devices import parallel
from rs_consistency.smoothing.one_function import check_one_function
from rs_consistency.smoothing.voter import ApplyFn, Voter, nan_error, pixels, scale_of
from rs_consistency.statistics.samplers import GRID, NoiseLaw, noise_law

# Calls of the device for a group of images, at least: then the rows that its last call leaves unused are few.
_CALLS_IN_GROUP = 16
# With a plan, a tenth of the n votes is expected on average, at least. A group should be so large that few rows are
# unused, and so small that a kill loses little.
_PLANNED = 10
# Noisy images in a batch on a device, and their pixel values at most: the same on any number of devices, because the
# last bits of logits depend on it. A CPU's devices get few: a layer's results then stay near the caches, and below the
# size that glibc maps anew each time. On 2 cores LeNet counted 1.5 times as many votes a second with 2 x 64 as with
# 2 x 128, ResNet-20 1.1 times with 2 x 32. An accelerator gets thousands, as far as its memory allows: an NVIDIA H100
# counted 3.5 million LeNet votes a second with 16,384 in a batch (7 GiB), 2.4 million with 4,096.
_ROWS = {"cpu": (64, 3 * 2**15), "tpu": (2048, 2**21)}
_ROWS_ELSEWHERE = (16384, 2**24)
# A CPU multiplies a matrix and a vector 8 rows at a time, and adds in another order in the rows that are left.
_MULTIPLE = 8
_GROUP_VALUES = 2**26  # pixel values in a group of images at most: 256 MiB
# Batches in one call of the device, in a compiled loop. On a CPU, convolutions in a compiled loop are slow and a call
# costs little. An accelerator would wait for the host.
_BATCHES_PER_CALL = {"cpu": 1}
_BATCHES_PER_CALL_ELSEWHERE = 16
# Row numbers are int32 on the devices: n0 + n and the 256 batches of a group must stay below 2**31 together.
_MOST_VOTES = 2**29
_MOST_ROWS = 2**30  # of a group
_LARGEST_BATCH = 2**20
_STATEMENTS = (noise.Stream.CERTIFY, noise.Stream.PREDICT, noise.Stream.ATTACK)  # streams whose votes prove something


class VoteSettings(NamedTuple):
    """The settings of `count_votes`, the same for every image; from `vote_settings`, which checks them.

    Attributes:
      sigma: standard deviation of the noise.
      num_classes: K.
      n0: votes of the selection; 0 where no class has to be selected.
      n: votes of the estimation.
      seed: seed of the noise.
      rows_per_device: noisy images in a batch on each device.
      image_shape: (H, W, C).
      sampler: of the noise, one of `samplers.SAMPLERS`.
      precision: of the network's products in float32, one of `checks.PRECISIONS`.
    """

    sigma: float
    num_classes: int
    n0: int
    n: int
    seed: int
    rows_per_device: int
    image_shape: tuple[int, ...]
    sampler: str
    precision: str

    @property
    def law(self) -> NoiseLaw:
        """The law of the noise, for bounds and tests."""
        return noise_law(self.sampler, sigma=self.sigma, dimension=math.prod(self.image_shape))

    def draws(self, stream: noise.Stream, *occasion: int) -> dict[str, Any]:
        """Return the `key` and the `scale` of the noise, as `Voter.noisy` takes them."""
        key = noise.fold(noise.stream_key(self.seed, stream), *occasion)
        return {"key": key, "scale": scale_of(self.sampler, self.sigma)}

    def voter(self, apply_fn: ApplyFn, platform: str) -> Voter:
        """Return the compiled part of the votes, for the devices of a platform."""
        lookup = "one_hot" if platform == "tpu" else "gather"  # a TPU is slow at gathers
        return Voter(apply_fn, self.num_classes, self.sampler, self.precision, lookup)

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
    devices: Sequence[jax.Device],
    n0: Any = 0,
    least_n0: int = 0,
    batch_size: Any = None,
    sampler: Any = GRID,
    precision: Any = PRECISIONS[0],
) -> VoteSettings:
    """Return checked settings; see `VoteSettings`.

    n0 must be at least `least_n0`, which is 1 where a class has to be selected. The `batch_size`, noisy images over all
    devices, is rounded up to a multiple of 8 on each. If it is None, their number on a device is chosen by platform and
    image shape `(H, W, C)`.

    Raises:
      UserError: for the first setting that cannot work.
    """
    if not isinstance(image_shape, tuple | list) or len(image_shape) != 3:
        raise UserError(f"image_shape={shown(image_shape)}: use (H, W, C)")
    image_shape = tuple(whole_number("image_shape", axis, at_least=1, at_most=MOST) for axis in image_shape)
    if batch_size is None:
        usual, values = _ROWS.get(devices[0].platform, _ROWS_ELSEWHERE)
        rows = min(usual, values // max(1, math.prod(image_shape)))
    else:
        rows = -(-whole_number("batch_size", batch_size, at_least=1, at_most=_LARGEST_BATCH) // len(devices))
    one_of("precision", precision, PRECISIONS)
    settings = VoteSettings(
        sigma=number_above("sigma", sigma, 0, at_most=LARGEST),
        num_classes=whole_number("num_classes", num_classes, at_least=1, at_most=MOST),
        n0=whole_number("n0", n0, at_least=least_n0, at_most=_MOST_VOTES),
        n=whole_number("n", n, at_least=1, at_most=_MOST_VOTES),
        seed=whole_number("seed", seed, at_least=0, at_most=MAX_SEED),
        rows_per_device=max(1, -(-rows // _MULTIPLE)) * _MULTIPLE,
        image_shape=image_shape,
        sampler=sampler,
        precision=precision,
    )
    _ = settings.law  # checks the sampler, and sigma for it
    return settings


class Votes(NamedTuple):
    """The votes of a group of G images, counted by class.

    Attributes:
      counts0: `[G, K]` int64, votes of the selection.
      counts: `[G, K]` int64, votes of the estimation.
    """

    counts0: np.ndarray
    counts: np.ndarray


@dataclass
class VoteProgram:
    """The compiled votes of a network, for several calls of `count_votes`; from `vote_program`.

    Attributes:
      voter: the network.
      batches_per_call: batches in one call of the device.
      compiled: the votes of one call; see `_compile`.
      tested: whether `check_one_function` has accepted the network.
    """

    voter: Voter
    batches_per_call: int
    compiled: Callable[..., jax.Array]
    tested: bool = False


def vote_program(apply_fn: ApplyFn, settings: VoteSettings, devices: Sequence[jax.Device]) -> VoteProgram:
    """Return the votes of a network as `count_votes` compiles them: it depends on no number of votes, nor on sigma."""
    voter = settings.voter(apply_fn, devices[0].platform)
    batches = _BATCHES_PER_CALL.get(devices[0].platform, _BATCHES_PER_CALL_ELSEWHERE)
    return VoteProgram(voter, batches, _compile(voter, settings.rows_per_device, batches, devices))


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
    plan: Callable[[np.ndarray], np.ndarray] | None = None,
    program: VoteProgram | None = None,
) -> Iterator[Votes]:
    """Yield the votes of the images, group after group, in order.

    The votes of an image fill the rows of batches back to back: n0 of the selection, then n of the estimation. So do
    the images of a group, also with different numbers of votes. A row knows its image and its vote from its global
    number. Noise exists for one batch at a time, and only counts leave the devices.

    Guarantee: vote v of an image is a function of the seed, the image's index, the phase (selection or estimation), v
    and sigma. Other images and the number of devices have no effect, nor has the batch size, except through rounding in
    the model, which can only decide ties. With noise on the grid, and for certificates and predictions, a test of
    `one_function` comes before a vote is used.

    Args:
      apply_fn: (variables, `[N, H, W, C]`) -> logits `[N, K]`.
      variables: first argument of `apply_fn`; replicated on the devices.
      images: `[B, H, W, C]`, uint8; for the sampler "float" also float32 in [0, 1].
      indices: `[B]`, the images' numbers in their dataset, 0..MAX_INDEX, which address the noise.
      settings: from `vote_settings`.
      devices: local devices that share a batch.
      stream: purpose of the noise.
      occasion: further numbers that address the noise, for a purpose with several occasions, such as epochs.
      plan: function from the largest counts `[G]` of the selection to numbers `[G]` of estimating votes, at most n. A
        group then selects first, and casts the others when all its numbers are known. None for n votes on each image.
      program: from `vote_program`, with the same network, rows, sampler, precision and devices; None to compile here.

    Raises:
      UserError: when the model does not accept the images, does not give K logits, or gives NaN; when images do not fit
        the sampler; when the model is found not to be one function.
    """
    num_classes, n0, n = settings.num_classes, settings.n0, settings.n
    per_device = settings.rows_per_device
    program = vote_program(apply_fn, settings, devices) if program is None else program
    voter = program.voter
    voter.check(variables, images.shape[1:], per_device, devices)
    rows_per_call = per_device * len(devices) * program.batches_per_call
    expected = n0 + n if plan is None else n0 + -(-n // _PLANNED)
    group = min(max(len(images), 1), -(-_CALLS_IN_GROUP * rows_per_call // expected))
    group = min(group, max(1, _GROUP_VALUES // max(1, math.prod(images.shape[1:]))), _MOST_ROWS // (n0 + n))
    replicated = parallel.replicate(variables, devices)
    draws = settings.draws(stream, *occasion)
    to_test = settings.sampler == GRID and stream in _STATEMENTS
    rounds = [(n0, lambda most: n)] if plan is None else [(n0, lambda most: 0), (0, plan)]
    for first in range(0, len(images), group):
        num_real = min(group, len(images) - first)
        chosen = np.minimum(np.arange(first, first + group), len(images) - 1)  # the last group is padded
        about_images = (pixels(images[chosen], settings.sampler), indices[chosen].astype(np.int32))
        counts = parallel.replicate(np.zeros((2, group, num_classes + 2), np.int32), devices)
        for selecting, estimating in rounds:
            lengths = np.zeros(group, np.int64)
            lengths[:num_real] = selecting + estimating(np.asarray(counts)[0, :num_real, :num_classes].max(axis=1))
            numbers = np.int32(selecting), np.append(0, np.cumsum(lengths)).astype(np.int32)
            arrays = parallel.replicate((draws, *about_images, numbers), devices)
            for start in range(0, int(numbers[1][-1]), rows_per_call):
                counts = program.compiled(counts, replicated, *arrays, np.int32(start))
                if to_test and not program.tested:
                    row = np.arange(min(rows_per_call, int(numbers[1][-1])), dtype=np.int32)
                    slot, phase, vote = _addresses(row, *numbers, np.searchsorted)
                    check_one_function(
                        voter,
                        variables,
                        images[slot],
                        addresses=(indices[slot], phase, vote),
                        draws=draws,
                        rows=per_device,
                        device=devices[0],
                        group_of=phase * group + slot,
                        counts=np.asarray(counts).reshape(2 * group, -1),
                    )
                    program.tested = True
        totals = np.asarray(counts)[:, :num_real].astype(np.int64)
        nan = np.flatnonzero(totals[..., num_classes].any(axis=0))
        if len(nan):
            raise nan_error(indices[first + nan[0]])
        yield Votes(totals[0, :, :num_classes], totals[1, :, :num_classes])


def _addresses(row: Any, n0: Any, starts: Any, search: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Return slot, phase and vote of the rows `[N]` of a group, all int32.

    Args:
      row: `[N]` int32. Rows behind the last get the slot G, which does not exist.
      n0: votes of the selection, in the first rows of each image.
      starts: `[G + 1]` int32, first row of each image; the last entry is the number of rows.
      search: `searchsorted` of NumPy or `jax.numpy`.
    """
    slot = search(starts[1:], row, side="right").astype(np.int32)
    vote = row - starts[slot]
    phase = (vote >= n0).astype(np.int32)
    return slot, phase, vote - n0 * phase


def _compile(voter: Voter, per_device: int, batches: int, devices: Sequence[jax.Device]) -> Callable[..., jax.Array]:
    """Compile the votes of some batches of a group; sigma, seed and images are arguments of the compiled function."""
    batch_size = per_device * len(devices)
    method = "compare_all" if devices[0].platform == "tpu" else "scan_unrolled"  # a TPU is slow at gathers
    search = functools.partial(jnp.searchsorted, method=method)

    def some_batches(
        shard: jax.Array,
        counts: jax.Array,  # [2, G, K + 2]; behind the classes: the votes with a NaN logit, and the sum of checksums
        variables: Any,
        draws: dict[str, Any],  # key and scale, as for `Voter.noisy`
        images: jax.Array,  # [G, H, W, C]
        indices: jax.Array,  # [G]
        numbers: tuple[jax.Array, jax.Array],  # n0 and starts, as for `_addresses`
        start: jax.Array,
    ) -> jax.Array:
        def one_batch(batch: Any, added: jax.Array) -> jax.Array:
            row = start + (batch * len(devices) + shard) * per_device + jnp.arange(per_device, dtype=jnp.int32)
            slot, phase, vote = _addresses(row, *numbers, search)
            real = (slot < len(images)).astype(jnp.int32)
            slot = jnp.minimum(slot, len(images) - 1)
            noisy = voter.noisy(images[slot], addresses=(indices[slot], phase, vote), **draws)
            voted, checksum = voter.votes(voter.logits(variables, noisy))
            added = added.at[phase, slot, voted].add(real)
            return added.at[phase, slot, -1].add(real * checksum)

        added = jnp.zeros_like(counts)
        if batches == 1:
            added = one_batch(np.int32(0), added)
        else:
            left = (numbers[1][-1] - start + batch_size - 1) // batch_size
            added = jax.lax.fori_loop(np.int32(0), jnp.minimum(np.int32(batches), left), one_batch, added)
        return counts + parallel.sum_over_devices(added)

    options = voter.compiler_options(devices[0].platform)
    return parallel.spread(some_batches, devices=devices, donate=(0,), compiler_options=options)

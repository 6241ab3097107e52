"""The speed of votes, measured for `--dry_run`."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rs_consistency import noise
from rs_consistency.devices.compiler import memory_of
from rs_consistency.smoothing.voter import ApplyFn, pixels
from rs_consistency.smoothing.votes import VoteSettings, count_votes

_MEASURED_SECONDS = 2.0
_MEASURED_IMAGES = 64
_MEASURED_BATCHES = 8  # of an image


class VoteCost(NamedTuple):
    """Votes a second on the wall clock, over all devices; largest memory of a batch, None where XLA does not say."""

    per_second: float
    bytes_per_device: int | None


def measure_votes(
    apply_fn: ApplyFn, variables: Any, images: np.ndarray, *, settings: VoteSettings, devices: Sequence[jax.Device]
) -> VoteCost:
    """Time votes on images `[B, H, W, C]` for about two seconds; arguments as in `votes.count_votes`."""
    rows = settings.rows_per_device
    # Whole batches on all devices: then the images make several groups, and all but the first are timed.
    short = settings._replace(n0=1, n=_MEASURED_BATCHES * rows * len(devices) - 1)
    many = images[np.arange(_MEASURED_IMAGES) % len(images)]
    asked = (apply_fn, variables, many, np.arange(len(many)))
    groups = count_votes(*asked, settings=short, devices=devices, stream=noise.Stream.PREDICT)
    next(groups)  # compiles
    counted, start = 0, time.perf_counter()
    for votes in groups:
        counted += len(votes.counts) * (short.n0 + short.n)
        if time.perf_counter() - start > _MEASURED_SECONDS:
            break
    per_second = counted / (time.perf_counter() - start)

    voter = settings.voter(apply_fn, devices[0].platform)
    draws = settings.draws(noise.Stream.PREDICT)

    def one_batch(variables: Any, draws: dict[str, Any], images: jax.Array, index: jax.Array) -> jax.Array:
        noisy = voter.noisy(images, addresses=(index, index, index), **draws)
        return voter.votes(voter.logits(variables, noisy))

    batch = np.broadcast_to(pixels(images[:1], settings.sampler), (rows, *images.shape[1:]))
    compiled = jax.jit(one_batch).lower(variables, draws, batch, np.zeros(rows, np.int32)).compile()
    return VoteCost(per_second, memory_of(compiled))

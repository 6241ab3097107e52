"""How examples reach the devices: from a dataset that lies there as a whole, or from one that is streamed."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data, noise


class StepSizes(NamedTuple):
    """How an epoch divides into steps. The last one is filled up from the start of the same order."""

    examples: int  # in a step, over all devices: batch_size / M
    steps: int


class Feed(NamedTuple):
    """The arguments of a compiled step beside the state: replicated ones, and parts `[D, ...]` for the D devices."""

    args: tuple[Any, ...] = ()
    parts: Mapping[str, Any] = {}


class Inputs(Protocol):
    """The examples of a run, for the devices that share a batch."""

    sizes: StepSizes
    devices: Sequence[jax.Device]
    num_test_examples: int
    same_feed: bool  # in all steps of an epoch

    def feeds(self, first_step: int, end_step: int, weights: jax.Array | None = None) -> Generator[Feed, None, None]:
        """Yield one `Feed` for each of the steps, which lie in one epoch; `weights` `[N]` are `TrainState.weights`."""

    def examples(self, step: jax.Array, positions: jax.Array, *args: Any, **parts: Any) -> data.Examples:
        """Return, on a device, the examples at its positions `[B]` of the step's global batch, from the feed."""

    def test_feeds(self) -> Generator[tuple[int, Feed], None, None]:
        """Yield first index and feed of every evaluation step."""

    def test_examples(self, index: jax.Array, *args: Any, **parts: Any) -> tuple[jax.Array, jax.Array]:
        """Return, on a device, images and labels of its test examples `[B]`, from the feed."""

    def close(self) -> None:
        """End the work in the background, where there is any."""


def part_positions(num_parts: int, sizes: StepSizes, num_devices: int) -> np.ndarray:
    """Return the positions `[P, D, B]` of a step's examples: B for each of the D devices in each of the P parts.

    A part is a run of neighbours in the global batch, however many devices there are.
    """
    return np.arange(sizes.examples, dtype=np.int32).reshape(num_parts, num_devices, -1)


def make_order(config: ConfigDict, num_examples: int) -> Callable[..., jax.Array]:
    """Return `order(epoch, weights)`: the examples `[N]` int32 of an epoch, a function of seed, epoch and weights.

    Without weights, or with equal weights, the order is a permutation; else the examples are drawn with replacement.
    """
    key = noise.stream_key(config.seed, noise.Stream.ORDER)
    permutation = jax.jit(lambda epoch: jax.random.permutation(noise.fold(key, epoch), num_examples))

    def order(epoch: int, weights: jax.Array | None = None) -> jax.Array:
        if weights is None or (weights == weights[0]).all():
            return permutation(epoch)
        return jax.numpy.asarray(noise.weighted_draws(noise.fold(key, epoch), np.asarray(weights)))

    return order


def step_sizes(config: ConfigDict, num_examples: int) -> StepSizes:
    """Return the sizes of the published step: `batch_size` noisy images, M copies of batch_size / M examples."""
    examples = config.batch_size // config.num_noise
    return StepSizes(examples, -(-num_examples // examples))

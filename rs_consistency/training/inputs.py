"""How examples get to the devices: a dataset that lies there as a whole, or one that is streamed."""

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data, noise


class StepSizes(NamedTuple):
    """How an epoch divides into steps.

    Attributes:
      examples: examples in a step, over all devices: batch_size / M.
      steps: steps in an epoch, the last one filled up from the start of the same order.
    """

    examples: int
    steps: int


class Feed(NamedTuple):
    """What a compiled step gets beside the state: replicated arguments, and parts `[D, ...]` for the D devices."""

    args: tuple[Any, ...] = ()
    parts: Mapping[str, Any] = {}


class Inputs(Protocol):
    """The examples of a run.

    Attributes:
      num_test_examples: number of test examples.
      same_feed: whether all steps of an epoch have the same feed.
    """

    num_test_examples: int
    same_feed: bool

    def feeds(self, first_step: int, end_step: int) -> Generator[Feed, None, None]:
        """One `Feed` for each of the steps, which lie in one epoch."""
        ...

    def examples(self, step: jax.Array, positions: jax.Array, *args: Any, **parts: Any) -> data.Examples:
        """On a device: the examples at its positions `[B]` of the step's global batch, from the feed."""
        ...

    def test_feeds(self) -> Generator[tuple[int, Feed], None, None]:
        """First index and feed of every evaluation step."""
        ...

    def test_examples(self, index: jax.Array, *args: Any, **parts: Any) -> tuple[jax.Array, jax.Array]:
        """On a device: images and labels of its test examples `[B]`, from the feed."""
        ...

    def close(self) -> None:
        """Ends what works in the background."""
        ...


def part_positions(num_parts: int, sizes: StepSizes, num_devices: int) -> np.ndarray:
    """Places `[P, D, B]` of the examples of a step: B for each of the D devices in each of the P parts of the step.

    A part is a run of neighbours in the global batch, however many devices there are.
    """
    return np.arange(sizes.examples, dtype=np.int32).reshape(num_parts, num_devices, -1)


def make_order(config: ConfigDict, num_examples: int) -> Callable[[int], jax.Array]:
    """Returns `order(epoch)`: the permutation `[N]` int32 of the examples, a function of seed and epoch."""
    key = noise.stream_key(config.seed, noise.Stream.ORDER)
    return jax.jit(lambda epoch: jax.random.permutation(noise.fold(key, epoch), num_examples))


def step_sizes(config: ConfigDict, num_examples: int) -> StepSizes:
    """The published step: `batch_size` noisy images, M copies of batch_size / M examples."""
    examples = config.batch_size // config.num_noise
    return StepSizes(examples, -(-num_examples // examples))

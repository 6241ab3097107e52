"""How examples get to the devices: a dataset that lies there as a whole, or one that is streamed."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data, noise
from rs_consistency.devices import parallel


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


class ArrayInputs:
    """Whole arrays, replicated on the devices, which pick their examples themselves: nothing crosses from the host."""

    same_feed = True

    def __init__(
        self,
        config: ConfigDict,
        train: data.Split,
        test: data.Split,
        *,
        extra: Mapping[str, np.ndarray],
        sizes: StepSizes,
        devices: Sequence[jax.Device],
    ) -> None:
        """Copies the arrays; `extra` `[N, ...]` are what the method knows of every training example."""
        self._sizes, self._devices = sizes, devices
        self._train = parallel.replicate(data.Examples(train.images, train.labels, dict(extra)), devices)
        self._test = parallel.replicate(tuple(test), devices)
        self._eval_batch_size = config.eval_batch_size
        self._order = make_order(config, len(train.labels))
        self.num_test_examples = len(test.labels)

    def feeds(self, first_step: int, end_step: int) -> Generator[Feed, None, None]:
        """See `Inputs`."""
        feed = Feed((self._train, parallel.replicate(self._order(first_step // self._sizes.steps), self._devices)))
        for _ in range(first_step, end_step):
            yield feed

    def examples(self, step: jax.Array, positions: jax.Array, train: data.Examples, order: jax.Array) -> data.Examples:
        """See `Inputs`."""
        place = (step % self._sizes.steps) * self._sizes.examples + positions
        chosen = order[place % order.shape[0]]
        return jax.tree.map(lambda rows: rows[chosen], train)

    def test_feeds(self) -> Generator[tuple[int, Feed], None, None]:
        """See `Inputs`."""
        for start in range(0, self.num_test_examples, self._eval_batch_size):
            yield start, Feed((self._test,))

    def test_examples(self, index: jax.Array, test: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """See `Inputs`."""
        images, labels = test
        return images[index], labels[index]

    def close(self) -> None:
        """Nothing works in the background."""


def open_inputs(
    config: ConfigDict,
    train: data.OpenSplit,
    test: data.OpenSplit,
    *,
    extra: Mapping[str, np.ndarray],
    sizes: StepSizes,
    devices: Sequence[jax.Device],
) -> Inputs:
    """The inputs of a run, by the kind of its dataset."""
    if isinstance(train, data.ArraySplit):
        return ArrayInputs(config, train.arrays, test.arrays, extra=extra, sizes=sizes, devices=devices)
    from rs_consistency.stream_inputs import StreamInputs  # slow to import, and only needed here

    return StreamInputs(config, train, test, sizes=sizes, devices=devices)


def part_positions(num_parts: int, sizes: StepSizes, num_devices: int) -> np.ndarray:
    """Places `[P, D, B]` of the examples of a step: B for each of the D devices in each of the P parts of the step.

    A part is a run of neighbours in the global batch, however many devices there are.
    """
    return np.arange(sizes.examples, dtype=np.int32).reshape(num_parts, num_devices, -1)


def make_order(config: ConfigDict, num_examples: int) -> Callable[[int], jax.Array]:
    """Returns `order(epoch)`: the permutation `[N]` int32 of the examples, a function of seed and epoch."""
    key = noise.stream_key(config.seed, noise.Stream.ORDER)
    return jax.jit(lambda epoch: jax.random.permutation(noise.fold(key, epoch), num_examples))

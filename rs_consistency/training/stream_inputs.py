"""Inputs of a streamed dataset: decoded by worker processes, copied to the devices ahead of the step."""

from collections import deque
from collections.abc import Generator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.data import streaming
from rs_consistency.devices import parallel
from rs_consistency.training.inputs import Feed, Inputs, part_positions, step_sizes

_AHEAD = 2  # batches that wait on the devices, so that copying them overlaps with the step


class StreamInputs(Inputs):
    """Batches that worker processes decode, copied to the devices while the step before is computed."""

    same_feed = False

    def __init__(
        self,
        config: ConfigDict,
        train: streaming.StreamedSplit,
        test: streaming.StreamedSplit,
        *,
        devices: Sequence[jax.Device],
    ) -> None:
        """Opens nothing yet: the workers start with the first feed."""
        self._config, self._train, self._test = config, train, test
        self.sizes, self.devices = step_sizes(config, len(train)), devices
        self._batches: streaming.Batches | None = None
        self._next_step = 0
        self.num_test_examples = len(test)

    def feeds(self, first_step: int, end_step: int, weights: jax.Array | None = None) -> Generator[Feed, None, None]:
        """See `Inputs`. The same workers make the feeds of successive epochs. No method weighs streamed examples."""
        del weights
        waiting: deque[Feed] = deque()
        batches = self._batches_from(first_step)
        for _ in range(first_step, end_step):
            waiting.append(self._divide(*next(batches)))
            self._next_step += 1
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting

    def examples(self, step: jax.Array, positions: jax.Array, images: jax.Array, labels: jax.Array) -> data.Examples:
        """See `Inputs`."""
        del step, positions  # the host has cut the batch accordingly
        return data.Examples(images, labels, {})

    def test_feeds(self) -> Generator[tuple[int, Feed], None, None]:
        """See `Inputs`."""
        size = self._config.eval_batch_size
        per_device = -(-size // len(self.devices))
        workers = self._config.dataset.num_workers
        with streaming.evaluation_batches(self._test, batch_size=size, num_workers=workers) as batches:
            for number, batch in enumerate(batches):
                parts = [np.resize(array, (len(self.devices), per_device, *array.shape[1:])) for array in batch]
                yield number * size, self._on_devices(*parts)

    def test_examples(self, index: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Inputs`."""
        del index
        return images, labels

    def close(self) -> None:
        """End the workers."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _batches_from(self, step: int) -> streaming.Batches:
        if self._batches is None or self._next_step != step:
            self.close()
            self._batches = streaming.training_batches(
                self._train,
                seed=self._config.seed,
                batch_size=self.sizes.examples,
                steps_per_epoch=self.sizes.steps,
                first_step=step,
                num_steps=self.sizes.steps * self._config.num_epochs,
                num_workers=self._config.dataset.num_workers,
            )
            self._next_step = step
        return self._batches

    def _divide(self, images: np.ndarray, labels: np.ndarray) -> Feed:
        places = part_positions(self._config.accumulate_steps, self.sizes, len(self.devices))  # [P, D, B]
        order = places.swapaxes(0, 1).reshape(len(self.devices), -1)  # [D, P*B]
        return self._on_devices(images[order], labels[order])

    def _on_devices(self, images: np.ndarray, labels: np.ndarray) -> Feed:
        return Feed(parts=parallel.divide({"images": images, "labels": labels}, self.devices))

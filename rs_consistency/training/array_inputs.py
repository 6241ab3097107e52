"""Inputs of a dataset in memory: whole arrays lie on the devices."""

from collections.abc import Generator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.devices import parallel
from rs_consistency.training.inputs import Feed, Inputs, make_order, step_sizes


class ArrayInputs(Inputs):
    """Whole arrays, replicated on the devices, which pick their examples themselves: nothing crosses from the host."""

    same_feed = True

    def __init__(
        self,
        config: ConfigDict,
        train: data.Split,
        test: data.Split,
        *,
        devices: Sequence[jax.Device],
        extra: Mapping[str, np.ndarray],
    ) -> None:
        """Copies the arrays; `extra` `[N, ...]` becomes `Batch.extra` of a method."""
        self.sizes, self.devices = step_sizes(config, len(train)), devices
        self._train = parallel.replicate(data.Examples(train.images, train.labels, dict(extra)), devices)
        self._test = parallel.replicate(tuple(test), devices)
        self._eval_batch_size = config.eval_batch_size
        self._order = make_order(config, len(train))
        self.num_test_examples = len(test)

    def feeds(self, first_step: int, end_step: int, weights: jax.Array | None = None) -> Generator[Feed, None, None]:
        """See `Inputs`."""
        order = self._order(first_step // self.sizes.steps, weights)
        feed = Feed((self._train, parallel.replicate(order, self.devices)))
        for _ in range(first_step, end_step):
            yield feed

    def examples(self, step: jax.Array, positions: jax.Array, train: data.Examples, order: jax.Array) -> data.Examples:
        """See `Inputs`."""
        place = (step % self.sizes.steps) * self.sizes.examples + positions
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

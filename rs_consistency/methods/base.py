"""What a training method is, receives and returns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency.data import Split


class Batch(NamedTuple):
    """The examples of a step, or a part of them: B examples and M noisy copies of each.

    Attributes:
      images: `[B, H, W, C]` float32 in [0, 1].
      labels: `[B]` int32.
      noise: `[M, B, H, W, C]` float32, scaled by sigma.
      keys: `[B]` random keys of the examples, for whatever else a method draws; independent of the noise.
      epoch: int32 scalar, the number of whole epochs before this step.
      extra: what the method's `prepare` made, the rows `[B, ...]` of these examples.
    """

    images: jax.Array
    labels: jax.Array
    noise: jax.Array
    keys: jax.Array
    epoch: jax.Array
    extra: Mapping[str, jax.Array]


class Classifier(Protocol):
    """The model, as a method sees it."""

    def noisy(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Logits `[M, B, K]` of images `[B, H, W, C]` under noise `[M, B, H, W, C]`, in training mode.

        Batch statistics are those of all copies of all examples of this call, on all devices.
        """
        ...

    def clean(self, images: jax.Array) -> jax.Array:
        """Logits `[B, K]` of the images themselves, in training mode."""
        ...

    def frozen(self, images: jax.Array) -> jax.Array:
        """Logits `[N, K]` in inference mode, with constant parameters: for attacks."""
        ...


class MethodOutput(NamedTuple):
    """Loss terms of one batch.

    Attributes:
      terms: name -> `[B]`; the loss is their sum.
      logits: `[M, B, K]` of the noisy copies, for the consistency term.
    """

    terms: Mapping[str, jax.Array]
    logits: jax.Array


Terms = Callable[[Classifier, Batch], MethodOutput]


def _nothing(config: ConfigDict) -> None:
    del config


class Method(NamedTuple):
    """An entry of `METHODS`.

    Attributes:
      build: config -> the function that computes the terms of a batch.
      check: raises a `UserError` for a setting in this method's block of the config that cannot work.
      sources: keys of the config that name workdirs of other runs on the same dataset, and what these runs are. They
        must be there when a run starts.
      prepare: what has to be known of every training example before the first step, name -> `[N, ...]`; called with
        (config, training split, devices, workdir), and expected to keep what it finds in the workdir. None: nothing.
    """

    build: Callable[[ConfigDict], Terms]
    check: Callable[[ConfigDict], None] = _nothing
    sources: Mapping[str, str] = {}
    prepare: Callable[[ConfigDict, Split, list[jax.Device], Path], Mapping[str, np.ndarray]] | None = None


def warmup(epoch: jax.Array, warmup_epochs: int) -> jax.Array:
    """The factor that grows linearly over the first epochs: `min(1, (epoch + 1) / warmup_epochs)`; 0 epochs: 1."""
    return jax.numpy.minimum(1.0, (epoch + 1) / max(warmup_epochs, 1))


def pick(keys: jax.Array, draw: Callable[[jax.Array], Any]) -> Any:
    """`draw(key)` for every example's key `[B]`."""
    return jax.vmap(draw)(keys)

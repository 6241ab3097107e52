"""The interface of a training method: its arguments, its result, its entry in `METHODS`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict


class Batch(NamedTuple):
    """The examples of a step, or a part of them: B examples and M noisy copies of each.

    Attributes:
      images: `[B, H, W, C]` float32 in [0, 1].
      labels: `[B]` int32.
      noise: `[M, B, H, W, C]` float32, scaled by sigma.
      keys: `[B]` random keys of the examples, for all other draws of a method; independent of the noise.
      epoch: int32 scalar, the number of whole epochs before this step.
      extra: for a method with a teacher, `smoothed`: the teacher's smoothed predictions `[B, K]` of the examples.
    """

    images: jax.Array
    labels: jax.Array
    noise: jax.Array
    keys: jax.Array
    epoch: jax.Array
    extra: Mapping[str, jax.Array]


class Classifier(Protocol):
    """The model, as methods use it."""

    def noisy(self, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Return logits `[M, B, K]` of images `[B, H, W, C]` under noise `[M, B, H, W, C]`, in training mode.

        Batch statistics are over all copies of all examples of this call, on all devices.
        """

    def clean(self, images: jax.Array) -> jax.Array:
        """Return logits `[B, K]` of the images themselves, in training mode."""

    def frozen(self, images: jax.Array) -> jax.Array:
        """Return logits `[N, K]` in inference mode, with constant parameters: for attacks."""


class MethodOutput(NamedTuple):
    """Loss terms of one batch.

    Attributes:
      terms: name -> `[B]`; the loss is their sum.
      logits: `[M, B, K]` of the noisy copies, for the consistency term.
    """

    terms: Mapping[str, jax.Array]
    logits: jax.Array


Terms = Callable[[Classifier, Batch], MethodOutput]


class Teacher(NamedTuple):
    """Another run, on the same dataset, from whose smoothed predictions a method learns.

    The run must be there when training starts. Its smoothed predictions of the training images are computed first, and
    reach the method as `Batch.extra["smoothed"]`.

    Attributes:
      workdir_key: key of the config with the run's workdir.
      num_votes_key: key of the config with the number of votes for each training image.
      description: kind of run, for messages.
    """

    workdir_key: str
    num_votes_key: str
    description: str


class Accuracy(Protocol):
    """The accuracy of the model, as it stands between two epochs, on noisy copies of training images."""

    def __call__(self, num_votes: int, asked: np.ndarray) -> np.ndarray:
        """Return the shares `[N]` of right votes on the images that are `asked` `[N]` (bool) about; 0 on the others.

        The votes are cast in inference mode on the images as they are, without augmentation, under fresh noise.
        """


# (config, epoch from 0, weights, accuracy) -> weights of the epoch. The weights `[N]` say how often the examples are
# drawn; they are at least 0, and the given ones are the weights of the epoch before, 1 before the first.
Choose = Callable[[ConfigDict, int, np.ndarray, Accuracy], np.ndarray]


class Method(NamedTuple):
    """An entry of `METHODS`.

    Attributes:
      build: config -> the function that computes the terms of a batch.
      check: raises a `UserError` for a setting in this method's block of the config that cannot work.
      teacher: the run that the method learns from; None for most methods.
      choose: weighs the training examples before every epoch. Where all weights are equal, the epoch has every example
        once; else N of them are drawn, with replacement. None for most methods: all examples in every epoch.
    """

    build: Callable[[ConfigDict], Terms]
    check: Callable[[ConfigDict], None] = lambda config: None
    teacher: Teacher | None = None
    choose: Choose | None = None


def warmup(epoch: jax.Array, warmup_epochs: int) -> jax.Array:
    """Return `min(1, (epoch + 1) / warmup_epochs)`, which grows linearly over the first epochs; 1 for 0 epochs."""
    return jax.numpy.minimum(1.0, (epoch + 1) / max(warmup_epochs, 1))


def pick(keys: jax.Array, draw: Callable[[jax.Array], Any]) -> Any:
    """Return `draw(key)` for every example's key `[B]`."""
    return jax.vmap(draw)(keys)

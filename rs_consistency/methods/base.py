"""What a training method receives and returns."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

# (images [B, H, W, C], noise [M, B, H, W, C]) -> logits [M, B, K] of the images with sigma times the noise added.
NoisyLogits = Callable[[jax.Array, jax.Array], jax.Array]


class MethodOutput(NamedTuple):
    """Loss terms of one batch.

    Attributes:
      terms: name -> `[B]`; the loss is their sum.
      logits: `[M, B, K]` of the noisy copies, for the consistency term.
    """

    terms: Mapping[str, jax.Array]
    logits: jax.Array

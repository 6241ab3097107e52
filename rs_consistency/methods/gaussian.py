"""Gaussian augmentation: cross entropy on noisy copies. Cohen, Rosenfeld, Kolter (ICML 2019)."""

import jax

from rs_consistency import losses
from rs_consistency.methods.base import MethodOutput, NoisyLogits


def terms(noisy_logits: NoisyLogits, images: jax.Array, labels: jax.Array, noise: jax.Array) -> MethodOutput:
    """Mean over the M copies of CE(f(x + d_i), y)."""
    logits = noisy_logits(images, noise)
    return MethodOutput({"cross_entropy": losses.cross_entropy(logits, labels)}, logits)

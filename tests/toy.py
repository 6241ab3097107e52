"""A linear classifier of the pixels, as a model named `linear`: for tests about files, flags and interruptions.

Its programs compile in a fraction of LeNet's time. `conftest.py` imports this module for the programs in its process,
`helpers.start(..., toy=True)` in a process of its own. `main` is the program of a plan's cell that knows the model.
"""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from rs_consistency import models
from rs_consistency.models.layers import ImageClassifier, dense


class Linear(ImageClassifier):
    """One dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        pixels = self.prepare(images)
        return dense(pixels.reshape(len(pixels), -1).astype(jnp.float32), self.num_classes)


models.MODELS["linear"] = Linear


def main(arguments):
    """Run train, certify or the measurement of a plan, whichever the arguments are for."""
    if any(word.startswith("--config") for word in arguments):
        name = "measure" if any(word.endswith("/.measured") for word in arguments) else "train"
    else:
        name = "certify"
    importlib.import_module(f"rs_consistency.cli.{name}").main(arguments)

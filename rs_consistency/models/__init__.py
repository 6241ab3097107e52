"""Models by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency.common.errors import UserError
from rs_consistency.models.cifar_resnet import CifarResNet
from rs_consistency.models.densenet import DenseNet
from rs_consistency.models.lenet import LeNet
from rs_consistency.models.resnet import ResNet
from rs_consistency.models.wide_resnet import WideResNet

DTYPES = ("float32", "bfloat16")  # in which a model may compute

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet20": functools.partial(CifarResNet, depth=20),
    "resnet110": functools.partial(CifarResNet, depth=110),
    "densenet40": functools.partial(DenseNet, layers=6),
    "wideresnet28_10": functools.partial(WideResNet, depth=28, widen=10),
    "resnet50": functools.partial(ResNet, blocks=(3, 4, 6, 3)),
}

# Models that stay fast inside a compiled loop on the CPU, and whose examples do not depend on each other. LeNet's
# convolutions are matrix products there (`convolution.py`).
QUICK_IN_LOOPS = frozenset({"lenet"})


def create_model(
    name: str,
    *,
    num_classes: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    dtype: Any = jnp.float32,
    axis_name: Sequence[str] = (),
) -> nn.Module:
    """Return a flax module: `init(key, images)`, `apply(variables, images, train=False)` -> float32 logits `[N, K]`.

    With `train=True` a model with batch normalization needs `mutable=["batch_stats"]` and uses the statistics of its
    batch, averaged over the axes `axis_name`. The model raises a ValueError for images of a shape that it cannot take.

    Args:
      name: a key of `MODELS`.
      num_classes: K.
      mean: per-channel mean of the normalization inside the model; empty for none.
      std: per-channel standard deviation, likewise.
      dtype: float32 or bfloat16, for the activations; parameters, batch statistics and logits are float32.
      axis_name: names of the vmap and pmap axes that share batch statistics in training; empty for none.

    Raises:
      UserError: for an unknown name.
    """
    if name not in MODELS:
        raise UserError(f"model={name!r} is unknown; use one of {', '.join(sorted(MODELS))}")
    return MODELS[name](
        num_classes=num_classes, mean=tuple(mean), std=tuple(std), dtype=dtype, axis_name=tuple(axis_name)
    )


def count_parameters(variables: Any) -> int:
    """Return the number of a model's parameters, without batch statistics."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))

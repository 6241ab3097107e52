"""Models by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rs_consistency.common.checks import MOST, check_all, number_array, one_of, shown, whole_number
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
      UserError: for an unknown name, or another argument outside its range.
    """
    one_of("model", name, MODELS)
    num_classes = whole_number("num_classes", num_classes, at_least=1, at_most=MOST)
    mean, std = (number_array(name, values).astype(np.float64) for name, values in (("mean", mean), ("std", std)))
    if mean.ndim != 1 or mean.shape != std.shape:
        raise UserError(f"mean has shape {mean.shape} and std {std.shape}; give one number of each for each channel")
    check_all("mean", mean, np.isfinite(mean), "use finite numbers")
    check_all("std", std, np.isfinite(std) & (std > 0), "use numbers greater than 0")
    if not isinstance(axis_name, tuple | list) or not all(isinstance(name, str) for name in axis_name):
        raise UserError(f"axis_name={shown(axis_name)}: use a tuple of names")
    settings = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist()), "dtype": _checked_dtype(dtype)}
    return MODELS[name](num_classes=num_classes, axis_name=tuple(axis_name), **settings)


def count_parameters(variables: Any) -> int:
    """Return the number of a model's parameters, without batch statistics."""
    try:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))
    except (TypeError, KeyError, IndexError, AttributeError):
        raise UserError(f'variables={shown(variables)}: use the variables of a model, with "params"') from None


def _checked_dtype(dtype: Any) -> Any:
    """Return the type in which a model computes."""
    try:
        name = jnp.dtype(dtype).name if dtype is not None else None
    except Exception:  # anything may be given
        name = None
    if name not in DTYPES:
        raise UserError(f"dtype={shown(dtype)}: use one of {', '.join(DTYPES)}")
    return dtype

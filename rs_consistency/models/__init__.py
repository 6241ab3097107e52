"""Models by name."""

from collections.abc import Sequence

import flax.linen as nn

from rs_consistency.errors import UserError
from rs_consistency.models.lenet import LeNet

DTYPES = ("float32", "bfloat16")

MODELS: dict[str, type[nn.Module]] = {
    "lenet": LeNet,
}


def create_model(
    name: str, *, num_classes: int, mean: Sequence[float] = (), std: Sequence[float] = (), dtype=None, axis_name=()
) -> nn.Module:
    """A flax linen module: `init(key, images)`, `apply(variables, images, train=False)` -> logits `[N, K]`.

    Args:
      name: a key of `MODELS`.
      num_classes: K.
      mean: per-channel mean of the normalization that is part of the model; empty for none.
      std: per-channel standard deviation of it.

    Raises:
      UserError: for an unknown name.
    """
    if name not in MODELS:
        raise UserError(f"model={name!r} is unknown; use one of {', '.join(sorted(MODELS))}")
    return MODELS[name](num_classes=num_classes, mean=tuple(mean), std=tuple(std))

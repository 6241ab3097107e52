"""Checks a configuration before anything is computed, and says which of its keys shape the result."""

import math
from typing import Any

from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.common.checks import LARGEST, MAX_SEED, count, number_above, number_from, one_of, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.data import DATASETS, dataset_info
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.methods import METHODS
from rs_consistency.models import DTYPES, MODELS

# Where and how a run is computed, not what: they may change between a run and its continuation.
PLACE_KEYS = frozenset(
    {
        "dataset.data_dir",
        "dataset.cache_dir",
        "dataset.num_workers",
        "eval_batch_size",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "checkpoint_keep",
        "num_devices",
    }
)


def flatten(config: ConfigDict | dict[str, Any]) -> dict[str, Any]:
    """Nested keys as `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat.update({f"{key}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def validate(config: ConfigDict, *, num_devices: int) -> None:
    """Raises a `UserError` that names key, value and remedy for the first setting that cannot work.

    Args:
      config: with the keys of `configs/default.py`.
      num_devices: devices that the run will use.
    """
    one_of("dataset.name", config.dataset.name, DATASETS)
    one_of("dataset.augment", config.dataset.augment, AUGMENTATIONS)
    one_of("model", config.model, MODELS)
    one_of("dtype", config.dtype, DTYPES)
    one_of("method", config.method, METHODS)
    one_of("consistency.form", config.consistency.form, losses.FORMS)

    flat = flatten(config)
    for key in ("optimizer.lr", "optimizer.lr_gamma"):
        number_above(key, flat[key], 0)
    number_above("sigma", config.sigma, 0, at_most=LARGEST)
    for key in ("optimizer.weight_decay", "optimizer.momentum"):
        number_from(key, flat[key], at_least=0)
    for key in ("consistency.lbd", "consistency.eta"):
        number_from(key, flat[key], at_least=0, at_most=LARGEST)
    if config.optimizer.momentum >= 1:
        raise UserError(f"optimizer.momentum={config.optimizer.momentum}: use a number in [0, 1)")
    for key in (
        "num_noise",
        "batch_size",
        "accumulate_steps",
        "num_epochs",
        "optimizer.lr_step_size",
        "eval_batch_size",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_keep",
    ):
        count(key, flat[key])
    count("checkpoint_every_steps", config.checkpoint_every_steps, at_least=0)
    count("dataset.num_workers", config.dataset.num_workers, at_least=0, at_most=1000)
    whole_number("seed", config.seed, at_least=0, at_most=MAX_SEED)

    if config.consistency.lbd > 0 and config.num_noise < 2:
        raise UserError(
            f"consistency.lbd={config.consistency.lbd} needs at least two noisy copies of an example, but"
            f" num_noise={config.num_noise}; set --config.num_noise=2, or --config.consistency.lbd=0"
        )
    parts = {"num_noise": config.num_noise, "accumulate_steps": config.accumulate_steps}
    if config.batch_size % (math.prod(parts.values()) * num_devices):
        named = " times ".join(f"{key}={value}" for key, value in parts.items() if key == "num_noise" or value > 1)
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {named} times {num_devices} device(s);"
            f" use a multiple of {math.prod(parts.values()) * num_devices}, or another --config.num_devices"
        )
    for method in METHODS.values():  # also of those that are not in use: the whole config is what a run is known by
        method.check(config)
    method = METHODS[config.method]
    for key, description in method.sources.items():
        if not flat[key]:
            raise UserError(
                f"{key}={flat[key]!r}: method {config.method} needs the workdir of {description}; train one, and give"
                f" it with --config.{key}=..."
            )
    is_streamed = dataset_info(config.dataset.name).read is None
    if is_streamed and config.dataset.augment != "none":
        raise UserError(
            f"dataset.augment={config.dataset.augment!r}: images of {config.dataset.name} are cropped and flipped as"
            " they are decoded; use none"
        )
    if is_streamed and method.prepare is not None:
        raise UserError(
            f"method={config.method!r} computes something of every training image beforehand, and dataset"
            f" {config.dataset.name} is streamed; use another method, or a dataset that fits into memory"
        )


def differing_keys(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Lines `key: other's value -> my value` for keys that shape the result and differ."""
    mine, other = flatten(mine), flatten(other)
    missing = "(no such key)"
    return [
        f"{key}: {other.get(key, missing)!r} -> {mine.get(key, missing)!r}"
        for key in sorted(mine.keys() | other.keys())
        if key not in PLACE_KEYS and mine.get(key, missing) != other.get(key, missing)
    ]

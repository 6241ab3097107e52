"""Checks of a configuration before anything is computed, and the keys that shape the result of a run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from rs_consistency import losses
from rs_consistency.common.checks import LARGEST, MAX_SEED, count, number_above, number_from, one_of, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.data import DATASETS, dataset_info
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.methods import METHODS
from rs_consistency.models import DTYPES, MODELS

# Keys of where and how a run is computed. They may change between a run and its continuation.
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

# Key -> check(key, value), in the order of the checks. Methods check their own blocks.
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "dataset.name": partial(one_of, names=DATASETS),
    "dataset.augment": partial(one_of, names=AUGMENTATIONS),
    "model": partial(one_of, names=MODELS),
    "dtype": partial(one_of, names=DTYPES),
    "method": partial(one_of, names=METHODS),
    "consistency.form": partial(one_of, names=losses.FORMS),
    "optimizer.lr": partial(number_above, limit=0),
    "optimizer.lr_gamma": partial(number_above, limit=0),
    "sigma": partial(number_above, limit=0, at_most=LARGEST),
    "optimizer.weight_decay": partial(number_from, at_least=0),
    "optimizer.momentum": partial(number_from, at_least=0),
    "consistency.lbd": partial(number_from, at_least=0, at_most=LARGEST),
    "consistency.eta": partial(number_from, at_least=0, at_most=LARGEST),
    "num_noise": count,
    "batch_size": count,
    "accumulate_steps": count,
    "num_epochs": count,
    "optimizer.lr_step_size": count,
    "eval_batch_size": count,
    "eval_every_epochs": count,
    "checkpoint_every_epochs": count,
    "checkpoint_keep": count,
    "checkpoint_every_steps": partial(count, at_least=0),
    "dataset.num_workers": partial(count, at_least=0, at_most=1000),
    "seed": partial(whole_number, at_least=0, at_most=MAX_SEED),
}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by flat key, such as `optimizer.lr`."""
    return flatten_dict(config.to_dict() if isinstance(config, ConfigDict) else config, sep=".")


def validate(config: ConfigDict, *, num_devices: int) -> None:
    """Raise a `UserError` that names key, value and remedy for the first setting that cannot work."""
    flat = flatten(config)
    for key, check in _CHECKS.items():
        check(key, flat[key])
    if config.optimizer.momentum >= 1:
        raise UserError(f"optimizer.momentum={config.optimizer.momentum}: use a number in [0, 1)")
    _check_batch(config, num_devices)
    for name, method in METHODS.items():
        if name in config or name == config.method:  # the run of an older version lacks the blocks of newer methods
            method.check(config)
    _check_method(config, flat)


def _check_batch(config: ConfigDict, num_devices: int) -> None:
    if config.consistency.lbd > 0 and config.num_noise < 2:
        raise UserError(
            f"consistency.lbd={config.consistency.lbd} needs at least two noisy copies of an example, but"
            f" num_noise={config.num_noise}; set --config.num_noise=2, or --config.consistency.lbd=0"
        )
    divisor = config.num_noise * config.accumulate_steps * num_devices
    if config.batch_size % divisor:
        parts = f" times accumulate_steps={config.accumulate_steps}" if config.accumulate_steps > 1 else ""
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by num_noise={config.num_noise}{parts} times"
            f" {num_devices} device(s); use a multiple of {divisor}, or another --config.num_devices"
        )


def _check_method(config: ConfigDict, flat: Mapping[str, Any]) -> None:
    """Raise a `UserError` where the method lacks its teacher, or method and dataset do not go together."""
    teacher, choose = METHODS[config.method].teacher, METHODS[config.method].choose
    if teacher and not flat[teacher.workdir_key]:
        key = teacher.workdir_key
        raise UserError(
            f"{key}={flat[key]!r}: method {config.method} needs the workdir of {teacher.description}; train one, and"
            f" give it with --config.{key}=..."
        )
    is_streamed = dataset_info(config.dataset.name).read is None
    if is_streamed and config.dataset.augment != "none":
        raise UserError(
            f"dataset.augment={config.dataset.augment!r}: images of {config.dataset.name} are cropped and flipped as"
            " they are decoded; use none"
        )
    if is_streamed and (teacher or choose):
        raise UserError(
            f"method={config.method!r} counts votes on every training image, and dataset"
            f" {config.dataset.name} is streamed; use another method, or a dataset that fits into memory"
        )


def differing_keys(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return lines `key: other's value -> my value` for keys that shape the result and differ.

    Blocks of methods that neither config uses shape nothing.
    """
    mine, other = flatten(mine), flatten(other)
    missing = "(no such key)"
    unused = METHODS.keys() - {config.get("method") for config in (mine, other)}
    return [
        f"{key}: {other.get(key, missing)!r} -> {mine.get(key, missing)!r}"
        for key in sorted(mine.keys() | other.keys())
        if key not in PLACE_KEYS
        and key.split(".")[0] not in unused
        and mine.get(key, missing) != other.get(key, missing)
    ]

"""Checks of a configuration before anything is computed, and the keys that shape the result of a run."""

import runpy
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, RequiredValueError

from rs_consistency import losses
from rs_consistency.common.checks import (
    LARGEST,
    MAX_SEED,
    count,
    no_such_key,
    number_above,
    number_from,
    one_of,
    shown,
    whole_number,
)
from rs_consistency.common.errors import UserError
from rs_consistency.data import DATASETS, dataset_info
from rs_consistency.data.augment import AUGMENTATIONS
from rs_consistency.methods import METHODS
from rs_consistency.models import DTYPES, MODELS

_DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "default.py"  # of a clone, and of an installed wheel
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}

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


def check_keys(config: ConfigDict | Mapping[str, Any]) -> None:
    """Check the keys of a configuration and the types of its values against configs/default.py.

    A whole number may stand for a number. A run of an older version may lack the blocks of methods that it does not
    use. A block that configs/default.py lacks is left to the check of the method that has its name.

    Raises:
      UserError: names the first key that is not known, is missing, or has a value of another type.
    """
    known, content = _default(), _content("config", config)
    unused = {name: known[name] for name in METHODS if name in known and name not in content}
    own = {name: content[name] for name in METHODS if name not in known and name in content}
    _check_block("", {**unused, **content}, {**known, **own})
    if content["method"] in unused:
        raise _lacks(content["method"])


@cache
def _default() -> dict[str, Any]:
    """Return the settings of the project's configs/default.py, whichever folder is the package `configs`."""
    return runpy.run_path(str(_DEFAULT))["get_config"]().to_dict()


def _content(name: str, block: Any) -> dict[Any, Any]:
    """Return the keys of a block with their values; what a reference of ml_collections refers to."""
    if not isinstance(block, ConfigDict | Mapping):
        raise UserError(f"{name}={_shown(block)}: use a block of keys, a ConfigDict")
    try:
        if isinstance(block, ConfigDict):
            block = dict(block.items(preserve_field_references=True))
        references = {key: value for key, value in block.items() if isinstance(value, FieldReference)}
        return {**block, **{key: value.get() for key, value in references.items()}}
    except TypeError:  # from sorting keys
        raise UserError(f"{name} has a key that is no text; configs/default.py names every key") from None
    except RequiredValueError:
        raise UserError(f"{name} has a placeholder without a value among {', '.join(references)}; set it") from None


def _check_block(name: str, block: Any, known: Mapping[str, Any]) -> None:
    """Raise a `UserError` for the first key of a block that is not as in the known block."""
    content, prefix = _content(name, block), f"{name}." if name else ""
    for key in content:
        if key not in known:
            raise no_such_key(f"{prefix}{key}", flatten(_default()))
    for key, default in known.items():
        if key not in content:
            raise _lacks(f"{prefix}{key}")
        if isinstance(default, Mapping):
            _check_block(f"{prefix}{key}", content[key], default)
        elif not _is_like(content[key], default):
            remedy = f"use {_KINDS[type(default)]}, such as {default!r}"
            raise UserError(f"{prefix}{key}={_shown(content[key])}: {remedy}")


def _is_like(value: Any, default: Any) -> bool:
    """Return whether a value has the type of a default. A whole number must fit into 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int):
        return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)
    return type(default) in (int, float) and abs(value) < 2**63


def _lacks(key: str) -> UserError:
    return UserError(f"the config lacks a key: {key}; start from configs/default.py (or is it of another version?)")


def _shown(value: Any) -> str:
    return "a block" if isinstance(value, ConfigDict) else shown(value)


def validate(config: ConfigDict, *, num_devices: int) -> None:
    """Raise a `UserError` that names key, value and remedy for the first setting that cannot work."""
    check_keys(config)
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
    unused = [name for name in METHODS if name not in (mine.get("method"), other.get("method"))]
    return [
        f"{key}: {other.get(key, missing)!r} -> {mine.get(key, missing)!r}"
        for key in sorted(mine.keys() | other.keys())
        if key not in PLACE_KEYS
        and key.split(".")[0] not in unused
        and mine.get(key, missing) != other.get(key, missing)
    ]

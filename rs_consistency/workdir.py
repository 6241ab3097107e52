"""The folder of a run: its config, and the guard against mixing two runs in it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError
from rs_consistency.common.files import lock, read_json, write_json
from rs_consistency.config import differing_keys
from rs_consistency.training import step_sizes

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"


@contextmanager
def open_for_training(workdir: Path, config: ConfigDict, *, data_digest: str, num_examples: int) -> Iterator[None]:
    """Makes the folder or checks that it belongs to this config and data, and keeps others from training in it.

    Args:
      workdir: the folder.
      config: of the run. Keys that say where and how it is computed (`config.PLACE_KEYS`) may change: the newest count.
      data_digest: of the training data.
      num_examples: of the training data.

    Raises:
      UserError: when the folder holds another config (the differing keys are named), a run on other data, or
        checkpoints without a config, or when another process trains in it.
    """
    _check_folder(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        lock(descriptor, f"workdir={workdir}")
        _claim(workdir, json.loads(config.to_json()), data_digest, num_examples)
        yield
    finally:
        os.close(descriptor)


def finished_step(workdir: Path, config: ConfigDict) -> int | None:
    """The step of the run's last checkpoint once it is finished; None when the folder does not say."""
    data_path = workdir / DATA_FILE
    num_examples = read_json(data_path).get("train_examples") if data_path.exists() else None
    return None if num_examples is None else config.num_epochs * step_sizes(config, num_examples).steps


def check_claim(workdir: Path, config: ConfigDict, *, data_digest: str) -> None:
    """Whether a run could start or go on in the folder: arguments and errors of `open_for_training`; writes nothing."""
    _check_folder(workdir)
    _check(workdir, json.loads(config.to_json()), data_digest)


def _check_folder(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir={workdir} is a file; choose a folder")


def _claim(workdir: Path, mine: dict[str, Any], data_digest: str, num_examples: int) -> None:
    _check(workdir, mine, data_digest)
    write_json(workdir / DATA_FILE, {"train_digest": data_digest, "train_examples": num_examples})
    write_json(workdir / CONFIG_FILE, mine)


def _check(workdir: Path, mine: dict[str, Any], data_digest: str) -> None:
    path, data_path = workdir / CONFIG_FILE, workdir / DATA_FILE
    if path.exists():
        recorded = read_json(path)
        differing = differing_keys(mine, recorded)
        if differing:
            raise UserError(
                f"workdir={workdir} holds a run with another config ({'; '.join(differing)}); choose another --workdir,"
                " or set these back"
            )
        if data_path.exists() and read_json(data_path).get("train_digest") != data_digest:
            raise UserError(
                f"workdir={workdir} holds a run on other data: the training split of {mine['dataset']['name']} is not"
                " what it was; choose another --workdir, or set dataset.data_dir back"
            )
    elif (workdir / "checkpoints").exists():
        raise UserError(f"workdir={workdir} has checkpoints but no {CONFIG_FILE}; choose another --workdir")


def read_config(workdir: Path, *, name: str = "workdir") -> ConfigDict:
    """The config of a run; `name` is that of the setting that gave the folder.

    Raises:
      UserError: when the folder holds no run.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{name}={workdir} {'has no ' + CONFIG_FILE if workdir.exists() else 'does not exist'};"
            " give the folder of a run of train.py"
        )
    return ConfigDict(read_json(path))

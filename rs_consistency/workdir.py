"""The folder of a run: its config, and the guard against mixing two runs in it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rs_consistency.config import differing_keys
from rs_consistency.errors import UserError
from rs_consistency.files import lock, read_json, write_json

CONFIG_FILE = "config.json"


@contextmanager
def open_for_training(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the folder or checks that it belongs to this config, and keeps others from training in it.

    Raises:
      UserError: when the folder holds another config (the differing keys are named), or files of something else, or
        when another process trains in it.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir={workdir} is a file; choose a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        lock(descriptor, f"workdir={workdir}")
        _claim(workdir, json.loads(config.to_json()))
        yield
    finally:
        os.close(descriptor)


def _claim(workdir: Path, mine: dict[str, Any]) -> None:
    path = workdir / CONFIG_FILE
    if path.exists():
        differing = differing_keys(mine, read_json(path))
        if differing:
            raise UserError(
                f"workdir={workdir} holds a run with another config ({'; '.join(differing)}); choose another --workdir,"
                " or set these back"
            )
    elif (workdir / "checkpoints").exists():
        raise UserError(f"workdir={workdir} has checkpoints but no {CONFIG_FILE}; choose another --workdir")
    else:
        write_json(path, mine)


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run.

    Raises:
      UserError: when the folder holds no run.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"workdir={workdir} has no {CONFIG_FILE}; give the folder of a run of train.py"
            if workdir.is_dir()
            else f"workdir={workdir} does not exist; give the folder of a run of train.py"
        )
    return ConfigDict(read_json(path))

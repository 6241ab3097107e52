"""Finished or unfinished runs, read back from their workdirs: to certify, to start from, to learn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rs_consistency import training
from rs_consistency.checkpoints import Checkpoints
from rs_consistency.common.errors import UserError, note
from rs_consistency.config import PLACE_KEYS, flatten, validate
from rs_consistency.workdir import CONFIG_FILE, finished_step, read_config


class Run(NamedTuple):
    """What a workdir holds.

    Attributes:
      config: of the run.
      step: of the newest checkpoint that can be read.
      variables: the model's, from that checkpoint: `params`, and `batch_stats` where it has them.
    """

    config: ConfigDict
    step: int
    variables: dict[str, Any]


def read_valid_config(workdir: Path, *, name: str = "workdir") -> ConfigDict:
    """The config of a run, with every key of this version and no setting that cannot work; else a `UserError`."""
    config = read_config(workdir, name=name)
    try:
        validate(config, num_devices=1)
        flat = flatten(config)
        _ = [flat[key] for key in PLACE_KEYS]
    except UserError as error:
        raise UserError(f"{workdir / CONFIG_FILE}: {error}") from None
    except (AttributeError, KeyError) as error:
        raise UserError(f"{workdir / CONFIG_FILE} lacks a key ({error}); was it made by another version?") from None
    return config


def restore(workdir: Path, devices: Sequence[jax.Device], *, name: str = "workdir") -> Run:
    """Reads the newest readable checkpoint of a run, replicated on the devices.

    Args:
      workdir: the run's folder.
      devices: where the variables go.
      name: of the setting that gave the folder, for messages.

    Raises:
      UserError: when the folder holds no run, or a run without a readable checkpoint.
    """
    config = read_valid_config(workdir, name=name)
    checkpoints = Checkpoints(workdir)
    try:
        restored = checkpoints.restore_newest(training.restore_target(config, devices), note=note)
    finally:
        checkpoints.close()
    if restored is None:
        raise _no_checkpoint(workdir, name)
    step, state = restored
    return Run(config, step, state.variables)


def check_fits(config: ConfigDict, workdir: Path) -> None:
    """Whether a run can start from another: nothing is read but its config.

    Raises:
      UserError: when there is no such run, it has no checkpoint, or its variables do not fit; the first is named.
    """
    source = _with_checkpoint(workdir, name="init_from")
    mine, theirs = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree.leaves_with_path(
                training.restore_target(which, jax.local_devices()[:1]).variables
            )
        }
        for which in (config, source)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [str(tree[name].shape) if name in tree else "missing" for tree in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"init_from={workdir} does not fit: {name} is {shapes[0]} here and {shapes[1]} there"
                f" (model={source.model}, dataset {source.dataset.name}); start from a run of the same"
                " model and number of classes"
            )


def check_same_dataset(config: ConfigDict, workdir: Path, *, name: str) -> None:
    """Whether another run, given by the setting `name`, is there and of the same dataset; else a `UserError`."""
    source = _with_checkpoint(workdir, name=name)
    if source.dataset.name != config.dataset.name:
        raise UserError(
            f"{name}={workdir} was trained on {source.dataset.name}, this run is on {config.dataset.name};"
            " give a run on the same dataset"
        )


def start_from(state: training.TrainState, workdir: Path, devices: Sequence[jax.Device]) -> training.TrainState:
    """Puts the variables of another run, which `check_fits`, into a fresh state: fine-tuning."""
    variables = dict(restore(workdir, devices, name="init_from").variables)
    return state.replace(params=variables.pop("params"), model_state=variables)


def _with_checkpoint(workdir: Path, *, name: str) -> ConfigDict:
    config = read_valid_config(workdir, name=name)
    checkpoints = Checkpoints(workdir)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise _no_checkpoint(workdir, name)
    last_step = finished_step(workdir, config)
    if last_step is not None and max(steps) < last_step:
        note(f"{name}={workdir} is not finished: step {max(steps)} of {last_step}")
    return config


def _no_checkpoint(workdir: Path, name: str) -> UserError:
    return UserError(f"{name}={workdir} has no checkpoint yet; train it first, with train.py")

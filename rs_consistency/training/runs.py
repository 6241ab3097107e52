"""The folder of a run: claimed for training, and read back to certify, to start from, to learn from."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr
from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import check_utf8, lock, read_json, write_json
from rs_consistency.data import dataset_info
from rs_consistency.devices.parallel import choose_devices
from rs_consistency.methods import METHODS
from rs_consistency.models.inference import for_inference
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.config import check_keys, differing_keys, validate
from rs_consistency.training.inputs import step_sizes
from rs_consistency.training.step import make_model, restore_target

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"


@contextmanager
def open_for_training(workdir: Path, config: ConfigDict, *, data_digest: str, num_examples: int) -> Iterator[None]:
    """Claim the folder for a run, and keep other processes from training in it. It is made where it does not exist.

    `config.PLACE_KEYS` may change: the newest count.

    Raises:
      UserError: when the folder belongs to another run (see `check_claim`), or another process trains in it.
    """
    check_claim(workdir, config, data_digest=data_digest)
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        lock(descriptor, f"workdir={workdir}")
        check_claim(workdir, config, data_digest=data_digest)  # another process may have claimed it before the lock
        write_json(workdir / DATA_FILE, {"train_digest": data_digest, "train_examples": num_examples})
        write_json(workdir / CONFIG_FILE, json.loads(config.to_json()))
        yield
    finally:
        os.close(descriptor)


def check_claim(workdir: Path, config: ConfigDict, *, data_digest: str) -> None:
    """Check that a run can start or continue in the folder; write nothing.

    Raises:
      UserError: when the folder holds another config (the differing keys are named), a run on other data, or
        checkpoints without a config.
    """
    check_utf8(workdir, "workdir")
    path, data_path = workdir / CONFIG_FILE, workdir / DATA_FILE
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir={workdir} is a file; choose a folder")
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(f"workdir={workdir} has checkpoints but no {CONFIG_FILE}; choose another --workdir")
        return
    differing = differing_keys(json.loads(config.to_json()), read_json(path))
    if differing:
        raise UserError(
            f"workdir={workdir} holds a run with another config ({'; '.join(differing)}); choose another --workdir,"
            " or set these back"
        )
    if data_path.exists() and read_json(data_path).get("train_digest") != data_digest:
        raise UserError(
            f"workdir={workdir} holds a run on other data: the training split of {config.dataset.name} is not"
            " what it was; choose another --workdir, or set dataset.data_dir back"
        )


def read_config(workdir: Path, *, name: str = "workdir") -> ConfigDict:
    """Return the config of a run, with every key of this version. Messages call the folder `name`.

    Raises:
      UserError: when the folder holds no run, or its config lacks a key or has a setting that cannot work.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{name}={workdir} {'has no ' + CONFIG_FILE if workdir.exists() else 'does not exist'};"
            " give the folder of a run of train.py"
        )
    content = read_json(path)
    try:
        check_keys(content)
        config = ConfigDict(content)
        validate(config, num_devices=1)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def finished_step(workdir: Path, config: ConfigDict) -> int | None:
    """Return the last step of the run once it is finished; None where the folder does not say."""
    if not (workdir / DATA_FILE).exists():
        return None
    return config.num_epochs * step_sizes(config, _num_examples(workdir)).steps


def _num_examples(workdir: Path) -> int:
    """Return the number of training examples; a `UserError` where the folder does not say."""
    path = workdir / DATA_FILE
    number = read_json(path).get("train_examples") if path.exists() else None
    if type(number) is not int or number < 1:
        raise UserError(f"{path} does not say how many training examples the run has; copy it from the run's folder")
    return number


class Run(NamedTuple):
    """A run that was read from its folder: its config, and the model's variables in the newest readable checkpoint."""

    config: ConfigDict
    step: int
    variables: dict[str, Any]  # `params`, and `batch_stats` where the model has them

    def classifier(self) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, Any]]:
        """Return the network ready for inference: `apply_fn(variables, images)`, and its variables."""
        image_shape = dataset_info(self.config.dataset.name).image_shape
        return for_inference(make_model(self.config), self.variables, image_shape=image_shape)


def restore(workdir: Path, devices: Sequence[jax.Device], *, name: str = "workdir") -> Run:
    """Read the newest readable checkpoint of a run, replicated on the devices. Messages call the folder `name`.

    Raises:
      UserError: when the folder holds no run, or a run without a readable checkpoint.
    """
    config = read_config(workdir, name=name)
    num_examples = _num_examples(workdir) if METHODS[config.method].choose else 1
    with closing(Checkpoints(workdir)) as checkpoints:
        restored = checkpoints.restore_newest(restore_target(config, devices, num_examples))
    if restored is None:
        raise _no_checkpoint(workdir, name)
    step, state = restored
    return Run(config, step, state.variables)


def check_fits(config: ConfigDict, workdir: Path, *, name: str) -> None:
    """Raise a `UserError` where another run, given by the setting `name`, has no checkpoint or does not fit.

    Of that run only the config is read. The first variable that does not fit is named.
    """
    source = _with_checkpoint(workdir, name=name)
    targets = (restore_target(each, choose_devices(1)).variables for each in (config, source))
    mine, theirs = (
        {keystr(path): str(leaf.shape) for path, leaf in jax.tree.leaves_with_path(target)} for target in targets
    )
    for leaf in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(leaf, "missing"), theirs.get(leaf, "missing")
        if here != there:
            raise UserError(
                f"{name}={workdir} does not fit: {leaf} is {here} here and {there} there"
                f" (model={source.model}, dataset {source.dataset.name}); start from a run of the same"
                " model and number of classes"
            )


def check_same_dataset(config: ConfigDict, workdir: Path, *, name: str) -> None:
    """Raise a `UserError` where another run, given by the setting `name`, is not there or is of another dataset."""
    source = _with_checkpoint(workdir, name=name)
    if source.dataset.name != config.dataset.name:
        raise UserError(
            f"{name}={workdir} was trained on {source.dataset.name}, this run is on {config.dataset.name};"
            " give a run on the same dataset"
        )


def _with_checkpoint(workdir: Path, *, name: str) -> ConfigDict:
    """Return the config of a run that has a checkpoint, with a note where the run is not finished."""
    config = read_config(workdir, name=name)
    with closing(Checkpoints(workdir)) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise _no_checkpoint(workdir, name)
    last_step = finished_step(workdir, config)
    if last_step is not None and max(steps) < last_step:
        note(f"{name}={workdir} is not finished: step {max(steps)} of {last_step}")
    return config


def _no_checkpoint(workdir: Path, name: str) -> UserError:
    return UserError(f"{name}={workdir} has no checkpoint yet; train it first, with train.py")

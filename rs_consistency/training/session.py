"""An open run: its configuration, devices and data. The loop, the dry run and the profile begin with it."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.common.files import local_path
from rs_consistency.devices import parallel
from rs_consistency.methods import METHODS
from rs_consistency.training import runs
from rs_consistency.training.array_inputs import ArrayInputs
from rs_consistency.training.config import check_keys, flatten, validate
from rs_consistency.training.inputs import Inputs, StepSizes, step_sizes
from rs_consistency.training.step import TrainState, check_room, create_state
from rs_consistency.training.teacher import smoothed_predictions

_FEW = 10  # training images that a measurement asks the teacher about


@dataclass(frozen=True)
class Session:
    """An open run. Other runs in its config have absolute paths."""

    config: ConfigDict
    devices: list[jax.Device]
    train: data.OpenSplit
    test: data.OpenSplit

    @classmethod
    def open(cls, config: ConfigDict, workdir: Path) -> "Session":
        """Check the config, and open devices and data; nothing is written.

        Raise a `UserError` for a setting that cannot work, data that are not there, or, in a new run, another run that
        it builds on and that is not there or does not fit.
        """
        check_keys(config)
        devices = parallel.choose_devices(config.num_devices)
        validate(config, num_devices=len(devices))
        _settle_sources(config, is_new=not (workdir / runs.CONFIG_FILE).exists())
        folders = {"data_dir": config.dataset.data_dir, "cache_dir": config.dataset.cache_dir}
        train, test = (data.open_split(config.dataset.name, split, **folders) for split in ("train", "test"))
        check_room(config, devices, same_feed=isinstance(train, data.Split))
        return cls(config, devices, train, test)

    @property
    def sizes(self) -> StepSizes:
        """The sizes of a step and of an epoch."""
        return step_sizes(self.config, len(self.train))

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return self.config.num_epochs * self.sizes.steps

    def describe(self) -> str:
        """Return dataset, model, method and length of the run in a line."""
        config, consistency, method = self.config, self.config.consistency, self.config.method
        if consistency.lbd > 0:
            method += f" + consistency (lbd {consistency.lbd:g}, eta {consistency.eta:g}, {consistency.form})"
        return (
            f"{config.dataset.name}, {config.model}, sigma {config.sigma:g}: {method}, M {config.num_noise};"
            f" {config.num_epochs} epochs of {self.sizes.steps} steps of {self.sizes.examples} examples"
        )

    def initial_state(self) -> TrainState:
        """Return the state before the first step, replicated on the devices."""
        return parallel.replicate(create_state(self.config, len(self.train)), self.devices)

    def late_state(self) -> TrainState:
        """Return the initial state, but in the last epoch, for a measurement: a method may do more in late epochs."""
        step = min(self.last_step, 2**31 - 1) - self.sizes.steps  # a step is int32
        return self.initial_state().replace(step=parallel.replicate(np.int32(step), self.devices))

    def open_inputs(self, workdir: Path | None) -> Inputs:
        """Open the examples, for a method with a teacher together with the teacher's predictions.

        The run's `workdir` keeps the predictions. None is for a measurement: predictions of a few images stand in for
        all, and nothing is kept.
        """
        if not isinstance(self.train, data.Split):
            from rs_consistency.training.stream_inputs import StreamInputs  # slow to import

            return StreamInputs(self.config, self.train, self.test, devices=self.devices)
        extra, teacher = {}, METHODS[self.config.method].teacher
        if teacher:
            flat = flatten(self.config)
            smoothed = smoothed_predictions(
                self.config,
                self.train if workdir else data.Split(self.train.images[:_FEW], self.train.labels[:_FEW]),
                Path(flat[teacher.workdir_key]),
                num_votes=flat[teacher.num_votes_key],
                devices=self.devices,
                workdir=workdir,
            )
            extra["smoothed"] = np.resize(smoothed, (len(self.train), *smoothed.shape[1:]))
        return ArrayInputs(self.config, self.train, self.test, devices=self.devices, extra=extra)


def _settle_sources(config: ConfigDict, *, is_new: bool) -> None:
    """Make the paths of other runs absolute, so that the run is the same from whichever folder it is continued.

    A new run needs them: raise a `UserError` where one is not there or does not fit.
    """
    checks, teacher = {"init_from": runs.check_fits}, METHODS[config.method].teacher
    if teacher:
        checks[teacher.workdir_key] = runs.check_same_dataset
    for key, check in checks.items():
        if flatten(config)[key]:
            path = local_path(flatten(config)[key], key).resolve()
            config.update_from_flattened_dict({key: str(path)})
            if is_new:
                check(config, path, name=key)

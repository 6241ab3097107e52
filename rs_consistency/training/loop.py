"""The training loop of one run: epochs, evaluation, records, checkpoints, resume."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rs_consistency import data, methods
from rs_consistency.common.errors import UserError, note
from rs_consistency.devices import parallel
from rs_consistency.devices.compiler import steps_per_call
from rs_consistency.training import runs
from rs_consistency.training.array_inputs import ArrayInputs
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.config import flatten, validate
from rs_consistency.training.inputs import Inputs, StepSizes, step_sizes
from rs_consistency.training.metrics import MetricsWriter, Sums
from rs_consistency.training.runs import CONFIG_FILE, open_for_training
from rs_consistency.training.step import (
    TrainState,
    create_state,
    make_eval_step,
    make_model,
    make_optimizer,
    make_schedule,
    make_train_steps,
    restore_target,
)

# Steps between two looks at the metrics. Scalars of the steps between stay on the device, so it never waits.
_LOOK_EVERY = 50
# Calls of steps that may be under way at once: more only hold memory, and keep an interruption waiting.
_IN_FLIGHT = 8
_SECONDS_BETWEEN_LINES = 60  # of the progress, where stderr is a file


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Trains, or continues, the run of a workdir until its last epoch.

    Args:
      config: with the keys of `configs/default.py`.
      workdir: the run's folder: `config.json`, `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and
        `damaged_checkpoints/` where there were any.

    Returns:
      The final state, replicated over the devices. It is a function of config, seed and data; the number of
      devices and interruptions change it by rounding at most (interruptions: not at all).

    Raises:
      UserError: a setting that cannot work, another config in the workdir, no readable checkpoint, or a loss
        that is not finite (the checkpoints before it stay).
    """
    devices, train_split, test_split, sizes = open_run(config, workdir)
    with (
        open_for_training(workdir, config, data_digest=train_split.digest(), num_examples=len(train_split)),
        closing(Checkpoints(workdir, keep=config.checkpoint_keep)) as checkpoints,
    ):
        state = _start_state(config, checkpoints, sizes, devices)
        if int(state.step) >= config.num_epochs * sizes.steps:
            print(f"{workdir}: all {config.num_epochs} epochs are done", flush=True)
            return state
        print(f"{describe_run(config, sizes)}\ndevices: {parallel.describe(devices)}", flush=True)
        extra = prepare_examples(config, train_split, devices, workdir)
        with (
            closing(MetricsWriter(workdir, finished_steps=int(state.step), steps_per_epoch=sizes.steps)) as writer,
            closing(open_inputs(config, train_split, test_split, extra=extra, sizes=sizes, devices=devices)) as inputs,
        ):
            run = _Run(config, inputs, sizes, devices, checkpoints, writer)
            for epoch in range(int(state.step) // sizes.steps, config.num_epochs):
                state = run.epoch(state, epoch)
        checkpoints.wait()
        return state


def initial_state(config: ConfigDict, sizes: StepSizes, devices: list[jax.Device]) -> TrainState:
    """Return the state before the first step, replicated on the devices."""
    optimizer = make_optimizer(config, sizes.steps)
    return parallel.replicate(create_state(config, optimizer), devices)


def open_run(config: ConfigDict, workdir: Path) -> tuple[list[jax.Device], data.OpenSplit, data.OpenSplit, StepSizes]:
    """Checks the config, and opens what it names: devices, training and test split, sizes of a step."""
    devices = parallel.choose_devices(config.num_devices)
    validate(config, num_devices=len(devices))
    _resolve_sources(config)
    if not (workdir / CONFIG_FILE).exists():
        _check_sources(config)
    source = {"data_dir": config.dataset.data_dir, "cache_dir": config.dataset.cache_dir}
    train_split = data.open_split(config.dataset.name, "train", **source)
    test_split = data.open_split(config.dataset.name, "test", **source)
    return devices, train_split, test_split, step_sizes(config, len(train_split))


class _Run:
    """The compiled steps of a run, and where its results go."""

    def __init__(
        self,
        config: ConfigDict,
        inputs: Inputs,
        sizes: StepSizes,
        devices: list[jax.Device],
        checkpoints: Checkpoints,
        writer: MetricsWriter,
    ) -> None:
        self._config, self._inputs, self._sizes = config, inputs, sizes
        self._checkpoints, self._writer = checkpoints, writer
        apply_fn = make_model(config).apply
        self._schedule = make_schedule(config, sizes.steps)
        self._eval_step = make_eval_step(config, apply_fn=apply_fn, inputs=inputs, devices=devices)
        self._steps_per_call = steps_per_call(devices[0].platform) if inputs.same_feed else 1
        self._train_steps = make_train_steps(
            config,
            apply_fn=apply_fn,
            optimizer=make_optimizer(config, sizes.steps),
            sizes=sizes,
            inputs=inputs,
            devices=devices,
            steps_per_call=self._steps_per_call,
        )

    def epoch(self, state: TrainState, epoch: int) -> TrainState:
        """Trains to the end of an epoch, evaluates, and writes record and checkpoint where they are due."""
        config = self._config
        end_step = (epoch + 1) * self._sizes.steps
        first_step = int(state.step)
        start = time.perf_counter()
        state, sums = self._steps(state, epoch, first_step, end_step)
        seconds = time.perf_counter() - start
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": end_step,
            **sums.means(),
            "lr": float(self._schedule(epoch * self._sizes.steps)),
            "noisy_images_per_second": (end_step - first_step) * config.batch_size / seconds,
        }
        last = epoch + 1 == config.num_epochs
        if last or (epoch + 1) % config.eval_every_epochs == 0:
            record["noisy_test_accuracy"] = self._evaluate(state)
        self._writer.write(record)
        _print_record(config, record)
        if last or (epoch + 1) % config.checkpoint_every_epochs == 0:
            self._checkpoints.save(end_step, state)
        return state

    def _steps(self, state: TrainState, epoch: int, first_step: int, end_step: int) -> tuple[TrainState, Sums]:
        """The steps of an epoch that remain, and the sums of the metrics of all its steps."""
        config, every = self._config, self._config.checkpoint_every_steps
        sums = self._writer.sums_of_part(first_step)
        pending: list[tuple[int, dict[str, jax.Array]]] = []  # of each call, how many steps it took
        bar = tqdm(
            total=self._sizes.steps * config.batch_size,
            initial=(first_step - epoch * self._sizes.steps) * config.batch_size,
            desc=f"epoch {epoch + 1}/{config.num_epochs}",
            unit="img",
            unit_scale=True,
            leave=False,
            # In a log file, a line a minute, and none where epochs are shorter.
            mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
            delay=0 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
        )
        with bar, closing(self._inputs.feeds(first_step, end_step)) as feeds:
            step = first_step
            for feed in feeds:
                stop = min(step + self._steps_per_call, end_step)
                if every > 0:
                    stop = min(stop, (step // every + 1) * every)
                number = stop - step
                state, metrics = self._train_steps(state, np.int32(number), *feed.args, **feed.parts)
                for _ in range(number - 1):
                    next(feeds)
                step = stop
                pending.append((number, metrics))
                jax.block_until_ready(pending[-_IN_FLIGHT:][0][1])
                save = every > 0 and step % every == 0 and step < end_step
                if save or sum(number for number, _ in pending) >= _LOOK_EVERY or step == end_step:
                    fetched = _by_step(pending)
                    _check_finite(config, fetched, step - len(fetched))
                    for one in fetched:
                        sums.add({name: value for name, value in one.items() if name != "param_norm"})
                    pending = []
                    bar.set_postfix(loss=f"{fetched[-1]['loss']:.4f}", refresh=False)
                    bar.update(len(fetched) * config.batch_size)
                if save:
                    self._writer.keep_part(step, sums)
                    self._checkpoints.save(step, state)
        return state, sums

    def _evaluate(self, state: TrainState) -> float:
        """Accuracy on one noisy copy of every test image."""
        with closing(self._inputs.test_feeds()) as feeds:
            counts = [
                self._eval_step(state.variables, np.int32(start), *feed.args, **feed.parts) for start, feed in feeds
            ]
        correct, seen = np.sum(jax.device_get(counts), axis=0)
        return float(correct / seen)


def _resolve_sources(config: ConfigDict) -> None:
    """Other runs by absolute paths: the same run, from wherever this one is continued."""
    for key in ("init_from", *methods.METHODS[config.method].sources):
        if flatten(config)[key]:
            config.update_from_flattened_dict({key: str(Path(flatten(config)[key]).expanduser().resolve())})


def _check_sources(config: ConfigDict) -> None:
    """A new run that builds on others needs them, and ones that fit; known before its folder is made."""
    if config.init_from:
        runs.check_fits(config, Path(config.init_from))
    for key in methods.METHODS[config.method].sources:
        runs.check_same_dataset(config, Path(flatten(config)[key]), name=key)


def prepare_examples(
    config: ConfigDict, split: data.OpenSplit, devices: list[jax.Device], workdir: Path
) -> Mapping[str, np.ndarray]:
    """What the method wants to know of every training example; `validate` has refused it for streamed datasets."""
    prepare = methods.METHODS[config.method].prepare
    return prepare(config, split.arrays, devices, workdir) if prepare else {}


def _start_state(
    config: ConfigDict, checkpoints: Checkpoints, sizes: StepSizes, devices: list[jax.Device]
) -> TrainState:
    restored = checkpoints.restore_newest(restore_target(config, devices), note=note)
    if restored is None:
        state = initial_state(config, sizes, devices)
        return runs.start_from(state, Path(config.init_from), devices) if config.init_from else state
    step, state = restored
    checkpoints.set_aside_after(step)
    if step < config.num_epochs * sizes.steps:
        note(f"continuing after step {step}")
    return state


def _by_step(calls: list[tuple[int, dict[str, jax.Array]]]) -> list[dict[str, np.ndarray]]:
    """The metrics of every step, from those `[S]` of calls that took so many steps."""
    fetched = jax.device_get(calls)
    return [
        {name: values[index] for name, values in metrics.items()}
        for number, metrics in fetched
        for index in range(number)
    ]


def _check_finite(config: ConfigDict, fetched: list[Mapping[str, np.ndarray]], first_step: int) -> None:
    """Stops the run at the first step whose loss or parameters are not finite."""
    for offset, metrics in enumerate(fetched):
        bad = [f"{name}={float(value)}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            causes = [f"optimizer.lr={config.optimizer.lr} is too large"]
            flat = flatten(config)
            weights = ("consistency.lbd", f"{config.method}.lbd", f"{config.method}.eta")
            causes += [f"{key}={flat[key]} is too large" for key in weights if flat.get(key, 0) > 0]
            raise UserError(
                f"training diverged at step {first_step + offset} ({', '.join(bad)}); likely {' or '.join(causes)}: use"
                " a smaller one in another --workdir. The checkpoints of earlier epochs are kept"
            )


def describe_run(config: ConfigDict, sizes: StepSizes) -> str:
    """What is trained, in a line."""
    consistency, method = config.consistency, config.method
    if consistency.lbd > 0:
        method += f" + consistency (lbd {consistency.lbd:g}, eta {consistency.eta:g}, {consistency.form})"
    return (
        f"{config.dataset.name}, {config.model}, sigma {config.sigma:g}: {method}, M {config.num_noise};"
        f" {config.num_epochs} epochs of {sizes.steps} steps of {sizes.examples} examples"
    )


def _print_record(config: ConfigDict, record: dict[str, Any]) -> None:
    shown = {name: value for name, value in record.items() if name not in ("epoch", "step")}
    parts = [f"{name} {value:.4g}" for name, value in shown.items()]
    images_in_epoch = record["step"] / record["epoch"] * config.batch_size
    seconds = (config.num_epochs - record["epoch"]) * images_in_epoch / record["noisy_images_per_second"]
    left = timedelta(seconds=round(seconds))
    print(f"epoch {record['epoch']}/{config.num_epochs}  {'  '.join(parts)}  left {left}", flush=True)


def open_inputs(
    config: ConfigDict,
    train: data.OpenSplit,
    test: data.OpenSplit,
    *,
    extra: Mapping[str, np.ndarray],
    sizes: StepSizes,
    devices: Sequence[jax.Device],
) -> Inputs:
    """The inputs of a run, by the kind of its dataset."""
    if isinstance(train, data.ArraySplit):
        return ArrayInputs(config, train.arrays, test.arrays, extra=extra, sizes=sizes, devices=devices)
    from rs_consistency.training.stream_inputs import StreamInputs  # slow to import, and only needed here

    return StreamInputs(config, train, test, sizes=sizes, devices=devices)

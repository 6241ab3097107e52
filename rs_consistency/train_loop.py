"""The training loop of one run: epochs, evaluation, records, checkpoints, resume."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from rs_consistency import data, parallel, training
from rs_consistency.checkpoints import Checkpoints
from rs_consistency.config import validate
from rs_consistency.errors import UserError, note
from rs_consistency.metrics import MetricsWriter
from rs_consistency.workdir import open_for_training

# Steps between two looks at the metrics. Scalars of the steps between stay on the device, so it never waits.
_LOOK_EVERY = 50


def train(config: ConfigDict, workdir: Path) -> training.TrainState:
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
    devices = parallel.choose_devices(config.num_devices)
    validate(config, num_devices=len(devices))
    source = {"data_dir": config.dataset.data_dir, "cache_dir": config.dataset.cache_dir}
    train_split = data.load(config.dataset.name, "train", **source)
    test_split = data.load(config.dataset.name, "test", **source)
    sizes = training.step_sizes(config, len(train_split.labels))
    with (
        open_for_training(workdir, config, data_digest=data.digest(train_split), num_examples=len(train_split.labels)),
        closing(Checkpoints(workdir, keep=config.checkpoint_keep)) as checkpoints,
    ):
        start = _start_state(config, checkpoints, sizes, devices)
        first_epoch = int(start.step) // sizes.steps
        if first_epoch >= config.num_epochs:
            print(f"{workdir}: all {config.num_epochs} epochs are done", flush=True)
            return start
        with closing(MetricsWriter(workdir, finished_epochs=first_epoch, finished_steps=int(start.step))) as writer:
            for record, state in _epochs(config, start, first_epoch, train_split, test_split, sizes, devices):
                writer.write(record)
                _print_record(config, record)
                if record["epoch"] == config.num_epochs or record["epoch"] % config.checkpoint_every_epochs == 0:
                    checkpoints.save(record["step"], state)
        checkpoints.wait()
        return state


def _epochs(
    config: ConfigDict,
    state: training.TrainState,
    first_epoch: int,
    train_split: data.Split,
    test_split: data.Split,
    sizes: training.StepSizes,
    devices: list[jax.Device],
) -> Iterator[tuple[dict[str, Any], training.TrainState]]:
    """Trains epoch after epoch; yields the record and the state after each."""
    apply_fn = training.make_model(config).apply
    optimizer = training.make_optimizer(config, sizes.steps)
    train_step = training.make_train_step(config, apply_fn=apply_fn, optimizer=optimizer, sizes=sizes, devices=devices)
    eval_step = training.make_eval_step(config, apply_fn=apply_fn, devices=devices)
    make_order = training.make_order(config, len(train_split.labels))
    schedule = training.make_schedule(config, sizes.steps)
    train_arrays = parallel.replicate(tuple(train_split), devices)
    test_arrays = parallel.replicate(tuple(test_split), devices)

    for epoch in range(first_epoch, config.num_epochs):
        order = parallel.replicate(make_order(epoch), devices)
        start = time.perf_counter()
        state, means = _run_epoch(config, train_step, state, train_arrays, order, sizes, epoch)
        seconds = time.perf_counter() - start
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * sizes.steps,
            **means,
            "lr": float(schedule(epoch * sizes.steps)),
            "noisy_images_per_second": sizes.steps * config.batch_size / seconds,
        }
        if epoch + 1 == config.num_epochs or (epoch + 1) % config.eval_every_epochs == 0:
            record["noisy_test_accuracy"] = _evaluate(config, eval_step, state, test_arrays)
        yield record, state


def _start_state(
    config: ConfigDict, checkpoints: Checkpoints, sizes: training.StepSizes, devices: list[jax.Device]
) -> training.TrainState:
    restored = checkpoints.restore_newest(training.restore_target(config, devices), note=note)
    if restored is None:
        optimizer = training.make_optimizer(config, sizes.steps)
        return parallel.replicate(training.create_state(config, optimizer), devices)
    step, state = restored
    checkpoints.set_aside_after(step)
    if step < config.num_epochs * sizes.steps:
        note(f"continuing after step {step}")
    return state


def _run_epoch(
    config: ConfigDict,
    train_step: training.TrainStep,
    state: training.TrainState,
    train_arrays: tuple[jax.Array, jax.Array],
    order: jax.Array,
    sizes: training.StepSizes,
    epoch: int,
) -> tuple[training.TrainState, dict[str, float]]:
    """The epoch's steps, and the means of their metrics."""
    first_step = epoch * sizes.steps
    history: list[dict[str, np.ndarray]] = []
    pending: list[dict[str, jax.Array]] = []
    bar = tqdm(
        total=sizes.steps * config.batch_size,
        desc=f"epoch {epoch + 1}/{config.num_epochs}",
        unit="img",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        for step in range(first_step, first_step + sizes.steps):
            state, metrics = train_step(state, *train_arrays, order)
            pending.append(metrics)
            if len(pending) == _LOOK_EVERY or step + 1 == first_step + sizes.steps:
                fetched = jax.device_get(pending)
                _check_finite(config, fetched, step + 1 - len(fetched))
                history += fetched
                pending = []
                bar.set_postfix(loss=f"{fetched[-1]['loss']:.4f}", refresh=False)
                bar.update(len(fetched) * config.batch_size)
    names = [name for name in history[0] if name != "param_norm"]
    return state, {name: float(np.mean([np.float64(step[name]) for step in history])) for name in names}


def _check_finite(config: ConfigDict, fetched: list[dict[str, np.ndarray]], first_step: int) -> None:
    """Stops the run at the first step whose loss or parameters are not finite."""
    for offset, metrics in enumerate(fetched):
        bad = [f"{name}={float(value)}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            causes = [f"optimizer.lr={config.optimizer.lr} is too large"]
            if config.consistency.lbd > 0:
                causes.append(f"consistency.lbd={config.consistency.lbd} is too large")
            raise UserError(
                f"training diverged at step {first_step + offset} ({', '.join(bad)}); likely {' or '.join(causes)}: use"
                " a smaller one in another --workdir. The checkpoints of earlier epochs are kept"
            )


def _evaluate(
    config: ConfigDict,
    eval_step: Any,
    state: training.TrainState,
    test_arrays: tuple[jax.Array, jax.Array],
) -> float:
    """Accuracy on one noisy copy of every test image."""
    counts = [
        eval_step(state.params, *test_arrays, np.int32(start))
        for start in range(0, test_arrays[1].shape[0], config.eval_batch_size)
    ]
    correct, seen = np.sum(jax.device_get(counts), axis=0)
    return float(correct / seen)


def _print_record(config: ConfigDict, record: dict[str, Any]) -> None:
    shown = {name: value for name, value in record.items() if name not in ("epoch", "step")}
    parts = [f"{name} {value:.4g}" for name, value in shown.items()]
    images_in_epoch = record["step"] / record["epoch"] * config.batch_size
    seconds = (config.num_epochs - record["epoch"]) * images_in_epoch / record["noisy_images_per_second"]
    left = timedelta(seconds=round(seconds))
    print(f"epoch {record['epoch']}/{config.num_epochs}  {'  '.join(parts)}  left {left}", flush=True)

"""The training loop of one run: epochs, evaluation, records, checkpoints, resume."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError, note, say
from rs_consistency.common.progress import duration, progress_bar
from rs_consistency.devices import parallel
from rs_consistency.methods import METHODS
from rs_consistency.training import runs
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.choice import choose_examples
from rs_consistency.training.config import flatten
from rs_consistency.training.inputs import Inputs
from rs_consistency.training.metrics import MetricsWriter
from rs_consistency.training.session import Session
from rs_consistency.training.step import TrainState, compile_steps, make_schedule, restore_target

# Steps between two looks at the metrics. Scalars of the steps between stay on the device, so it never waits.
_LOOK_EVERY = 50
# Calls of steps that may be under way at once: more only hold memory, and keep an interruption waiting.
_IN_FLIGHT = 8


def train(config: ConfigDict, workdir: Path) -> TrainState:
    """Train, or continue, the run of a workdir until its last epoch.

    Args:
      config: with the keys of `configs/default.py`.
      workdir: the run's folder: `config.json`, `data.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, and
        `damaged_checkpoints/` where there were any.

    Returns:
      The final state, replicated over the devices. It is a function of config, seed and data. The number of devices
      changes it by rounding at most, and interruptions not at all.

    Raises:
      UserError: a setting that cannot work, another config in the workdir, no readable checkpoint, or a loss that is
        not finite (the checkpoints before it stay).
    """
    session = Session.open(config, workdir)
    steps_per_epoch = session.sizes.steps
    with (
        runs.open_for_training(workdir, config, data_digest=session.train.digest(), num_examples=len(session.train)),
        closing(Checkpoints(workdir, keep=config.checkpoint_keep)) as checkpoints,
    ):
        state = _start_state(session, checkpoints)
        first_step = int(state.step)
        if first_step >= session.last_step:
            say(f"{workdir}: all {config.num_epochs} epochs are done")
            return state
        say(f"{session.describe()}\ndevices: {parallel.describe(session.devices)}")
        with (
            closing(session.open_inputs(workdir)) as inputs,
            closing(MetricsWriter(workdir, finished_steps=first_step, steps_per_epoch=steps_per_epoch)) as writer,
        ):
            run = _Run(session, inputs, checkpoints, writer)
            for epoch in range(first_step // steps_per_epoch, config.num_epochs):
                state = run.epoch(state, epoch)
        checkpoints.wait()
        return state


def _start_state(session: Session, checkpoints: Checkpoints) -> TrainState:
    """Return the state of the newest readable checkpoint, or else the initial one."""
    config, devices = session.config, session.devices
    restored = checkpoints.restore_newest(restore_target(config, devices, len(session.train)))
    if restored is None:
        state = session.initial_state()
        if config.init_from:
            variables = dict(runs.restore(Path(config.init_from), devices, name="init_from").variables)
            state = state.replace(params=variables.pop("params"), model_state=variables)
        return state
    step, state = restored
    checkpoints.set_aside_after(step)
    if step < session.last_step:
        note(f"continuing after step {step}")
    return state


class _Run:
    """The compiled steps of a run, and the files for its results."""

    def __init__(self, session: Session, inputs: Inputs, checkpoints: Checkpoints, writer: MetricsWriter) -> None:
        self._session, self._config = session, session.config
        self._inputs, self._checkpoints, self._writer = inputs, checkpoints, writer
        self._steps_per_epoch = inputs.sizes.steps
        self._compiled = compile_steps(session.config, inputs)

    def epoch(self, state: TrainState, epoch: int) -> TrainState:
        """Train to the end of an epoch; evaluate, and write record and checkpoint, where they are due."""
        config, end_step = self._config, (epoch + 1) * self._steps_per_epoch
        choose = METHODS[config.method].choose
        if choose and int(state.step) == epoch * self._steps_per_epoch:
            state = choose_examples(choose, config, state, epoch, self._session.train, self._session.devices)
        start = time.perf_counter()
        state, metrics = self._steps(state, epoch, end_step)
        seconds = time.perf_counter() - start
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": end_step,
            **{name: float(np.mean([step[name] for step in metrics])) for name in metrics[0] if name != "param_norm"},
            "lr": float(make_schedule(config, self._steps_per_epoch)(epoch * self._steps_per_epoch)),
            "noisy_images_per_second": len(metrics) * config.batch_size / seconds,
        }
        if choose:
            record["examples"] = int((state.weights > 0).sum())
        last = epoch + 1 == config.num_epochs
        if last or (epoch + 1) % config.eval_every_epochs == 0:
            record["noisy_test_accuracy"] = self._evaluate(state)
        self._writer.write(record)
        _print_record(config, record)
        if last or (epoch + 1) % config.checkpoint_every_epochs == 0:
            self._checkpoints.save(end_step, state)
        return state

    def _steps(self, state: TrainState, epoch: int, end_step: int) -> tuple[TrainState, list[dict[str, float]]]:
        """Take the steps of an epoch that remain; return the state and the metrics of each of these steps."""
        config, compiled = self._config, self._compiled
        first_step, every = int(state.step), config.checkpoint_every_steps or end_step
        done: list[dict[str, float]] = []
        pending: list[tuple[int, dict[str, jax.Array]]] = []  # steps and metrics of the calls since the last look
        bar = progress_bar(
            f"epoch {epoch + 1}/{config.num_epochs}",
            self._steps_per_epoch * config.batch_size,
            initial=(first_step - epoch * self._steps_per_epoch) * config.batch_size,
            brief=True,
            unit_scale=True,
        )
        with bar, closing(self._inputs.feeds(first_step, end_step, state.weights)) as feeds:
            step = first_step
            while step < end_step:
                number = min(compiled.per_call, end_step - step, every - step % every)
                feed, *_ = [next(feeds) for _ in range(number)]  # steps of one call have the same feed
                state, metrics = compiled.train(state, np.int32(number), *feed.args, **feed.parts)
                step += number
                pending.append((number, metrics))
                jax.block_until_ready(pending[-_IN_FLIGHT:][0][1])
                save = step % every == 0 and step < end_step
                if save or sum(number for number, _ in pending) >= _LOOK_EVERY or step == end_step:
                    new = _by_step(pending)
                    _check_finite(config, new, step - len(new))
                    done += new
                    pending = []
                    bar.set_postfix(loss=f"{new[-1]['loss']:.4f}", refresh=False)
                    bar.update(len(new) * config.batch_size)
                if save:
                    self._checkpoints.save(step, state)
        return state, done

    def _evaluate(self, state: TrainState) -> float:
        """Return the accuracy on one noisy copy of every test image."""
        evaluate = self._compiled.evaluate
        with closing(self._inputs.test_feeds()) as feeds:
            counts = [evaluate(state.variables, np.int32(start), *feed.args, **feed.parts) for start, feed in feeds]
        correct, seen = np.sum(jax.device_get(counts), axis=0)
        return float(correct / seen)


def _by_step(calls: Sequence[tuple[int, dict[str, jax.Array]]]) -> list[dict[str, float]]:
    """Return the metrics of every step, from the numbers of steps of some calls and their metrics `[S]`."""
    return [
        {name: float(values[index]) for name, values in metrics.items()}
        for number, metrics in jax.device_get(calls)
        for index in range(number)
    ]


def _check_finite(config: ConfigDict, metrics: Sequence[dict[str, float]], first_step: int) -> None:
    """Raise a `UserError` for the first step whose loss or parameters are not finite."""
    for step, values in enumerate(metrics, start=first_step):
        bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            flat = flatten(config)
            weights = ("consistency.lbd", f"{config.method}.lbd", f"{config.method}.eta")
            causes = ["optimizer.lr", *(key for key in weights if flat.get(key, 0) > 0)]
            likely = " or ".join(f"{key}={flat[key]} is too large" for key in causes)
            raise UserError(
                f"training diverged at step {step} ({', '.join(bad)}); likely {likely}: use"
                " a smaller one in another --workdir. The checkpoints of earlier epochs are kept"
            )


def _print_record(config: ConfigDict, record: dict[str, Any]) -> None:
    shown = "  ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in record.items()
        if name not in ("epoch", "step")
    )
    images_in_epoch = record["step"] / record["epoch"] * config.batch_size
    left = (config.num_epochs - record["epoch"]) * images_in_epoch / record["noisy_images_per_second"]
    say(f"epoch {record['epoch']}/{config.num_epochs}  {shown}  left {duration(left)}")

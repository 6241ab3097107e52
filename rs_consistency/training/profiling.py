"""Where the time of a training step goes: a trace for TensorBoard, and the operations that took longest."""

import collections
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError
from rs_consistency.devices.compiler import steps_per_call
from rs_consistency.training.inputs import Inputs, StepSizes
from rs_consistency.training.loop import initial_state, open_inputs, open_run, prepare_examples
from rs_consistency.training.metrics import TENSORBOARD_FOLDER
from rs_consistency.training.step import TrainState, make_model, make_optimizer, make_train_steps

_WARM_UP_CALLS = 3
_SHOWN = 15
# Operations whose time is that of the operations inside them.
_CONTAINERS = ("while", "call", "conditional")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


class Operation(NamedTuple):
    """An operation of the compiled step.

    Attributes:
      name: in the compiled program.
      source: what it comes from in the model or the method, as JAX names it; empty where that is not known.
      milliseconds: in a step, over all threads and devices.
      calls: in a step.
    """

    name: str
    source: str
    milliseconds: float
    calls: float


class Profile(NamedTuple):
    """What `profile_steps` found.

    Attributes:
      operations: those that took longest come first.
      seconds_per_step: of the wall clock, while tracing.
      trace: the folder with the trace.
    """

    operations: list[Operation]
    seconds_per_step: float
    trace: Path

    def text(self, config: ConfigDict) -> str:
        """The table that the program prints."""
        total = sum(operation.milliseconds for operation in self.operations)
        speed = config.batch_size / self.seconds_per_step
        lines = [
            f"{self.seconds_per_step * 1000:.1f} ms a step while tracing, {speed:.0f} noisy images/s; operations take"
            f" {total:.1f} ms in all threads together:",
            f"{'share':>6} {'ms/step':>8} {'calls':>6}  operation",
        ]
        for operation in self.operations[:_SHOWN]:
            lines.append(
                f"{operation.milliseconds / total:6.1%} {operation.milliseconds:8.2f} {operation.calls:6.1f}"
                f"  {operation.name}  {operation.source}"
            )
        rest = self.operations[_SHOWN:]
        if rest:
            milliseconds = sum(operation.milliseconds for operation in rest)
            lines.append(f"{milliseconds / total:6.1%} {milliseconds:8.2f}         {len(rest)} others")
        return "\n".join([*lines, f"trace: {self.trace} (TensorBoard's profile plugin, or its .json.gz in Perfetto)"])


def profile_steps(
    config: ConfigDict,
    *,
    state: TrainState,
    inputs: Inputs,
    sizes: StepSizes,
    devices: Sequence[jax.Device],
    num_steps: int,
    folder: Path,
) -> Profile:
    """Traces training steps on a state of their own; nothing but the trace is written.

    Args:
      config: the run's configuration.
      state: to start from; consumed.
      inputs: hands out the examples.
      sizes: from `inputs.step_sizes`.
      devices: to use.
      num_steps: steps to trace, after a few to warm up.
      folder: where TensorBoard looks; the trace goes to `plugins/profile/` in it.

    Raises:
      UserError: for fewer than one step, or more than an epoch has.
    """
    per_call = steps_per_call(devices[0].platform) if inputs.same_feed else 1
    num_calls = -(-num_steps // per_call)
    most = max(sizes.steps // per_call - _WARM_UP_CALLS, 1) * per_call
    if not 1 <= num_steps <= most:
        raise UserError(f"profile={num_steps}: use a number of steps from 1 to {most}, which one epoch has")
    steps = make_train_steps(
        config,
        apply_fn=make_model(config).apply,
        optimizer=make_optimizer(config, sizes.steps),
        sizes=sizes,
        inputs=inputs,
        devices=devices,
        steps_per_call=per_call,
    )
    number, sources = np.int32(per_call), {}
    with closing(inputs.feeds(0, (_WARM_UP_CALLS + num_calls) * per_call)) as feeds:

        def call(state: TrainState) -> TrainState:
            feed = next(feeds)
            state, _ = steps(state, number, *feed.args, **feed.parts)
            return state

        if hasattr(steps, "lower"):
            feed = next(feeds)
            steps = steps.lower(state, number, *feed.args, **feed.parts).compile()
            sources = dict(_INSTRUCTION.findall(steps.as_text()))
            state, _ = steps(state, number, *feed.args, **feed.parts)
        for _ in range(_WARM_UP_CALLS - 1):
            state = call(state)
        jax.block_until_ready(state)
        before = set(_traces(folder))
        with jax.profiler.trace(str(folder)):
            start = time.perf_counter()
            for _ in range(num_calls):
                state = call(state)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
    (trace,) = set(_traces(folder)) - before
    done = num_calls * per_call
    return Profile(_operations(trace, sources, done), seconds / done, trace.parent)


def _traces(folder: Path) -> list[Path]:
    return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def _operations(trace: Path, sources: Mapping[str, str], num_steps: int) -> list[Operation]:
    """Times by operation from a trace."""
    nanoseconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                name = _operation_of(line, event)
                if name and not name.startswith(_CONTAINERS):
                    nanoseconds[name] += event.duration_ns
                    calls[name] += 1
    longest = sorted(nanoseconds, key=nanoseconds.get, reverse=True)
    return [
        Operation(name, _short(sources.get(name, "")), nanoseconds[name] / 1e6 / num_steps, calls[name] / num_steps)
        for name in longest
    ]


def _short(source: str) -> str:
    """Without the functions around the step, which all operations share; of a fusion, its first part."""
    return re.sub(r"^(jit\([^)]*\)/)+", "", source.split(";")[0])


def _operation_of(line: Any, event: Any) -> str | None:
    """The name in the compiled program of what an event of a trace is about; None for all else."""
    if line.name == "XLA Ops":  # of a TPU
        return event.name
    return next((str(value) for key, value in event.stats if key == "hlo_op"), None)


def profile(config: ConfigDict, workdir: Path, *, num_steps: int) -> Profile:
    """Traces some steps from initial parameters, into `tensorboard/` of a workdir; trains nothing.

    Args:
      config: as for `train`.
      workdir: a run's folder, or one that will be.
      num_steps: how many steps.

    Raises:
      UserError: as `train`, and for a number of steps that an epoch does not have.
    """
    devices, train_split, test_split, sizes = open_run(config, workdir)
    (workdir / TENSORBOARD_FOLDER).mkdir(parents=True, exist_ok=True)
    extra = prepare_examples(config, train_split, devices, workdir)
    state = initial_state(config, sizes, devices)
    with closing(open_inputs(config, train_split, test_split, extra=extra, sizes=sizes, devices=devices)) as inputs:
        return profile_steps(
            config,
            state=state,
            inputs=inputs,
            sizes=sizes,
            devices=devices,
            num_steps=num_steps,
            folder=workdir / TENSORBOARD_FOLDER,
        )

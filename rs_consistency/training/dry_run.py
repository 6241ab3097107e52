"""The plan of a training, from a few measured steps: for `--dry_run`."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data, methods
from rs_consistency.common.progress import duration, size
from rs_consistency.devices import parallel
from rs_consistency.devices.compiler import memory_of, steps_per_call
from rs_consistency.models import count_parameters
from rs_consistency.smoothing.speed import measure_votes
from rs_consistency.smoothing.votes import VoteSettings
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.inputs import Inputs, StepSizes
from rs_consistency.training.loop import describe_run, initial_state, open_inputs, open_run
from rs_consistency.training.runs import Run, check_claim
from rs_consistency.training.step import TrainState, make_eval_step, make_model, make_optimizer, make_train_steps

_FEW = 10  # training images that a dry run asks a method's preparation about


class Plan(NamedTuple):
    """What `plan` found.

    Attributes:
      text: for people, in lines: data, shapes, parameters, memory, speed, time.
      seconds: that the training would take.
      epoch_seconds: of one epoch, with its evaluation.
      votes_per_second: when the model is certified here.
    """

    text: str
    seconds: float
    epoch_seconds: float
    votes_per_second: float


def plan(config: ConfigDict, workdir: Path) -> Plan:
    """What `train` would do with the same arguments, from a few measured steps; writes nothing but caches.

    Raises:
      UserError: as `train`.
    """
    devices, train_split, test_split, sizes = open_run(config, workdir)
    check_claim(workdir, config, data_digest=train_split.digest())
    with closing(Checkpoints(workdir)) as checkpoints:
        done = max(checkpoints.steps(), default=0)
    state, info = initial_state(config, sizes, devices), data.dataset_info(config.dataset.name)
    parameters = count_parameters(state.variables)
    votes = VoteSettings.for_dataset(
        info, sigma=config.sigma, n0=1, n=1, seed=config.seed, platform=devices[0].platform
    )
    apply_fn, variables = Run(config, 0, state.variables).classifier()
    voted = measure_votes(apply_fn, variables, test_split.read(np.arange(1))[0], settings=votes, devices=devices)
    extra = {}
    if methods.METHODS[config.method].prepare:  # what it would find out about every example, from a few of them
        few = data.Split(*(rows[:_FEW] for rows in train_split.arrays))
        with tempfile.TemporaryDirectory() as folder:
            found = methods.METHODS[config.method].prepare(config, few, devices, Path(folder))
        extra = {name: np.resize(rows, (len(train_split), *rows.shape[1:])) for name, rows in found.items()}
    with closing(open_inputs(config, train_split, test_split, extra=extra, sizes=sizes, devices=devices)) as inputs:
        cost = measure_steps(config, state=state, inputs=inputs, sizes=sizes, devices=devices)
    last = config.num_epochs * sizes.steps
    left = max(last - done, 0)
    epoch_seconds = sizes.steps * cost.seconds + cost.evaluation_seconds / config.eval_every_epochs
    seconds = left / sizes.steps * epoch_seconds + (cost.compile_seconds if left else 0)
    shape = " x ".join(map(str, info.image_shape))
    copies = f"{sizes.examples} examples x {config.num_noise} noisy copies of {shape}"
    lines = [
        describe_run(config, sizes),
        f"data: {len(train_split):,} training and {len(test_split):,} test images; a step takes {copies}",
        f"model: {config.model}, {parameters:,} parameters, {config.dtype}",
        f"devices: {parallel.describe(devices)}, {size(cost.bytes_per_device)} each for a step, data included",
        f"speed: {config.batch_size / cost.seconds:,.0f} noisy images a second, {cost.seconds * 1000:.1f} ms a step;"
        f" {cost.compile_seconds:.0f} s to compile",
        f"workdir: {workdir}, {f'at step {done:,}' if done else 'new'}; {left:,} of {last:,} steps to do",
        f"time: about {duration(seconds)}, with evaluation; certify.py then counts about {voted.per_second:,.0f} votes"
        " a second",
    ]
    if extra:
        lines.append(f"not in it: what {config.method} finds out about every training image first")
    text = "\n".join([*lines, "dry run: nothing but caches was written"])
    return Plan(text, seconds, epoch_seconds, voted.per_second)


_MEASURED_SECONDS = 2.0
_MEASURED_CALLS = 50


class StepCost(NamedTuple):
    """What a training step takes.

    Attributes:
      seconds: of a step, on the wall clock.
      evaluation_seconds: of all evaluation steps of an epoch.
      compile_seconds: once, for both.
      bytes_per_device: that the compiled step holds at most, with arguments and results; None where XLA does not say.
    """

    seconds: float
    evaluation_seconds: float
    compile_seconds: float
    bytes_per_device: int | None


def measure_steps(
    config: ConfigDict,
    *,
    state: TrainState,
    inputs: Inputs,
    sizes: StepSizes,
    devices: Sequence[jax.Device],
) -> StepCost:
    """Times training steps, for about two seconds, on a state of their own.

    Args:
      config: the run's configuration.
      state: to start from; consumed.
      inputs: hands out the examples.
      sizes: from `inputs.step_sizes`.
      devices: to use.
    """
    apply_fn = make_model(config).apply
    per_call = steps_per_call(devices[0].platform) if inputs.same_feed else 1
    steps = make_train_steps(
        config,
        apply_fn=apply_fn,
        optimizer=make_optimizer(config, sizes.steps),
        sizes=sizes,
        inputs=inputs,
        devices=devices,
        steps_per_call=per_call,
    )
    number, size = np.int32(min(per_call, sizes.steps)), None
    start = time.perf_counter()
    with closing(inputs.feeds(0, sizes.steps)) as feeds:
        feed = next(feeds)
        if hasattr(steps, "lower"):
            steps = steps.lower(state, number, *feed.args, **feed.parts).compile()
            size = memory_of(steps)
        state, _ = jax.block_until_ready(steps(state, number, *feed.args, **feed.parts))
        compile_seconds = time.perf_counter() - start
        calls, start = 0, time.perf_counter()
        while calls < _MEASURED_CALLS and time.perf_counter() - start < _MEASURED_SECONDS:
            if not inputs.same_feed:
                feed = next(feeds, feed)
            state, _ = jax.block_until_ready(steps(state, number, *feed.args, **feed.parts))
            calls += 1
        seconds = (time.perf_counter() - start) / (calls * int(number))
    evaluate = make_eval_step(config, apply_fn=apply_fn, inputs=inputs, devices=devices)
    with closing(inputs.test_feeds()) as feeds:
        first, feed = next(feeds)
        clock = []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(evaluate(state.variables, np.int32(first), *feed.args, **feed.parts))
            clock.append(time.perf_counter() - start)
    evaluations = -(-inputs.num_test_examples // config.eval_batch_size)
    return StepCost(seconds, clock[1] * evaluations, compile_seconds + clock[0] - clock[1], size)

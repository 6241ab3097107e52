"""What a training or a certification will take, measured before it starts: for `--dry_run`."""

import time
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import training
from rs_consistency.devices.compiler import memory_of, steps_per_call
from rs_consistency.inputs import Inputs, StepSizes

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
    state: training.TrainState,
    inputs: Inputs,
    sizes: StepSizes,
    devices: Sequence[jax.Device],
) -> StepCost:
    """Times training steps, for about two seconds, on a state of their own.

    Args:
      config: the run's configuration.
      state: to start from; consumed.
      inputs: hands out the examples.
      sizes: from `training.step_sizes`.
      devices: to use.
    """
    apply_fn = training.make_model(config).apply
    per_call = steps_per_call(devices[0].platform) if inputs.same_feed else 1
    steps = training.make_train_steps(
        config,
        apply_fn=apply_fn,
        optimizer=training.make_optimizer(config, sizes.steps),
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
    evaluate = training.make_eval_step(config, apply_fn=apply_fn, inputs=inputs, devices=devices)
    with closing(inputs.test_feeds()) as feeds:
        first, feed = next(feeds)
        clock = []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(evaluate(state.variables, np.int32(first), *feed.args, **feed.parts))
            clock.append(time.perf_counter() - start)
    evaluations = -(-inputs.num_test_examples // config.eval_batch_size)
    return StepCost(seconds, clock[1] * evaluations, compile_seconds + clock[0] - clock[1], size)

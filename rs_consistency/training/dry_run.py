"""The plan of a training, from a few measured steps: for `--dry_run`."""

import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import data
from rs_consistency.common.progress import duration, size
from rs_consistency.devices import parallel
from rs_consistency.devices.compiler import memory_of
from rs_consistency.methods import METHODS
from rs_consistency.models import count_parameters
from rs_consistency.smoothing.speed import measure_votes
from rs_consistency.smoothing.votes import VoteSettings
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.inputs import Inputs
from rs_consistency.training.runs import Run, check_claim
from rs_consistency.training.session import Session
from rs_consistency.training.step import TrainState, compile_steps

_MEASURED_SECONDS = 2.0
_MEASURED_CALLS = 50


class Plan(NamedTuple):
    """The result of `plan`: lines for the user, the time of the training, and the speeds that it follows from."""

    text: str
    seconds: float
    epoch_seconds: float  # with the evaluation
    votes_per_second: float


def plan(config: ConfigDict, workdir: Path) -> Plan:
    """Measure a few steps and say what `train` would do with the same arguments; write nothing but caches.

    Raises:
      UserError: as `train`.
    """
    session = Session.open(config, workdir)
    sizes, devices, info = session.sizes, session.devices, data.dataset_info(config.dataset.name)
    check_claim(workdir, config, data_digest=session.train.digest())
    with closing(Checkpoints(workdir)) as checkpoints:
        done = max(checkpoints.steps(), default=0)
    state = session.late_state()
    parameters = count_parameters(state.variables)
    votes = VoteSettings.for_dataset(info, sigma=config.sigma, n0=1, n=1, seed=config.seed, devices=devices)
    apply_fn, variables = Run(config, 0, state.variables).classifier()
    voted = measure_votes(apply_fn, variables, session.test.read(np.arange(1))[0], settings=votes, devices=devices)
    with closing(session.open_inputs(None)) as inputs:
        step_seconds, evaluation_seconds, compile_seconds, held = _measure_steps(config, inputs, state)
    left = max(session.last_step - done, 0)
    epoch_seconds = sizes.steps * step_seconds + evaluation_seconds / config.eval_every_epochs
    seconds = left / sizes.steps * epoch_seconds + (compile_seconds if left else 0)
    shape = " x ".join(map(str, info.image_shape))
    lines = [
        session.describe(),
        f"data: {len(session.train):,} training and {len(session.test):,} test images; a step takes"
        f" {sizes.examples} examples x {config.num_noise} noisy copies of {shape}",
        f"model: {config.model}, {parameters:,} parameters, {config.dtype}",
        f"devices: {parallel.describe(devices)}, {size(held)} each for a step, data included",
        f"speed: {config.batch_size / step_seconds:,.0f} noisy images a second, {step_seconds * 1000:.1f} ms a step;"
        f" {compile_seconds:.0f} s to compile",
        f"workdir: {workdir}, {f'at step {done:,}' if done else 'new'}; {left:,} of {session.last_step:,} steps to do",
        f"time: about {duration(seconds)}, with evaluation; certify.py then counts about {voted.per_second:,.0f} votes"
        " a second",
    ]
    method = METHODS[config.method]
    if method.teacher or method.choose:
        lines.append(f"not in it: the votes on training images that {config.method} counts")
    text = "\n".join([*lines, "dry run: nothing but caches was written"])
    return Plan(text, seconds, epoch_seconds, voted.per_second)


def _measure_steps(config: ConfigDict, inputs: Inputs, state: TrainState) -> tuple[float, float, float, int | None]:
    """Time training steps from a state, which is consumed, for about two seconds, and an evaluation step.

    Return the seconds of a step, of an epoch's evaluation steps, and of compiling both, and the most bytes that the
    compiled step holds on a device, with arguments and results; None where XLA does not say.
    """
    steps = compile_steps(config, inputs)
    train, number = steps.train, np.int32(min(steps.per_call, inputs.sizes.steps))
    bytes_per_device = None
    start = time.perf_counter()
    with closing(inputs.feeds(0, inputs.sizes.steps)) as feeds:
        feed = next(feeds)
        if hasattr(train, "lower"):
            train = train.lower(state, number, *feed.args, **feed.parts).compile()
            bytes_per_device = memory_of(train)
        state, _ = jax.block_until_ready(train(state, number, *feed.args, **feed.parts))
        compile_seconds = time.perf_counter() - start
        calls, start = 0, time.perf_counter()
        while calls < _MEASURED_CALLS and time.perf_counter() - start < _MEASURED_SECONDS:
            feed = next(feeds, feed)
            state, _ = jax.block_until_ready(train(state, number, *feed.args, **feed.parts))
            calls += 1
        seconds = (time.perf_counter() - start) / (calls * int(number))
    clock = []
    with closing(inputs.test_feeds()) as feeds:
        first, feed = next(feeds)
        for _ in range(2):  # the first call compiles
            start = time.perf_counter()
            jax.block_until_ready(steps.evaluate(state.variables, np.int32(first), *feed.args, **feed.parts))
            clock.append(time.perf_counter() - start)
    evaluations = -(-inputs.num_test_examples // config.eval_batch_size)
    return seconds, clock[1] * evaluations, compile_seconds + clock[0] - clock[1], bytes_per_device

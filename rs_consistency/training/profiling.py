"""A trace of a few training steps, for TensorBoard or xprof: the time of every operation."""

import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rs_consistency.common.errors import UserError
from rs_consistency.training.metrics import TENSORBOARD_FOLDER
from rs_consistency.training.session import Session
from rs_consistency.training.step import compile_steps

_WARM_UP_CALLS = 3


def profile(config: ConfigDict, workdir: Path, *, num_steps: int) -> str:
    """Trace some steps of the last epoch, from initial parameters, into `tensorboard/` of a workdir; train nothing.

    Args:
      config: as for `train`.
      workdir: the folder of a run, or of a run to come.
      num_steps: steps to trace, after a few to warm up.

    Returns:
      The number of steps, milliseconds a step, the folder of the trace and how to look at it, in a line.

    Raises:
      UserError: as `train`, and for fewer than one step, or more than an epoch has.
    """
    session, folder = Session.open(config, workdir), workdir / TENSORBOARD_FOLDER
    with closing(session.open_inputs(None)) as inputs:
        steps = compile_steps(config, inputs)
        most = max(inputs.sizes.steps // steps.per_call - _WARM_UP_CALLS, 1) * steps.per_call
        if not 1 <= num_steps <= most:
            raise UserError(f"profile={num_steps}: use a number of steps from 1 to {most}, which one epoch has")
        num_calls = -(-num_steps // steps.per_call)
        state, number = session.late_state(), np.int32(steps.per_call)
        with closing(inputs.feeds(0, (_WARM_UP_CALLS + num_calls) * steps.per_call)) as feeds:
            for feed in islice(feeds, _WARM_UP_CALLS):
                state, _ = steps.train(state, number, *feed.args, **feed.parts)
            jax.block_until_ready(state)
            folder.mkdir(parents=True, exist_ok=True)
            with jax.profiler.trace(str(folder)):
                start = time.perf_counter()
                for feed in islice(feeds, num_calls):
                    state, _ = steps.train(state, number, *feed.args, **feed.parts)
                jax.block_until_ready(state)
                seconds = (time.perf_counter() - start) / (num_calls * steps.per_call)
    return (
        f"{num_calls * steps.per_call} steps, {seconds * 1000:.1f} ms a step while tracing,"
        f" {config.batch_size / seconds:.0f} noisy images/s; the trace is in {folder}: look at it with"
        f" `pip install xprof` and `xprof --logdir={folder}`, or with TensorBoard's profile plugin"
    )

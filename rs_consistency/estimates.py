"""What a training or a certification will take, measured before it starts: for `--dry_run`."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rs_consistency import noise, training, voting
from rs_consistency.devices.compiler import steps_per_call
from rs_consistency.inputs import Inputs, StepSizes

_MEASURED_SECONDS = 2.0
_MEASURED_CALLS = 50
_MEASURED_IMAGES = 64
_MEASURED_BATCHES = 8  # of an image


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


class VoteCost(NamedTuple):
    """What votes take.

    Attributes:
      per_second: votes on the wall clock, over all devices.
      bytes_per_device: that a compiled batch holds at most; None where XLA does not say.
    """

    per_second: float
    bytes_per_device: int | None


def measure_votes(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    images: np.ndarray,
    *,
    settings: voting.VoteSettings,
    devices: Sequence[jax.Device],
) -> VoteCost:
    """Times votes on some images `[B, H, W, C]`, for about two seconds; arguments as in `voting.count_votes`."""
    rows = -(-settings.batch_size // len(devices))
    # Whole batches on all devices: then the images do not fit into one group, which alone would not be timed.
    short = settings._replace(n0=1, n=_MEASURED_BATCHES * rows * len(devices) - 1)
    many = images[np.arange(_MEASURED_IMAGES) % len(images)]
    counted, start = 0, 0.0
    for votes in voting.count_votes(
        apply_fn, variables, many, np.arange(len(many)), settings=short, devices=devices, stream=noise.Stream.PREDICT
    ):
        if start == 0.0:  # the first group compiles
            start = time.perf_counter()
            continue
        counted += len(votes.counts) * (short.n0 + short.n)
        if time.perf_counter() - start > _MEASURED_SECONDS:
            break
    per_second = counted / (time.perf_counter() - start)

    def one_batch(variables: Any, key: jax.Array, images: jax.Array, index: jax.Array) -> jax.Array:
        return voting.cast(
            apply_fn,
            variables,
            images,
            key=key,
            addresses=(index, index, index),
            sigma=settings.sigma,
            num_classes=settings.num_classes,
        )

    batch = jax.ShapeDtypeStruct((rows, *images.shape[1:]), jnp.float32)
    index = jax.ShapeDtypeStruct((rows,), jnp.int32)
    key = noise.stream_key(settings.seed, noise.Stream.PREDICT)
    return VoteCost(per_second, memory_of(jax.jit(one_batch).lower(variables, key, batch, index).compile()))


def memory_of(compiled: Any) -> int | None:
    """Bytes that a compiled function holds on a device at most; None where its backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return held - found.alias_size_in_bytes


def count_parameters(variables: Any) -> int:
    """Parameters of a model, without batch statistics."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


def duration(seconds: float) -> str:
    """As h:mm:ss, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))


def size(number: int | None) -> str:
    """Bytes, as MiB."""
    return "not known here" if number is None else f"{number / 2**20:,.0f} MiB"

"""What differs between backends: compiler options, each with its measured gain."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# XLA's YNNPACK fusions make convolution gradients slow on the CPU: a LeNet step ran at 2,780 noisy images/s with
# them and 5,260 without (2 cores, 256 images). They help a forward pass alone, so only training turns them off.
_CPU_TRAINING = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def training_compiler_options(platform: str) -> dict[str, str] | None:
    """XLA options for a training step on a platform; None where the installed jaxlib does not know them."""
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_TRAINING).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU_TRAINING


def repeat(body: Callable[[Any, Any], Any], times: int, start: Any) -> Any:
    """`body(i, ...body(1, body(0, start)))` inside a compiled function.

    On the CPU the loop is unrolled, since convolution gradients inside a compiled loop ran 5.9 times slower there
    (the ten attack steps on 64 MNIST images, LeNet, 2 cores). Elsewhere it is compiled once: quick to compile.

    Args:
      body: (index, value) -> value, of the same shapes and types.
      times: how often.
      start: the first value.

    Returns:
      The last value.
    """
    if times > 0 and jax.default_backend() != "cpu":
        return jax.lax.fori_loop(0, times, body, start)
    value = start
    for index in range(times):
        value = body(index, value)
    return value

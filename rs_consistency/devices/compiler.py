"""XLA options, loops and pieces of a step that suit a platform, each with its measured gain."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_PIECE = 64  # noisy images
_LEAST_PIECE = 16  # noisy images; with smaller pieces the loop takes most of a step


@functools.cache
def training_compiler_options(platform: str, *, matrix_products: bool) -> dict[str, str] | None:
    """Return the XLA options for a training step on a platform; None if the installed jaxlib does not know them.

    XLA's YNNPACK fusions make convolution gradients slow on the CPU: a LeNet step ran at 2,780 noisy images/s with them
    and 5,260 without (2 cores, 256 images). They help a forward pass alone, so only training turns them off. With batch
    norm, the fusions of reductions and of elementwise operations stay: a ResNet-20 step ran at 270 noisy images/s with
    these two and 230 without any. A LeNet step ran at 4,700 and 5,500: the convolutions of `models.QUICK_IN_LOOPS` are
    `matrix_products` on the CPU.
    """
    if platform != "cpu":
        return None
    fusions = "" if matrix_products else "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE"
    options = {"xla_cpu_experimental_ynn_fusion_type": fusions}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def deterministic_options(platform: str) -> dict[str, bool] | None:
    """Return the XLA options that make a program on a platform repeat its results to the last bit.

    A GPU's kernels may add in any order, and its compiler chooses kernels by their speed, unless it is told not to.
    """
    return {"xla_gpu_deterministic_ops": True} if platform == "gpu" else None


def steps_per_call(platform: str) -> int:
    """Return the number of training steps in a call of the device, for steps that can share a feed.

    An accelerator takes a LeNet step in less time than the host needs to send it. On the CPU a call costs little, and
    convolution gradients in a compiled loop are slow: see `repeat`.
    """
    return 1 if platform == "cpu" else 10


def pieces_of(examples: int, num_noise: int, platform: str) -> int:
    """Return the number of pieces of a step, computed one after the other: several on the CPU, to suit its caches.

    It divides the number of examples on a device, of `num_noise` copies each. It is 1 if the pieces would be too small,
    such as for a prime number of examples.

    Only for `models.QUICK_IN_LOOPS`. Pieces of 64 noisy images in a compiled loop, against the whole (LeNet, two cores
    of an AMD EPYC, medians of 6 rounds): Gaussian 8,900 noisy images a second against 7,800, Consistency 8,900 against
    7,900, SmoothAdv 1,610 against 1,350. MACER, 4,096 in a step: 3,913 against 2,246 (two cores of an Intel Xeon, where
    steps of 256 gained nothing and lost nothing).
    """
    if platform != "cpu":
        return 1
    largest = max(1, _PIECE // num_noise)
    pieces = next(n for n in range(1, examples + 1) if examples % n == 0 and examples // n <= largest)
    return pieces if examples // pieces * num_noise >= _LEAST_PIECE else 1


def repeat(body: Callable[[Any, Any], Any], times: int, start: Any, *, compiled: bool = False) -> Any:
    """Return `body(times - 1, ... body(1, body(0, start)))`, inside a compiled function.

    On the CPU the loop is unrolled, since XLA's convolution gradients inside a compiled loop ran 5.9 times slower there
    (the ten attack steps on 64 MNIST images, LeNet, 2 cores). Elsewhere it is a compiled loop, which compiles fast.
    With `compiled` it is one on the CPU, too: LeNet loses nothing, since its convolutions are matrix products.
    """
    if times > 1 and (compiled or jax.default_backend() != "cpu"):
        return jax.lax.fori_loop(0, times, body, start)
    value = start
    for index in range(times):
        value = body(index, value)
    return value


def either(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any], *, compiled: bool = False) -> Any:
    """Return `then()` where the condition holds, else `otherwise()`, inside a compiled function.

    The branch is taken when the function runs. But on the CPU both are computed, unless the branch is `compiled`:
    gradients of three 3x3 convolutions took 16 times as long inside a branch there.
    """
    if compiled or jax.default_backend() != "cpu":
        return jax.lax.cond(condition, then, otherwise)
    return jax.tree.map(functools.partial(jax.numpy.where, condition), then(), otherwise())


def memory_of(compiled: Any) -> int | None:
    """Return the most bytes that a compiled function holds on a device; None if its backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes

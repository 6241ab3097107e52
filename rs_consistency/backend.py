"""What differs between backends: compiler options, each with its measured gain."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# XLA's YNNPACK fusions make convolution gradients slow on the CPU: a LeNet step ran at 2,780 noisy images/s with
# them and 5,260 without (2 cores, 256 images). They help a forward pass alone, so only training turns them off. Where
# there is batch norm, those of reductions and of elementwise operations stay: a ResNet-20 step ran at 270 noisy
# images/s with these two and 230 without any; LeNet's, whose convolutions are matrix products, at 4,700 and 5,500.
_YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_CPU_TRAINING = {_YNN_FUSIONS: ""}
_CPU_TRAINING_CONVOLUTIONS = {_YNN_FUSIONS: "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE"}

CPU_DEVICES = 2  # that `use_cores` makes of a CPU

_PIECE = 64  # noisy images
_LEAST_PIECE = 16  # noisy images; in smaller ones a step is mostly the loop over them

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@functools.cache
def training_compiler_options(platform: str, *, matrix_products: bool) -> dict[str, str] | None:
    """XLA options for a training step on a platform; None where the installed jaxlib does not know them.

    Args:
      platform: of the devices.
      matrix_products: whether the model's convolutions are matrix products on the CPU: `models.QUICK_IN_LOOPS`.
    """
    if platform != "cpu":
        return None
    options = _CPU_TRAINING if matrix_products else _CPU_TRAINING_CONVOLUTIONS
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores() -> None:
    """Lets the cores of a CPU share the work as JAX's devices do: two devices where the process may use two cores.

    Many of XLA's operations keep one core busy, above all the gradients of convolutions by their kernels. With two
    devices on two cores of an Intel Xeon, medians: LeNet trains on 6,110 noisy images a second (one device: 5,470) and
    counts 30,000 votes (24,000), ResNet-20 trains on 330 (270) and counts as many votes. More were not tried.

    To be called before JAX's first computation, later it does nothing; nor does it where XLA_FLAGS or JAX's own
    configuration name a number of devices.
    """
    named = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if available_cores() >= CPU_DEVICES and not named and jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def steps_per_call(platform: str) -> int:
    """Training steps in one call of the device, where all of them can have the same feed.

    An accelerator takes a LeNet step in less time than the host needs to send it. On the CPU a call costs little, and
    convolution gradients in a compiled loop are slow: see `repeat`.
    """
    return 1 if platform == "cpu" else 10


def pieces_of(examples: int, num_noise: int, platform: str) -> int:
    """Pieces of a step, computed one after the other without being asked: on the CPU, for the sake of its caches.

    Pieces of 64 noisy images, in a compiled loop, against the whole (LeNet, two cores of an AMD EPYC, medians of 6
    rounds): Gaussian 8,900 noisy images a second against 7,800, Consistency 8,900 against 7,900, SmoothAdv 1,610
    against 1,350; MACER, 4,096 in a step, 3,913 against 2,246 (two cores of an Intel Xeon, where steps of 256 gained
    nothing and lost nothing). Only for `models.QUICK_IN_LOOPS`.

    Args:
      examples: on a device.
      num_noise: M, noisy copies of each.
      platform: of the devices.

    Returns:
      A divisor of `examples`; 1 where its pieces would be too small, such as those of a prime number of examples.
    """
    if platform != "cpu":
        return 1
    largest = max(1, _PIECE // num_noise)
    pieces = next(n for n in range(1, examples + 1) if examples % n == 0 and examples // n <= largest)
    return pieces if examples // pieces * num_noise >= _LEAST_PIECE else 1


def repeat(body: Callable[[Any, Any], Any], times: int, start: Any, *, compiled: bool = False) -> Any:
    """`body(i, ...body(1, body(0, start)))` inside a compiled function.

    On the CPU the loop is unrolled, since XLA's convolution gradients inside a compiled loop ran 5.9 times slower there
    (the ten attack steps on 64 MNIST images, LeNet, 2 cores). Elsewhere it is compiled once: quick to compile.

    Args:
      body: (index, value) -> value, of the same shapes and types.
      times: how often.
      start: the first value.
      compiled: a loop on the CPU, too: for LeNet, whose convolutions are matrix products there and lose nothing in it.

    Returns:
      The last value.
    """
    if times > 1 and (compiled or jax.default_backend() != "cpu"):
        return jax.lax.fori_loop(0, times, body, start)
    value = start
    for index in range(times):
        value = body(index, value)
    return value


def keep_memory() -> None:
    """Lets the C library keep the memory that XLA frees on the CPU, instead of giving it back and asking for it again.

    glibc maps every large buffer anew, and the kernel clears its pages one by one at first use: with each step, or
    batch of votes. Kept, LeNet trains on 1.36 times as many noisy images a second (2 cores, 256 in a step, medians of
    3), and counts 1.4 times as many votes at 256 in a batch. The process then holds on to the largest memory that it
    ever needed. Without effect under other C libraries, and on accelerators. To be called before the first computation.
    """
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_compiled() -> None:
    """Lets JAX keep what it compiles on disk, so that the next program with the same shapes does not compile again.

    In `$XDG_CACHE_HOME/rs_consistency/xla-...`, a folder for each kind of processor, since code for one may not run on
    another. A `JAX_COMPILATION_CACHE_DIR` in the environment comes first, as does a folder set in the program.
    """
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder(home / "rs_consistency")))


def compiled_folder(home: Path) -> Path:
    """Where in a folder, which machines may share, what is compiled for this kind of processor belongs."""
    features = [line for line in _cpuinfo() if line.startswith(("flags", "Features"))]
    kind = "\n".join([platform.machine(), *sorted(set(features))])
    return home / f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def processor_name() -> str:
    """What the processor is called, for records; its architecture where the system does not say."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

"""The host of the devices: processor cores, memory, the folder of compiled programs, the processor's name."""

import contextlib
import ctypes
import hashlib
import os
import platform
from pathlib import Path

import jax

CPU_DEVICES = 2  # that `use_cores` makes of a CPU
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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

"""The host of the devices: its processor, its memory, and the cache of compiled programs."""

import contextlib
import ctypes
import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax

from rs_consistency.common.errors import first_line, note
from rs_consistency.common.files import cache_folder
from rs_consistency.devices.parallel import choose_devices

CPU_DEVICES = 2  # number of JAX devices that `use_cores` makes of a CPU
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Return the processor's name, for records; its architecture if the system does not know the name."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def fix_number_types() -> None:
    """Make JAX compute with 32 bits where it has the choice, and compile, whatever its environment variables say.

    The programs' results are a function of config, seed and data. All draws name their types, but a constant of 64 bits
    in a network (`JAX_ENABLE_X64`) would give a record another digest. Operation by operation (`JAX_DISABLE_JIT`), a
    step would take hours.
    """
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_disable_jit", False)


def use_cores() -> None:
    """Make two JAX devices of a CPU where the process may use two cores, so that the cores share the work.

    Many of XLA's operations keep one core busy, above all the gradients of convolutions by their kernels. With two
    devices on two cores of an Intel Xeon, medians: LeNet trains on 6,110 noisy images a second (one device: 5,470) and
    counts 30,000 votes (24,000); ResNet-20 trains on 330 (270) and counts as many votes. More devices were not tried.

    Call it before JAX's first computation. It does nothing later, nor if XLA_FLAGS or JAX's configuration already name
    a number of devices.
    """
    named = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if available_cores() >= CPU_DEVICES and not named and jax.config.jax_num_cpu_devices < 1:
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def keep_memory() -> None:
    """Make the C library keep the memory that XLA frees on the CPU, instead of returning it and asking for it again.

    glibc maps every large buffer anew, and the kernel clears its pages at first use, with each step or batch of votes.
    With the memory kept, LeNet trains on 1.36 times as many noisy images a second (2 cores, 256 in a step, medians of
    3) and counts 1.4 times as many votes at 256 in a batch. The process then never shrinks below the largest memory
    that it needed. There is no effect under other C libraries or on accelerators. Call it before the first computation.
    """
    if choose_devices()[0].platform == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_compiled() -> None:
    """Make JAX keep compiled programs on disk, so that later processes do not compile the same shapes again.

    Each kind of processor has its folder `$XDG_CACHE_HOME/rs_consistency/xla-...`, since code for one kind may not run
    on another. A `JAX_COMPILATION_CACHE_DIR` in the environment has precedence, as has a folder that the program set.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder(cache_folder())))
    check_compiled()


def check_compiled() -> None:
    """Keep no compiled programs where there can be no folder for them. Print a note where nothing can be written.

    A folder that only cannot be written serves the programs that it has.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        if "\0" in folder or not Path(folder).is_dir():
            jax.config.update("jax_compilation_cache_dir", None)
        note(f"compiled programs are not kept: {first_line(error)}; make JAX_COMPILATION_CACHE_DIR a usable folder")


def compiled_folder(home: Path) -> Path:
    """Return the subfolder of `home`, which machines may share, for programs compiled for this kind of processor."""
    features = [line for line in _cpuinfo() if line.startswith(("flags", "Features"))]
    kind = "\n".join([platform.machine(), *sorted(set(features))])
    return home / f"xla-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"

"""The memory that a batch needs, from shapes alone, against the memory that is there: before anything is allocated.

On a CPU, a buffer that is too large makes XLA abort the process, or the kernel kill it.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rs_consistency.common.errors import UserError
from rs_consistency.common.progress import size

_LAYERS = ("conv_general_dilated", "dot_general")  # whose results XLA writes to memory; others it may fuse
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def check_memory(name: str, value: Any, needed: int, devices: Sequence[jax.Device]) -> None:
    """Raise a `UserError` if a batch needs more memory on each device than there is; `name` and `value` say how large.

    Devices of a CPU share its memory. Nothing is raised where the system does not say how much there is.
    """
    there = _bytes_free(devices)
    if there is not None and needed > there:
        raise UserError(
            f"{name}={value}: a batch needs at least {size(needed)} on each of {len(devices)} device(s), and"
            f" {size(there)} are there; use a smaller {name}"
        )


def least_bytes(network: Any, batch: jax.ShapeDtypeStruct) -> int:
    """Return a lower bound of the memory for a traced network (a jaxpr) on a batch: the batch, or the largest layer."""
    return max(math.prod(batch.shape) * batch.dtype.itemsize, _largest_layer(network))


def _largest_layer(jaxpr: Any) -> int:
    largest = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in _LAYERS:
            largest = max(largest, *(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in equation.outvars))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            largest = max(largest, _largest_layer(inner)) if hasattr(inner, "eqns") else largest
    return largest


def _bytes_free(devices: Sequence[jax.Device]) -> int | None:
    """Return the memory for each of the devices; None where it is not known."""
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        return None if None in limits else min(limits)
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append((kib["MemAvailable"] + kib.get("SwapFree", 0)) * 1024)
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # without a limit the file says max, or is not there
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found) // len(devices) if found else None

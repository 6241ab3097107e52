"""Work on all devices at once: the only module that uses `pmap`.

A function on a device gets replicated arguments (the same on every device), its part of divided arguments, and its
`shard`, the number of its part of the work. It takes its slice by that number and combines results with
`sum_over_devices`. Results leave the devices replicated and without a device axis, so neither a checkpoint nor the
caller knows the number of devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rs_consistency.common.checks import finite_number, shown
from rs_consistency.common.errors import UserError, first_line

AXIS = "devices"


def choose_devices(count: int = 0) -> list[jax.Device]:
    """Return the first `count` local devices; 0 means all. Raise a `UserError` if there are fewer."""
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # a platform that is not there
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms}: JAX finds no such devices here ({first_line(error)}); unset it,"
            " or install what they need"
        ) from None
    number = finite_number("num_devices", count)
    if number is None or int(number) != number or not 0 <= number <= len(devices):
        raise UserError(
            f"num_devices={shown(count)}: this machine has {len(devices)} {devices[0].platform} device(s);"
            f" use a number from 1 to {len(devices)}, or 0 for all"
        )
    return devices[: int(number) or len(devices)]


def check_devices(devices: Any) -> list[jax.Device]:
    """Return devices that can share work; a `UserError` unless they are different local devices of one platform."""
    remedy = "give a list of different ones of jax.local_devices(), or None for all"
    try:
        devices = list(devices)
    except TypeError:
        raise UserError(f"devices={shown(devices)}: {remedy}") from None
    if not devices:
        raise UserError("devices=[]: give at least one, or None for all")
    for number, device in enumerate(devices):
        if not isinstance(device, jax.Device):
            raise UserError(f"devices has {shown(device)}, which is no device; {remedy}")
        if device in devices[:number]:
            raise UserError(f"devices has {shown(device)} twice; {remedy}")
        if device.process_index != jax.process_index():
            raise UserError(f"devices has {shown(device)}, which belongs to another process; {remedy}")
        if device.platform != devices[0].platform:
            raise UserError(f"devices are of two platforms, {devices[0].platform} and {device.platform}; {remedy}")
    return devices


def describe(devices: Sequence[jax.Device]) -> str:
    """Return number, kind and platform as text, such as `8 x TPU v2 (tpu)`."""
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copy the arrays of a tree to every device, once; `spread` then uses them in place."""
    return jax.device_put(tree, replicated_sharding(devices))


def replicated_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Return the sharding of `replicate`."""
    return NamedSharding(_mesh(devices), PartitionSpec())


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,))


def divide(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Cut host arrays `[D, ...]` along their first axis, a part for each of the D devices: the `parts` of `spread`."""
    return jax.device_put(tree, NamedSharding(_mesh(devices), PartitionSpec(AXIS)))


def sum_over_devices(tree: Any) -> Any:
    """Return the sum over all devices, on every device. It works only inside a function that `spread` runs."""
    return jax.lax.psum(tree, AXIS)


def spread(
    fn: Callable[..., Any],
    *,
    devices: Sequence[jax.Device],
    donate: tuple[int, ...] = (),
    compiler_options: dict[str, str] | None = None,
) -> Callable[..., Any]:
    """Return `fn(shard, *args, **parts)` compiled as `compiled(*args, **parts)`, to run on all devices at once.

    Args:
      fn: function of `shard` (int32 scalar, 0..len(devices)-1), the replicated `args`, and the device's parts, without
        their first axis, of the trees of arrays `[D, ...]` that are passed by name. It must return the same values on
        all devices, so it may use only `args` and `sum_over_devices` for them.
      devices: local devices to use.
      donate: positions in `args` whose buffers may be reused for the results.
      compiler_options: XLA options for this function alone.
    """
    mapped = jax.pmap(
        lambda shard, args, parts: fn(shard, *args, **parts),
        axis_name=AXIS,
        in_axes=(0, None, 0),
        out_axes=None,
        devices=list(devices),
        axis_size=len(devices),
    )
    shards = np.arange(len(devices), dtype=np.int32)
    compiled = jax.jit(
        lambda *args, **parts: mapped(shards, args, parts), donate_argnums=donate, compiler_options=compiler_options
    )
    if devices[0].platform == "cpu" and len(devices) > 1:
        # Simulated devices share a pool of threads. With several calls in flight, sums over devices that wait for each
        # other can fill it, and XLA aborts the process. So there is only one call at a time.
        return lambda *args, **parts: jax.block_until_ready(compiled(*args, **parts))
    return compiled

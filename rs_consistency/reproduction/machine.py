"""This machine, as results and measured speeds name it."""

import json
import platform
import subprocess
import sys
from typing import NamedTuple

from rs_consistency.common.errors import UserError
from rs_consistency.devices.host import CPU_DEVICES, available_cores, processor_name

_CODE = """
import jax, json, sys
from rs_consistency.devices.host import use_cores
if sys.argv[1:]:
    use_cores()
devices = jax.local_devices()
print(json.dumps([devices[0].platform, devices[0].device_kind, len(devices)]))
"""


class Machine(NamedTuple):
    """What runs are made on.

    Attributes:
      platform: of its devices: cpu, gpu or tpu.
      kind: of device, as JAX names it.
      devices: how many.
      processor: name of the host's.
      host: name in its network, or of a container; to tell machines that share a folder apart.
    """

    platform: str
    kind: str
    devices: int
    processor: str
    host: str

    def device(self, wanted: int = 0) -> str:
        """As certificates name it, `1 x cpu (cpu)`; of all devices, or so many as a configuration wants."""
        return f"{wanted or self.devices} x {self.kind} ({self.platform})"

    def where(self, jobs: int) -> str:
        """On which speeds depend: host, devices, and how many runs at a time have them between them."""
        return f"{self.host}, {self.device()}, {jobs} at a time:"


def this_machine(jobs: int | None = None) -> Machine:
    """What JAX finds here, asked in a process of its own: this one must not hold an accelerator.

    Args:
      jobs: runs at a time, which have the cores of a CPU between them; None for one on each core.

    Raises:
      UserError: when JAX finds no device.
    """
    several = ["cores"] if jobs and available_cores() // jobs >= CPU_DEVICES else []  # of which a run makes devices
    done = subprocess.run([sys.executable, "-c", _CODE, *several], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"JAX finds no device ({reason}); set JAX_PLATFORMS=cpu, or make the accelerator free")
    kind, name, devices = json.loads(done.stdout.splitlines()[-1])
    return Machine(kind, name, devices, processor_name(), platform.node())

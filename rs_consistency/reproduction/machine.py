"""The name of this machine in results and measured speeds."""

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
    """The machine of a run.

    Its devices have a `platform`, such as gpu, and a `kind`, JAX's name. The `host`, the name of the host or container,
    tells machines that share a folder apart.
    """

    platform: str
    kind: str
    devices: int
    processor: str
    host: str

    def device(self, wanted: int = 0) -> str:
        """Return `1 x cpu (cpu)`, as in certificates, for all devices or the number that a configuration wants."""
        return f"{wanted or self.devices} x {self.kind} ({self.platform})"

    def where(self, jobs: int) -> str:
        """Return all that speeds depend on: host, devices, and number of runs at a time."""
        return f"{self.host}, {self.device()}, {jobs} at a time:"


def this_machine(jobs: int | None = None) -> Machine:
    """Return the devices that JAX finds here, in a process of its own: this process must not hold an accelerator.

    The jobs, runs at a time, share the cores of a CPU; None stands for one run on each core. A `UserError` is raised
    when JAX finds no device.
    """
    several = ["cores"] if jobs and available_cores() // jobs >= CPU_DEVICES else []  # a run makes devices of its cores
    done = subprocess.run([sys.executable, "-c", _CODE, *several], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"JAX finds no device ({reason}); set JAX_PLATFORMS=cpu, or make the accelerator free")
    kind, name, devices = json.loads(done.stdout.splitlines()[-1])
    return Machine(kind, name, devices, processor_name(), platform.node())

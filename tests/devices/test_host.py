"""The set-up of the host: memory, cores, pieces of a step."""

import ctypes
import os
import subprocess
import sys

import jax
import pytest

from rs_consistency.devices.compiler import deterministic_options, pieces_of
from rs_consistency.devices.host import CPU_DEVICES

_PROGRAM = """
import ctypes, sys
from rs_consistency.devices import host
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]
if sys.argv[1] == "kept":
    host.keep_memory()
before = libc.mallinfo2().hblks
assert libc.malloc(2**28)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize(("how", "mapped"), [("kept", "0"), ("usual", "1")])
def test_large_memory_is_kept_and_not_mapped_anew(how, mapped):
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == mapped


@pytest.mark.parametrize(
    ("examples", "num_noise", "platform", "pieces"),
    [
        (256, 1, "cpu", 4),
        (128, 2, "cpu", 4),
        (64, 1, "cpu", 1),
        (12, 4, "cpu", 1),
        (256, 16, "gpu", 1),
        (256, 16, "cpu", 64),
        (96, 16, "cpu", 24),
        (7, 128, "cpu", 7),
        (251, 1, "cpu", 1),  # a prime: pieces of one noisy image would be slower than none
        (254, 1, "cpu", 1),
        (240, 1, "cpu", 4),
        (251, 16, "cpu", 251),
    ],
)
def test_a_step_goes_in_pieces_on_the_cpu_alone(examples, num_noise, platform, pieces):
    assert pieces_of(examples, num_noise, platform) == pieces
    assert examples % pieces == 0


_DEVICES = """
import jax, sys
from rs_consistency.devices import host
if sys.argv[1] == "late":
    jax.devices()
if sys.argv[1] == "configured":
    jax.config.update("jax_num_cpu_devices", 3)
host.use_cores()
print(len(jax.devices()))
"""


@pytest.mark.parametrize(
    ("when", "flags", "devices"),
    [
        ("first", "", min(CPU_DEVICES, len(os.sched_getaffinity(0)))),
        ("late", "", 1),
        ("configured", "", 3),
        ("first", "--xla_force_host_platform_device_count=4", 4),
    ],
)
def test_cores_become_devices_unless_somebody_said_otherwise(when, flags, devices):
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _DEVICES, when], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.strip() == str(devices)


def test_votes_on_a_gpu_repeat_and_xla_knows_the_option():
    options = deterministic_options("gpu")
    assert options == {"xla_gpu_deterministic_ops": True} and deterministic_options("cpu") is None
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_unknown": True})(1)

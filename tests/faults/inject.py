"""Runs a function in a process of its own, whose k-th write, fsync, rename, ... fails or kills it.

The process is a fork of this process, which has imported the programs and has not yet started JAX: a program begins
within a tenth of a second, and its death is real. `shim.c` sees the operations of Python and of C++ alike.
"""

import atexit
import ctypes
import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "truncate")
ERRORS = {"kill": 0, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
_SHIM = Path(__file__).with_name("shim.c")
_SECONDS = 120


class Fault(NamedTuple):
    """An error, or a kill, at the k-th operation of a kind; counted from 1. A full disk stays full."""

    operation: str
    call: int
    error: str


class Ended(NamedTuple):
    """A process that has ended: status as of `subprocess`, output, and the log of its operations.

    A line of the log is an operation with its number and path, or `safe` with the size of a file that was synced,
    `named` with the path that a file has been renamed to, or `fault`. The status is None after a time-out.
    """

    status: int | None
    out: str
    err: str
    log: list[tuple[str, int, str]]

    @property
    def injected(self) -> bool:
        """Return whether the fault was injected."""
        return any(what == "fault" for what, _, _ in self.log)


def with_shim(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Return an environment for a process that can call `run`."""
    library = folder / "shim.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", str(library), str(_SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return {**environment, "LD_PRELOAD": str(library)}


def run(action: Callable[[], None], *, below: Path, fault: Fault | None = None) -> Ended:
    """Run a function in a process of its own, with a fault in the files below a folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            for number, file in enumerate((out, err), start=1):
                os.dup2(file.fileno(), number)
            _arm(below, fault, log.fileno())
            _end(action)
        status = _wait(child)
        texts = []
        for file in (out, err, log):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    lines = [line.split("\t") for line in texts[2].splitlines()]
    return Ended(status, texts[0], texts[1], [(what, int(number), path) for what, number, path in lines])


def _arm(below: Path, fault: Fault | None, log: int) -> None:
    operation = OPERATIONS.index(fault.operation) if fault else -1
    call, error = (fault.call, ERRORS[fault.error]) if fault else (0, 0)
    ctypes.CDLL(None).faults_arm(os.fsencode(below), operation, call, error, log)


def _end(action: Callable[[], None]) -> None:
    """Run a function and end this process as `common.process.run` does, without a way back into the parent's code."""
    status = 1
    try:
        action()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        if status == 0:
            threading._shutdown()
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait(child: int) -> int | None:
    deadline = time.monotonic() + _SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)

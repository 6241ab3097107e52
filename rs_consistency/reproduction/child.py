"""Runs a program inside a plan: `python -m ...reproduction.child PARENT CORES MODULE ARGS`.

PARENT is the process that runs the plan. This process ends with it, even when the plan is killed, so that a second call
finds nothing in use. CORES are the processor cores to stay on, such as 0,1; empty for all. MODULE has the program's
`main(ARGS)`, such as rs_consistency.cli.train.
"""

import ctypes
import os
import signal
import sys

from rs_consistency.common.process import run

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the program."""
    parent, cores, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(f"error: the plan that this belongs to (process {parent}) has ended; run reproduce.py")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})  # before JAX starts threads
    run(module, arguments)


if __name__ == "__main__":
    main()

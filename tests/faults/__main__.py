"""Runs the suite of faults: `python -m tests.faults [--seed S] [--injections N | --seconds T] [--case CASE]`."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.faults.inject import with_shim

if __name__ == "__main__":
    folder = os.environ.get("FAULTS_SHIM")
    if not folder:
        folder = tempfile.mkdtemp(prefix="shim-")
        settings = {
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
            " --xla_force_host_platform_device_count=1",
            "JAX_PLATFORMS": "cpu",
            "SOURCE_DATE_EPOCH": "0",  # of matplotlib's files
        }
        environment = with_shim({**os.environ, **settings, "FAULTS_SHIM": folder}, Path(folder))
        os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]], environment)
    from tests.faults.suite import main

    try:
        main()
    finally:
        shutil.rmtree(folder)

"""Plans of a few cells whose programs only write files, for tests; `python -m tests.plans FOLDER ...` runs one."""

import contextlib
import io
import subprocess
import sys
import traceback

from rs_consistency.reproduction.machine import Machine
from rs_consistency.reproduction.plan import Options, make_plan
from rs_consistency.reproduction.runner import Runner
from tests import fakes
from tests.helpers import ROOT

MACHINE = Machine("cpu", "cpu", 1, "a processor", "here")
FAKES, TOYS = (dict.fromkeys(("train", "certify", "measure"), name) for name in ("tests.fakes", "tests.toy"))


class _Ended:
    """A process that has ended."""

    def __init__(self, command, stdout, **_):
        done = AtOnce.run(command)
        stdout.write((done.stdout + done.stderr).encode())
        self.returncode = done.returncode

    def poll(self):
        return self.returncode


class AtOnce:
    """Stands for `subprocess` in the runner: a program of fakes.py runs to its end, in this process, when it starts."""

    DEVNULL, TimeoutExpired, Popen = subprocess.DEVNULL, subprocess.TimeoutExpired, _Ended

    @staticmethod
    def run(command, **_):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                fakes.main(command[command.index("tests.fakes") + 1 :])
            except SystemExit as stop:
                status = stop.code
            except Exception:
                traceback.print_exc()
                status = 1
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def cells_of(folder, table="mnist", **options):
    chosen = {"methods": ["gaussian"], "sigmas": [0.5], "images": 4, "n": 1000, "epochs": 2, **options}
    return make_plan(table, Options(**chosen), workdir=folder)


def runner_of(folder, finished=lambda cell: None, jobs=1, **settings):
    settings = {"machine": MACHINE, "finished": finished, "modules": FAKES, **settings}
    return Runner(folder, root=ROOT, jobs=jobs, **settings)


def estimate(runner, cells):
    return runner.speeds.estimate([(cell, runner.glance(cell)) for cell in cells], jobs=1)


def main(folder, *arguments):
    """Run reproduce.py with the programs of fakes.py, on `MACHINE`."""
    from rs_consistency.cli import reproduce
    from rs_consistency.reproduction import machine

    machine.this_machine = lambda jobs: MACHINE
    Runner.__init__.__kwdefaults__["modules"] = FAKES
    reproduce.main([f"--workdir={folder}", f"--results={folder}-results", *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])

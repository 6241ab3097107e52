"""A running cell of a plan: it is trained, then certified, and started again where a signal ended it."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from rs_consistency.common.errors import EXIT_NOT_FINISHED, UserError, note
from rs_consistency.common.files import lock
from rs_consistency.reproduction.machine import Machine
from rs_consistency.reproduction.plan import Cell
from rs_consistency.reproduction.speeds import Speeds
from rs_consistency.reproduction.state import State, inspect, record_call

_MOST_CRASHES = 2  # by a signal, such as for lack of memory, before a cell counts as failed


class Outcome(NamedTuple):
    """The ends of the cells of a plan.

    Cells are finished by this call or an earlier call. Those that failed have a reason, with the path of the log, by
    their names. Cells elsewhere are those that another process runs.
    """

    finished: list[Cell]
    failed: dict[str, str]
    elsewhere: list[Cell]

    def ended(self) -> set[str]:
        """Return the names of all cells that ended."""
        return {*self.failed, *(cell.name for cell in (*self.finished, *self.elsewhere))}


class Jobs(Protocol):
    """The interface of a plan's runner to its running cells; see `runner.Runner`."""

    folder: Path
    machine: Machine
    where: str
    speeds: Speeds

    def workdir(self, cell: Cell) -> Path:
        """Return the folder of a cell."""

    def log(self, cell: Cell) -> Path:
        """Return the log of a cell's programs."""

    def glance(self, cell: Cell) -> State:
        """Return the state of a cell, by counting lines."""

    def done(self, cell: Cell, state: State) -> None:
        """Take note of a finished cell."""

    def time(self, cell: Cell, *, slot: int = 0) -> None:
        """Measure the speed of a cell."""

    def start(self, cell: Cell, program: str, slot: int) -> subprocess.Popen[bytes]:
        """Start a program for a cell."""


class CellRun:
    """A running cell with its current program, in the job `slot`; there is no process before the first step."""

    def __init__(self, runner: Jobs, cell: Cell, slot: int) -> None:
        self.cell, self.slot = cell, slot
        self.process: subprocess.Popen[bytes] | None = None
        self.state = State()
        self._runner, self._program, self._crashes = runner, "", 0
        self._damaged, self._trained_again, self._epochs_before = False, False, 0
        self._stack = contextlib.ExitStack()

    def step(self, outcome: Outcome) -> bool:
        """Check the process and start the next program; return False when the cell has ended."""
        runner, cell = self._runner, self.cell
        try:
            if self.process is None:
                try:
                    self._stack.enter_context(_locked(runner.folder / f".{cell.name}.lock"))
                except UserError:
                    outcome.elsewhere.append(cell)
                    return False
            elif self.process.poll() is None:
                self.state = runner.glance(cell)
                if self._program == "train" and self.state.epochs > self._epochs_before:
                    runner.speeds.learn(cell, epoch_seconds=self.state.epoch_seconds)
                return True
            elif self.process.returncode and not self._trains_again() and not self._again():
                outcome.failed[cell.name] = self._reason()
                return False
            self.state = inspect(cell, runner.workdir(cell))
            if self.state.certified:
                runner.done(cell, self.state)
                outcome.finished.append(cell)
                return False
            program = "certify" if self.state.trained and not self._damaged else "train"
            self._damaged = False
            if program == self._program:
                outcome.failed[cell.name] = (
                    f"{program}: ended without an error, but is not finished (log: {runner.log(cell)})"
                )
                return False
            if cell.needs and not self._program:  # its speed could not be measured before the needed cell was trained
                runner.time(cell, slot=self.slot)
            self._program, self._epochs_before = program, self.state.epochs
            device = runner.machine.device(cell.config().num_devices if program == "train" else 0)
            record_call(
                runner.workdir(cell), program, device=device, processor=runner.machine.processor, where=runner.where
            )
            self.process = runner.start(cell, program, self.slot)
            return True
        except (UserError, OSError) as error:
            outcome.failed[cell.name] = str(error)
            return False

    def _trains_again(self) -> bool:
        """Return whether to train again, once, from the checkpoint before the last, which is damaged."""
        if (self._program, self.process.returncode) != ("certify", EXIT_NOT_FINISHED) or self._trained_again:
            return False
        self._damaged = self._trained_again = True
        note(f"{self.cell.name}: its last checkpoint is damaged; training it again from the one before")
        return True

    def _again(self) -> bool:
        """Return whether to start a failed program again: after a signal, but not after many signals."""
        status = self.process.returncode
        if status == 128 + signal.SIGTERM:
            status = -signal.SIGTERM
        if status > 0 or self._crashes >= _MOST_CRASHES:
            return False
        self._crashes += 1
        self._damaged = self._program == "train" and self._trained_again  # the training was not finished
        note(f"{self.cell.name}: {self._program} ended by signal {-status}; starting it again")
        self._program = ""
        return True

    def _reason(self) -> str:
        log, status = self._runner.log(self.cell), self.process.returncode
        reason = last_line(log.read_text(encoding="utf-8", errors="replace"))
        if status < 0:
            reason = f"ended by signal {-status}, after: {reason}"
        return f"{self._program}: {reason} (log: {log})"

    def text(self) -> str:
        """Return the progress of the cell for the bar."""
        if self._program == "certify":
            return f"{self.cell.name} image {self.state.images}/{self.cell.selection.size}"
        return f"{self.cell.name} epoch {self.state.epochs}/{self.cell.config().num_epochs}"

    def close(self) -> None:
        """Release the cell's lock."""
        self._stack.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a cell against other plans; the lock ends with the process, whatever ends it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, str(path), remedy="; give each of several machines a --shard")
        yield
    finally:
        os.close(descriptor)


def last_line(text: str) -> str:
    """Return the last error line of a program's output, or its last line that is not blank."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or ["no message"])[-1].removeprefix("error: ")

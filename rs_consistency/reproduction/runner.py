"""The runner of a plan: it trains and certifies unfinished cells, several at a time, whatever stops or fails."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from rs_consistency.certificates.columns import seconds_of
from rs_consistency.certificates.read import read_table
from rs_consistency.common.errors import UserError, note
from rs_consistency.common.progress import progress_bar
from rs_consistency.devices.host import compiled_folder
from rs_consistency.reproduction.cell_run import CellRun, Outcome, last_line
from rs_consistency.reproduction.machine import Machine
from rs_consistency.reproduction.plan import Cell, votes_of
from rs_consistency.reproduction.speeds import Speeds
from rs_consistency.reproduction.state import CERTIFICATES, State, calls_of, glance, inspect, is_trained

SPEEDS_FILE = "speeds.json"
_POLL_SECONDS = 0.5
_SECONDS_BETWEEN_LINES = 60  # of the progress, in a log file
_PATIENCE_SECONDS = 50  # until runs have ended after a signal; `common.process` has 60 for the plan
_MEASURE_SECONDS = 900
_MODULES = {
    "train": "rs_consistency.cli.train",
    "certify": "rs_consistency.cli.certify",
    "measure": "rs_consistency.cli.measure",
}


class _Queue(NamedTuple):
    """Waiting cells, running cells, free jobs, and names of cells that a note was printed about."""

    waiting: list[Cell]
    running: list[CellRun]
    free: list[int]
    told: set[str]


class Runner:
    """A runner of cells in a folder, each in a workdir of its own; `where` is `machine.where` for its jobs."""

    def __init__(
        self,
        folder: Path,
        *,
        root: Path,
        jobs: int,
        machine: Machine,
        finished: Callable[[Cell], None],
        batch_size: int | None = None,
        modules: Mapping[str, str] = _MODULES,
    ) -> None:
        """Prepare a number of jobs; on a CPU each stays on its share of this process's processor cores.

        The folder is created where it is missing. `root` is the folder of `configs/`, and `batch_size` an option of
        certify.py. Every certified cell of the table is passed to `finished`, once. The modules have a `main`.
        """
        self.folder, self.machine, self.where = folder, machine, machine.where(jobs)
        self._root, self._jobs, self._finished, self._modules = root, jobs, finished, modules
        self._batch_size = batch_size
        folder.mkdir(parents=True, exist_ok=True)
        self.speeds = Speeds(folder / SPEEDS_FILE, where=self.where)
        pin = machine.platform == "cpu" and hasattr(os, "sched_getaffinity")
        cores = sorted(os.sched_getaffinity(0)) if pin else []
        self._waiting: dict[str, State] = {}  # of cells when the run of the plan began
        self._show_after = 0.0
        self._cores = [cores[number::jobs] if len(cores) >= jobs else [] for number in range(jobs)]

    def workdir(self, cell: Cell) -> Path:
        """Return the workdir of a cell."""
        return self.folder / cell.name

    def glance(self, cell: Cell) -> State:
        """Return the state of a cell by counting lines; a damaged cell counts as not begun, and its run says why."""
        try:
            return glance(cell, self.workdir(cell))
        except (UserError, OSError):
            return State()

    def look(self, cell: Cell) -> State:
        """Return the state of a cell and learn its speed; note a cell that cannot go on, which counts as not begun."""
        try:
            state = inspect(cell, self.workdir(cell))
        except (UserError, OSError) as error:
            note(f"{cell.name}: {error}")
            return State()
        self._learn(cell, state)
        return state

    def _learn(self, cell: Cell, state: State, *, keep: bool = False) -> None:
        """Learn from the work done on this machine with as many jobs: machines that share a folder differ."""
        places: dict[str, set[str | None]] = {}
        try:
            for call in calls_of(self.workdir(cell)):
                places.setdefault(call["program"], set()).add(call.get("where"))
            seconds = state.epoch_seconds if places.get("train") == {self.where} else None
            votes = self._votes_per_second(cell) if state.images and places.get("certify") == {self.where} else None
        except (UserError, OSError) as error:
            note(f"{cell.name}: its speed is not known: {error}")
            return
        self.speeds.learn(cell, keep=keep, epoch_seconds=seconds, votes_per_second=votes)

    def _votes_per_second(self, cell: Cell) -> float | None:
        rows = read_table(self.workdir(cell) / CERTIFICATES).rows.values()
        seconds = sum(seconds_of(row["time"]) for row in rows)
        return len(rows) * votes_of(cell) / seconds if seconds else None

    def measure(self, cells: Sequence[Cell]) -> None:
        """Time every kind of unfinished cell that was not timed before, one after the other.

        A cell that needs another cell, which is not trained yet, is timed when it begins.
        """
        trained = {cell.name for cell in cells if self.glance(cell).trained}
        ready = [
            cell for cell in cells if not self.glance(cell).certified and (cell.needs is None or cell.needs in trained)
        ]
        unknown = {self.speeds.kind(cell): cell for cell in reversed(ready) if not self.speeds.knows(cell)}
        with progress_bar("measuring speed", len(unknown), unit="method", brief=True, show=bool(unknown)) as bar:
            for cell in unknown.values():
                self.time(cell)
                bar.update()

    def time(self, cell: Cell, *, slot: int = 0) -> None:
        """Time a few steps and votes of a cell, unless its speed is known; a failure is noted, and is no error."""
        if self.speeds.knows(cell):
            return
        command = self.command("measure", cell.train_arguments(self._root, self.folder / ".measured"), slot)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_MEASURE_SECONDS, env=self._environment(), check=False
            )
            if done.returncode:
                raise UserError(last_line(done.stderr))
            found = json.loads(done.stdout.splitlines()[-1])
            # On its own cores a run is as fast beside others; of an accelerator it is assumed to get an equal share.
            sharing = 1 if self.machine.platform == "cpu" else self._jobs
            self.speeds.learn(
                cell,
                keep=True,
                epoch_seconds=found["epoch_seconds"] * sharing,
                votes_per_second=found["votes_per_second"] / sharing,
            )
        except subprocess.TimeoutExpired:
            note(f"{cell.name}: its speed is not known: not measured in {_MEASURE_SECONDS} seconds")
        except (UserError, ValueError, IndexError, KeyError) as error:
            note(f"{cell.name}: its speed is not known: {error}")

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Run all cells and return how they ended; after Ctrl-C the next call continues."""
        outcome, queue = Outcome([], {}, []), _Queue(list(cells), [], list(range(self._jobs)), set())
        self._waiting = {cell.name: self.glance(cell) for cell in cells}
        looked_again = False
        try:
            with self._bar(len(cells)) as bar:
                while queue.waiting or queue.running or (outcome.elsewhere and not looked_again):
                    if not queue.waiting and not queue.running:  # another machine may have stopped and left its cells
                        looked_again = True
                        queue.waiting.extend(outcome.elsewhere)
                        outcome.elsewhere.clear()
                    self._begin(queue, cells, outcome)
                    for run in list(queue.running):
                        if not run.step(outcome):
                            queue.running.remove(run)
                            queue.free.append(run.slot)
                            run.close()
                    self._show(bar, cells, queue.running, outcome)
                    if queue.waiting or queue.running:
                        time.sleep(_POLL_SECONDS)
                self._show_after = 0.0  # the last line shows the end
                self._show(bar, cells, queue.running, outcome)
        except KeyboardInterrupt:
            _end([run.process for run in queue.running if run.process])
            raise
        finally:
            for run in queue.running:
                if run.process and run.process.poll() is None:
                    run.process.kill()
                    run.process.wait()
                run.close()
        return outcome

    def _begin(self, queue: "_Queue", cells: Sequence[Cell], outcome: Outcome) -> None:
        """Start the cells that can start, as long as jobs are free."""
        for cell in list(queue.waiting):
            if not queue.free:
                return
            verdict = self._needs(cell, cells, outcome)
            if verdict == "wait":
                continue
            queue.waiting.remove(cell)
            if verdict:
                outcome.failed[cell.name] = verdict
                continue
            run = CellRun(self, cell, queue.free[0])
            # In the queue before its first step, so that an interruption finds the process of that step.
            queue.running.append(run)
            if run.step(outcome):
                queue.free.pop(0)
                continue
            queue.running.remove(run)
            run.close()
            dependent = next((other.name for other in queue.waiting if other.needs == cell.name), None)
            if cell in outcome.elsewhere and dependent:  # it waits for this cell, so this cell is tried again
                outcome.elsewhere.remove(cell)
                queue.waiting.append(cell)
                if cell.name not in queue.told:
                    note(f"{dependent} waits for {cell.name}, which another process is at")
                    queue.told.add(cell.name)

    def _needs(self, cell: Cell, cells: Sequence[Cell], outcome: Outcome) -> str:
        """Return "" for a cell that can start, "wait", or the reason why it never will."""
        needed = next((other for other in cells if other.name == cell.needs), None)
        if cell.needs is None:
            return ""
        if needed is None:
            return f"it needs {cell.needs}, which is not in this plan; leave both in it"
        try:
            # Whether the last checkpoint can be read is known after its first certified image.
            if is_trained(needed, self.workdir(needed)) and self.glance(needed).images:
                return ""
        except (UserError, OSError) as error:
            return f"it needs {cell.needs}: {error}"
        if needed.name in outcome.ended():
            return f"it needs {cell.needs}, which is not trained, or whose checkpoint does not answer; see there"
        return "wait"

    def command(self, program: str, arguments: Sequence[str], slot: int) -> list[str]:
        """Return the command of a program."""
        child = [sys.executable, "-P", "-m", "rs_consistency.reproduction.child"]  # no import from the current folder
        return [*child, str(os.getpid()), ",".join(map(str, self._cores[slot])), self._modules[program], *arguments]

    def start(self, cell: Cell, program: str, slot: int) -> subprocess.Popen[bytes]:
        """Start train or certify for a cell; its output goes to the cell's log."""
        workdir = self.workdir(cell)
        train = program == "train"
        arguments = cell.train_arguments(self._root, workdir)
        if not train:
            arguments = [*cell.certify_arguments(workdir), "--finished"]
            arguments += [f"--batch_size={self._batch_size}"] if self._batch_size else []
        with self.log(cell).open("ab") as log:
            process = subprocess.Popen(
                self.command(program, arguments, slot),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
            )
        return process

    def log(self, cell: Cell) -> Path:
        """Return the log of all runs of a cell."""
        return self.folder / f"{cell.name}.log"

    def done(self, cell: Cell, state: State) -> None:
        """Learn from a finished cell, and pass it to `finished` if it is a cell of the table."""
        self._learn(cell, state, keep=True)
        if not cell.teacher:
            self._finished(cell)

    def _environment(self) -> dict[str, str]:
        """Return the environment of a program, with one compile cache for the plan on this kind of processor.

        Runs that share a GPU take no memory in advance: the first run would leave little to the others.
        """
        paths = [str(self._root), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"JAX_COMPILATION_CACHE_DIR": str(compiled_folder(self.folder / ".compiled"))}
        if self._jobs > 1 and self.machine.platform == "gpu":
            ours["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        return {**ours, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def _bar(self, cells: int) -> tqdm:
        # `_show` sets n by hand, and writes the text anew each time, however little n moved.
        return tqdm(
            total=cells,
            desc="cells",
            unit="cell",
            bar_format="{desc} {n:.2f}/{total} |{bar}| {elapsed}{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
            miniters=0,
        )

    def _show(self, bar: tqdm, cells: Sequence[Cell], running: Sequence[CellRun], outcome: Outcome) -> None:
        """Show the plan's progress: finished cells, and the shares of the time of running cells that are over.

        The time that is left is without the cells of other processes.
        """
        if time.monotonic() < self._show_after:
            return
        self._show_after = time.monotonic() + bar.mininterval
        states = {run.cell.name: run.state for run in running}
        states |= {cell.name: self.glance(cell) for cell in outcome.elsewhere}
        done, to_do = 0.0, []
        for cell in cells:
            state = states.get(cell.name, self._waiting[cell.name])
            if state.certified or cell in outcome.finished or cell.name in outcome.failed:
                done += 1
                continue
            whole, left = self.speeds.seconds_left(cell, State()), self.speeds.seconds_left(cell, state)
            if whole and left is not None:
                done += 1 - left / whole
            if cell not in outcome.elsewhere:
                to_do.append((cell, state))
        bar.n = round(done, 2)
        doing = [run.text() for run in running] + [f"{cell.name} elsewhere" for cell in outcome.elsewhere]
        left = self.speeds.estimate(to_do, jobs=self._jobs).text()
        bar.set_postfix_str("; ".join([f"left {left}", *doing]), refresh=False)
        bar.update(0)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell the runs to end, which a Ctrl-C has told already; wait until they have, and kill them at last."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()

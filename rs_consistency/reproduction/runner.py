"""Trains and certifies the cells of a plan that are not finished, several at a time, whatever interrupts or fails."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rs_consistency.errors import UserError, note
from rs_consistency.estimates import duration
from rs_consistency.files import lock, read_json, write_json
from rs_consistency.reproduction.plan import Cell
from rs_consistency.reproduction.state import CERTIFICATES, State, glance, inspect
from rs_consistency.rows import seconds_of
from rs_consistency.tables import read_table
from rs_consistency.version import code_version
from rs_consistency.workdir import finished_step, read_config

SPEEDS_FILE = "speeds.json"
_POLL_SECONDS = 0.5
_SECONDS_BETWEEN_LINES = 60  # of the progress, where stderr is a file
_PATIENCE_SECONDS = 60  # for runs to end after Ctrl-C
_MEASURE_SECONDS = 900
_MOST_CRASHES = 2  # of a run by a signal, such as for want of memory, before its cell counts as failed
_N0 = 100


class Outcome(NamedTuple):
    """What became of the cells.

    Attributes:
      finished: those that are trained and certified, in whatever call.
      failed: name of a cell -> why, with the log.
      elsewhere: those that another process is at.
    """

    finished: list[Cell]
    failed: dict[str, str]
    elsewhere: list[Cell]


class Speeds:
    """How long things take here: measured before the first run, and again by every run.

    Kept in the plan's folder, so that the next call knows them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}

    def knows(self, cell: Cell) -> bool:
        """Whether all of a cell of this kind was measured."""
        return {"epoch_seconds", "votes_per_second"} <= self._known.get(self.kind(cell), {}).keys()

    def learn(self, cell: Cell, *, keep: bool = False, **found: float | None) -> None:
        """Takes `epoch_seconds` or `votes_per_second` of a cell's kind; writes all of them when asked to keep them."""
        new = {name: value for name, value in found.items() if value}
        self._known.setdefault(self.kind(cell), {}).update(new)
        if keep:
            write_json(self._path, self._known)

    def seconds_left(self, cell: Cell, state: State) -> float | None:
        """Of a cell, at the speed of one run; None where it is not known."""
        known = self._known.get(self.kind(cell), {})
        if not {"epoch_seconds", "votes_per_second"} <= known.keys():
            return None
        epochs = 0 if state.trained else cell.config().num_epochs - state.epochs
        votes = (cell.selection.size - state.images) * (_N0 + cell.n)
        return epochs * known["epoch_seconds"] + votes / known["votes_per_second"]

    @staticmethod
    def kind(cell: Cell) -> str:
        """What decides the speed: sigma, seed and schedule do not."""
        config = cell.config()
        attack = config.get(config.method, {}).get("num_steps", 0)
        consistency = "+consistency" if config.consistency.lbd > 0 else ""
        return f"{config.dataset.name} {config.model} {config.method}{consistency} M{config.num_noise} T{attack}"


class Runner:
    """Runs cells in a folder, each in a workdir of its own.

    Attributes:
      folder: of the workdirs.
      speeds: of what was run.
    """

    def __init__(self, folder: Path, *, root: Path, jobs: int, pin: bool, finished: Callable[[Cell], None]) -> None:
        """A runner of some jobs at a time.

        Args:
          folder: of the workdirs; made where it is missing.
          root: where `configs/` is.
          jobs: runs at a time.
          pin: whether each stays on its share of this process's processor cores.
          finished: called with every cell that is certified, once.
        """
        self.folder, self._root, self._jobs, self._finished = folder, root, jobs, finished
        folder.mkdir(parents=True, exist_ok=True)
        self.speeds = Speeds(folder / SPEEDS_FILE)
        cores = sorted(os.sched_getaffinity(0)) if pin and hasattr(os, "sched_getaffinity") else []
        self._cores = [cores[number::jobs] if len(cores) >= jobs else [] for number in range(jobs)]

    def workdir(self, cell: Cell) -> Path:
        """Of a cell."""
        return self.folder / cell.name

    def seconds_left(self, cells: Sequence[Cell]) -> float | None:
        """Of all of them together, as many at a time as there are jobs; None where a speed is not known."""
        found = [self.speeds.seconds_left(cell, glance(cell, self.workdir(cell))) for cell in cells]
        if any(seconds is None for seconds in found):
            return None
        return max(sum(found) / self._jobs, max(found, default=0.0))

    def look(self, cell: Cell) -> State:
        """How far a cell is, and how fast it went. One that cannot go on counts as not begun; its run will say why."""
        try:
            state = inspect(cell, self.workdir(cell))
        except UserError:
            return State()
        self.speeds.learn(cell, epoch_seconds=state.epoch_seconds, votes_per_second=self._votes_per_second(cell, state))
        return state

    def _votes_per_second(self, cell: Cell, state: State) -> float | None:
        if not state.images:
            return None
        rows = read_table(self.workdir(cell) / CERTIFICATES).rows.values()
        seconds = sum(seconds_of(row["time"]) for row in rows)
        return len(rows) * (_N0 + cell.n) / seconds if seconds else None

    def measure(self, cells: Sequence[Cell]) -> None:
        """Times a few steps and votes of every kind of cell that was not timed before, one after the other."""
        unknown = {self.speeds.kind(cell): cell for cell in reversed(cells) if not self.speeds.knows(cell)}
        with tqdm(unknown.values(), desc="measuring speed", unit="method", leave=False, disable=not unknown) as bar:
            for cell in bar:
                arguments = cell.train_arguments(self._root, self.folder / ".measured")
                module = "rs_consistency.reproduction.measure"
                cores = self._cores[0]
                done = subprocess.run(
                    [*_pinned(cores), sys.executable, "-m", module, *arguments], capture_output=True, text=True,
                    timeout=_MEASURE_SECONDS, env=self._environment(), check=False,
                )  # fmt: skip
                if done.returncode == 0:
                    self.speeds.learn(cell, keep=True, **json.loads(done.stdout.splitlines()[-1]))
                else:
                    note(f"{cell.name}: its speed is not known: {_last_line(done.stderr)}")

    def run(self, cells: Sequence[Cell]) -> Outcome:
        """Brings all cells to their end, or to a failure that is told; after Ctrl-C the next call goes on."""
        waiting, running = list(cells), []
        outcome = Outcome([], {}, [])
        free = list(range(self._jobs))
        try:
            with self._bar(len(cells)) as bar:
                while waiting or running:
                    for cell in list(waiting):
                        if not free:
                            break
                        verdict = self._needs(cell, waiting, running, outcome)
                        if verdict == "wait":
                            continue
                        waiting.remove(cell)
                        if verdict:
                            outcome.failed[cell.name] = verdict
                            continue
                        run = _Run(self, cell, free[0])
                        if run.step(outcome):
                            running.append(run)
                            free.pop(0)
                    for run in list(running):
                        if not run.step(outcome):
                            running.remove(run)
                            free.append(run.slot)
                            run.close()
                    self._show(bar, cells, running, outcome)
                    if running:
                        time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            _end([run.process for run in running if run.process])
            raise
        finally:
            for run in running:
                run.close()
                if run.process and run.process.poll() is None:
                    run.process.kill()
                    run.process.wait()
        return outcome

    def _needs(self, cell: Cell, waiting: list[Cell], running: list["_Run"], outcome: Outcome) -> str:
        """Whether a cell can start: empty, "wait", or why it never will."""
        if cell.needs is None or glance_trained(self.folder / cell.needs):
            return ""
        if any(other.name == cell.needs for other in [*waiting, *(run.cell for run in running)]):
            return "wait"
        return f"it needs {cell.needs}, which is not trained in {self.folder}; run that cell first"

    def command(self, program: str, arguments: Sequence[str], slot: int) -> list[str]:
        """What a run is started with."""
        cores = ",".join(map(str, self._cores[slot]))
        return [sys.executable, "-m", "rs_consistency.reproduction.child", str(os.getpid()), cores, program, *arguments]

    def start(self, cell: Cell, program: str, slot: int) -> subprocess.Popen[bytes]:
        """Starts train or certify for a cell; what it prints goes to the cell's log."""
        workdir = self.workdir(cell)
        train = program == "train"
        arguments = cell.train_arguments(self._root, workdir) if train else cell.certify_arguments(workdir)
        with self.log(cell).open("ab") as log:
            process = subprocess.Popen(
                self.command(program, arguments, slot), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=self._environment(),
            )  # fmt: skip
        return process

    def log(self, cell: Cell) -> Path:
        """Of all of a cell's runs."""
        return self.folder / f"{cell.name}.log"

    def done(self, cell: Cell, state: State) -> None:
        """Learns from a finished cell, and hands it on."""
        votes = self._votes_per_second(cell, state)
        self.speeds.learn(cell, keep=True, epoch_seconds=state.epoch_seconds, votes_per_second=votes)
        self._finished(cell)

    def _environment(self) -> dict[str, str]:
        """With one compile cache for all runs of the plan."""
        paths = [str(self._root), *filter(None, [os.environ.get("PYTHONPATH")])]
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / ".compiled")}
        return {**cache, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def _bar(self, cells: int) -> tqdm:
        return tqdm(
            total=cells, desc="cells", unit="cell", bar_format="{desc} {n:.2f}/{total} |{bar}| {elapsed}{postfix}",
            mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
        )  # fmt: skip

    def _show(self, bar: tqdm, cells: Sequence[Cell], running: list["_Run"], outcome: Outcome) -> None:
        """The plan's progress: whole cells, and of those that run the share of the time that is behind them."""
        done = float(len(outcome.finished) + len(outcome.failed) + len(outcome.elsewhere))
        for run in running:
            state = run.state
            whole = self.speeds.seconds_left(run.cell, State())
            left = self.speeds.seconds_left(run.cell, state)
            if whole and left is not None:
                done += 1 - left / whole
        ended = {*outcome.failed, *(cell.name for cell in (*outcome.finished, *outcome.elsewhere))}
        seconds = self.seconds_left([cell for cell in cells if cell.name not in ended])
        bar.n = round(done, 2)
        left = "not known yet" if seconds is None else duration(seconds)
        bar.set_postfix_str(f"left {left}; {'; '.join(run.text() for run in running)}", refresh=False)
        bar.update(0)


class _Run:
    """A cell under way: what it does now, and what comes next."""

    def __init__(self, runner: Runner, cell: Cell, slot: int) -> None:
        self.cell, self.slot = cell, slot
        self.process: subprocess.Popen[bytes] | None = None
        self.state = State()
        self._runner, self._program, self._crashes = runner, "", 0
        self._stack = contextlib.ExitStack()

    def step(self, outcome: Outcome) -> bool:
        """Looks, and starts what is next; False when there is nothing more to do."""
        runner, cell = self._runner, self.cell
        workdir = runner.workdir(cell)
        try:
            if self.process is None:
                try:
                    self._stack.enter_context(_locked(runner.folder / f".{cell.name}.lock"))
                except UserError:
                    outcome.elsewhere.append(cell)
                    return False
            elif self.process.poll() is None:
                self.state = glance(cell, workdir)
                runner.speeds.learn(cell, epoch_seconds=self.state.epoch_seconds)
                return True
            elif self.process.returncode < 0 and self._crashes < _MOST_CRASHES:
                self._crashes += 1
                note(f"{cell.name}: {self._program} ended by signal {-self.process.returncode}; starting it again")
                self._program = ""
            elif self.process.returncode:
                log = runner.log(cell)
                reason = _last_line(log.read_text(encoding="utf-8", errors="replace"))
                if self.process.returncode < 0:
                    reason = f"ended by signal {-self.process.returncode}, after: {reason}"
                outcome.failed[cell.name] = f"{self._program}: {reason} (log: {log})"
                return False
            self.state = inspect(cell, workdir)
            if self.state.certified:
                runner.done(cell, self.state)
                outcome.finished.append(cell)
                return False
            program = "certify" if self.state.trained else "train"
            if program == self._program:
                outcome.failed[cell.name] = (
                    f"{program}: ended without an error, but is not finished (log: {runner.log(cell)})"
                )
                return False
            self._program = program
            self._record()
            self.process = runner.start(cell, program, self.slot)
            return True
        except (UserError, OSError) as error:
            outcome.failed[cell.name] = str(error)
            return False

    def _record(self) -> None:
        """Which code does what in this workdir, and since when; for the results."""
        workdir = self._runner.workdir(self.cell)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        entry: dict[str, Any] = {"program": self._program, "started": started, **code_version()}
        write_json(_provenance_path(workdir), {"calls": [*provenance_of(workdir), entry]})

    def text(self) -> str:
        """What it is at, for the bar."""
        if self._program == "certify":
            return f"{self.cell.name} image {self.state.images}/{self.cell.selection.size}"
        return f"{self.cell.name} epoch {self.state.epochs}/{self.cell.config().num_epochs}"

    def close(self) -> None:
        """Lets others have the cell."""
        self._stack.close()


def provenance_of(workdir: Path) -> list[dict[str, Any]]:
    """The calls that made a cell's workdir; empty for one that was made by hand."""
    path = _provenance_path(workdir)
    return read_json(path).get("calls", []) if path.exists() else []


def _provenance_path(workdir: Path) -> Path:
    return workdir.parent / f".{workdir.name}.calls.json"


def glance_trained(workdir: Path) -> bool:
    """Whether a workdir's run is finished, whatever its config."""
    if not (workdir / "config.json").exists():
        return False
    last = finished_step(workdir, read_config(workdir))
    return last is not None and (workdir / "checkpoints" / str(last)).is_dir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other plans off a cell; the lock ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, str(path))
        yield
    finally:
        os.close(descriptor)


def _pinned(cores: Sequence[int]) -> list[str]:
    if not cores:
        return []
    code = (
        "import os,sys;os.sched_setaffinity(0,set(map(int,sys.argv[1].split(','))));os.execv(sys.argv[2],sys.argv[2:])"
    )
    return [sys.executable, "-c", code, ",".join(map(str, cores))]


def _last_line(text: str) -> str:
    """The last line that says something; of a program's output, its error."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or ["no message"])[-1].removeprefix("error: ")


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """After Ctrl-C, which the runs got, too: waits until they have saved what they do."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()

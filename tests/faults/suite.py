"""The suite of faults: each case is checked from the outside, and then the same command goes on without a fault."""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from rs_consistency import data
from rs_consistency.common.errors import EXIT_FAILED_CELLS
from rs_consistency.report import formats
from tests.faults.inject import ERRORS, OPERATIONS, Ended, Fault, run
from tests.faults.programs import Program, careless, programs, stand_still, train_in
from tests.helpers import write_tfds

KINDS = ("lost", "half-written", "traceback", "wrong end", "not continued", "left over")
_SECONDS = 175
# Never compared: TensorBoard's events and logs name times; `Program.state` compares checkpoints.
_UNCOMPARED = ("run/checkpoints/", "run/damaged_checkpoints/", "run/tensorboard/")
_TIMES = re.compile(rb'\d{4}-\d\d-\d\dT[\d:]+\+00:00|(?<="noisy_images_per_second": )[\d.e+]+')
_TEMPORARY = re.compile(r"(^|/)\.[^/]*\.tmp$|orbax-checkpoint-tmp")

_ENDS = (b"\n", b"%%EOF\n", b"IEND\xaeB`\x82")  # of text, PDF, PNG

Files = dict[str, bytes]


class Case(NamedTuple):
    """A fault in a program."""

    program: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.program}/{self.fault.operation}/{self.fault.call}/{self.fault.error}"


def files_in(folder: Path) -> Files:
    """Return the content of every file by its path within the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def compared(files: Files) -> Files:
    """Return the files that a run without faults gives again, without times, speeds and the calls that made them."""
    found = {}
    for name, content in files.items():
        if name.startswith(_UNCOMPARED):
            continue
        if name.endswith((".log", ".lock", "speeds.json")):
            content = b""
        if name.endswith((".json", ".jsonl")):
            content = _TIMES.sub(b"", content)
        if name.endswith(("calls.json", "run.json")):
            with contextlib.suppress(ValueError):  # half-written
                content = json.dumps({**json.loads(content), "calls": []}).encode()
        found[name] = content
    return found


class Undisturbed(NamedTuple):
    """A program without faults: its files before and after, its state, and its operations."""

    before: Files
    after: Files
    state: str
    ended: Ended


class Suite:
    """The programs, in a folder that each of them finds as it was prepared."""

    def __init__(self, home: Path) -> None:
        self._home, self._work = home, home / "work"
        self._state = home / "state"
        os.environ["TFDS_DATA_DIR"] = str(home / "tfds")
        jax.config.update("jax_compilation_cache_dir", str(home / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        stand_still()
        self._made(lambda: _write_data(home / "tfds"))
        trained = home / "trained"
        self._work.mkdir()
        self._made(lambda: train_in(self._work))
        self._work.rename(trained)
        self._known: dict[str, Undisturbed] = {}
        self.programs: dict[str, Program] = {"careless": careless()}
        seen = {kind for case in self.cases("careless") for kind, _ in self.violations(case) or ()}
        assert seen == set(KINDS), f"the suite does not see what is wrong with a careless program: {seen}"
        self.programs = programs(trained)

    def _made(self, action: Callable[[], None]) -> None:
        ended = run(action, below=self._work)
        assert ended.status == 0, ended

    def undisturbed(self, name: str) -> Undisturbed:
        """Run a program without faults, once."""
        if name not in self._known:
            program, prepared = self.programs[name], self._home / name
            shutil.rmtree(self._work, ignore_errors=True)
            program.prepare(self._work)
            before = files_in(self._work)
            shutil.copytree(self._work, prepared)
            ended = self._run(program)
            assert ended.status == 0, f"{name}: {ended.err}"
            self._known[name] = Undisturbed(before, files_in(self._work), self._state.read_text(), ended)
        return self._known[name]

    def cases(self, name: str) -> list[Case]:
        """Return every fault at every operation of a program."""
        number = Counter(what for what, *_ in self.undisturbed(name).ended.log)
        return [
            Case(name, Fault(operation, call, error))
            for operation in OPERATIONS
            for error in ERRORS
            if not (error == "ENOSPC" and operation in ("unlink", "truncate"))  # they need no space
            for call in range(1, number[operation] + 1)
        ]

    def _run(self, program: Program, fault: Fault | None = None) -> Ended:
        def action() -> None:
            if fault:  # no compiled program is kept, of which a kill could leave the half
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
            program.call(self._work)
            if fault is None:
                self._state.write_text(program.state(self._work))

        return run(action, below=self._work, fault=fault)

    def violations(self, case: Case) -> list[tuple[str, str]] | None:
        """Return the kinds of what went wrong, with a sentence each; None where the fault did not come about."""
        program, known = self.programs[case.program], self.undisturbed(case.program)
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._home / case.program, self._work)
        ended = self._run(program, case.fault)
        if not ended.injected:
            return None
        after = files_in(self._work)
        found = _wrong_ends(case, ended, after, known)
        found += _damages(after, known, some_failed=ended.status == EXIT_FAILED_CELLS)
        found += _losses(ended, self._work, after, known)
        again = self._run(program)
        left = files_in(self._work)
        if left_over := [name for name in left if _TEMPORARY.search(name)]:
            found.append(("left over", ", ".join(left_over)))
        if again.status != 0:
            found.append(("not continued", f"status {again.status}: {again.err[-600:]}"))
        else:
            found += self._differences(left, known)
        found += _steps_lost(ended, again, known)
        if again.err.count(" is unreadable") > known.ended.err.count(" is unreadable"):
            found.append(("lost", again.err[-600:]))
        return found

    def _differences(self, left: Files, known: Undisturbed) -> list[tuple[str, str]]:
        found = []
        mine, theirs = compared(left), compared(known.after)
        differing = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
        differing = sorted(name for name in differing if not _TEMPORARY.search(name))
        if differing:
            found.append(("not continued", f"other files than without a fault: {', '.join(differing)}"))
        state = self._state.read_text()
        if state != known.state:
            found.append(("not continued", f"other state: {state}, not {known.state}"))
        return found


def _wrong_ends(case: Case, ended: Ended, after: Files, known: Undisturbed) -> list[tuple[str, str]]:
    """Check status and error lines."""
    found, shown = [], f"status {ended.status}: {ended.err[-1500:]}"
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        found.append(("traceback", shown))
    if case.fault.error == "kill":
        return found if ended.status == -signal.SIGKILL else [*found, ("wrong end", shown)]
    if ended.status == 0:
        differing = compared(after).items() ^ compared(known.after).items()
        # A program without its cache of decoded images goes on.
        uncached = {name for name in known.after if name.startswith("cache/") and name not in after}
        names = sorted({name for name, _ in differing if not _TEMPORARY.search(name)} - uncached)
        return [*found, ("wrong end", f"status 0, but {', '.join(names)} differ")] if names else found
    lines = ended.err.splitlines()
    errors, cells = (sum(line.startswith(word) for line in lines) for word in ("error: ", "failed: "))
    if ended.status not in (1, 2) or not (errors == 1 or (cells and not errors)):  # reproduce.py names failed cells
        found.append(("wrong end", shown))
    return found


def _damages(after: Files, known: Undisturbed, *, some_failed: bool) -> list[tuple[str, str]]:
    """Check that every file has its old or its new content, or whole lines of it.

    Where `some_failed`, cells of a plan, the files about the others are other files, which must be whole.
    """
    found, old, new = [], compared(known.before), compared(known.after)
    for name, content in after.items():
        if _TEMPORARY.search(name) or name.startswith(_UNCOMPARED) or name.endswith((".log", ".lock")):
            continue
        try:
            if name.endswith(".json"):
                json.loads(content)
            elif name.endswith((".tsv", ".jsonl")):
                whole = {name: content[: content.rfind(b"\n") + 1]}
                lines = set(compared(whole)[name].splitlines())
                if not lines <= {*new.get(name, b"").splitlines(), *old.get(name, b"").splitlines()}:
                    found.append(("half-written", f"{name}: {content[-300:]!r}"))
            elif content not in (old.get(name), new.get(name)) and not (some_failed and content.endswith(_ENDS)):
                found.append(("half-written", f"{name}, {len(content)} bytes"))
        except ValueError as error:
            found.append(("half-written", f"{name}: {error}"))
    return found


def _losses(ended: Ended, work: Path, after: Files, known: Undisturbed) -> list[tuple[str, str]]:
    """Check that all finished work is there: lines, checkpoints, and files that were not to be replaced."""
    found = []
    for name, content in known.before.items():
        if name.startswith(_UNCOMPARED) or name not in known.after:
            continue
        if name not in after:
            found.append(("lost", name))
        elif name.endswith(".tsv"):
            missing = set(content[: content.rfind(b"\n")].splitlines()) - set(after[name].splitlines())
            if missing:
                found.append(("lost", f"{name}: {len(missing)} lines"))
    synced = {path: size for what, size, path in ended.log if what == "safe" and path.endswith(".tsv")}
    for path, size in synced.items():
        name = Path(path).relative_to(work).as_posix()
        if not Path(path).name.startswith(".") and len(after.get(name, b"")) < size:
            found.append(("lost", f"{name}: {size} bytes were synced, {len(after.get(name, b''))} are there"))
    return found


def _steps_lost(ended: Ended, again: Ended, known: Undisturbed) -> list[tuple[str, str]]:
    """Check that a training goes on after the newest checkpoint that was whole before, or that the fault came after."""
    found = [re.search(r"run/checkpoints/(\d+)/.*/manifest.ocdbt", name) for name in known.before]
    found += [re.search(r"/checkpoints/(\d+)$", path) for what, _, path in ended.log if what == "named"]
    newest = max((int(match[1]) for match in found if match), default=0)
    goes_on = re.search(r"continuing after step (\d+)", again.err)
    if "loss" not in again.out or not newest or (goes_on and int(goes_on[1]) >= newest):
        return []
    return [("lost", f"checkpoint {newest}: the training goes on after {goes_on[1] if goes_on else 'none'}")]


def _write_data(folder: Path) -> None:
    train, test = data.load("mnist_subset", "train"), data.load("mnist_subset", "test")
    splits = {"train": (train.images[:96], train.labels[:96]), "test": (test.images[:20], test.labels[:20])}
    write_tfds(folder, "mnist", "3.0.1", splits)


def _order(suite: Suite, seed: int) -> Iterator[Case]:
    """Yield all cases in a random order, of each program in turn."""
    draw, waiting = random.Random(seed), {name: suite.cases(name) for name in suite.programs}
    for cases in waiting.values():
        draw.shuffle(cases)
    while any(waiting.values()):
        yield from [cases.pop() for cases in waiting.values() if cases]


def _case_of(text: str, suite: Suite) -> Case:
    program, operation, call, error = (text.rsplit("/", 3) + [""] * 3)[:4]
    if program not in suite.programs or operation not in OPERATIONS or error not in ERRORS or not call.isdigit():
        raise SystemExit(f"error: case={text!r}; write PROGRAM/OPERATION/K/FAULT, such as merge/write/1/EIO")
    return Case(program, Fault(operation, int(call), error))


def _table(counts: Mapping[tuple[str, str], Counter[str]]) -> str:
    """Return a line for each program and operation: how often each fault was injected, and what went wrong."""
    columns = (*ERRORS, *KINDS)
    lines = [["program", "operation", *columns]]
    for (program, operation), count in sorted(counts.items()):
        lines.append([program, operation, *(str(count[column]) for column in columns)])
    lines.append(["all", "", *(str(sum(count[column] for count in counts.values())) for column in columns)])
    return formats.markdown([lines[0], *lines[1:]])


def _properties_hold(seed: int) -> bool:
    """Run the tests with arbitrary files and counts, with ten times as many examples as in `make test`."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=-q",
        "tests/test_properties.py",
        f"--hypothesis-seed={seed}",
    ]
    return subprocess.run(command, env=environment | {"RS_CONSISTENCY_EXAMPLES": "10"}, check=False).returncode == 0


def main() -> None:
    """Run the cases until the injections, or the time, are over; exit with 1 at any violation."""
    parser = argparse.ArgumentParser(prog="make test-faults")
    add = parser.add_argument
    add("--seed", type=int, help="of the order of the cases (default: a new seed, which is printed)")
    add("--injections", type=int, help="number of injections, whatever their time")
    add("--seconds", type=float, default=_SECONDS, help="time of it all (default: %(default)s)")
    add("--case", help="repeat a single case, PROGRAM/OPERATION/K/FAULT, as a failure names it")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    home = Path(tempfile.mkdtemp(prefix="faults-")).resolve()  # no TemporaryDirectory: the end of a fork removes it
    begun, injected = time.monotonic(), 0
    failed = 0 if args.case or _properties_hold(seed) else 1
    counts: dict[tuple[str, str], Counter[str]] = {}
    try:
        suite = Suite(home)
        cases = [_case_of(args.case, suite)] if args.case else _order(suite, seed)
        for case in cases:
            over = time.monotonic() - begun > args.seconds if args.injections is None else injected >= args.injections
            if over and not args.case:
                break
            found = suite.violations(case)
            if found is None:
                if args.case:
                    print(f"{case}: there is no such operation", flush=True)
                continue
            injected += 1
            count = counts.setdefault((re.split("[,(]", case.program)[0].strip(), case.fault.operation), Counter())
            count.update([case.fault.error, *{kind for kind, _ in found}])
            failed += bool(found)
            if injected % 100 == 0:
                print(f"{injected} injections, {failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
            for kind, text in found:
                print(f"{kind}: {case}: {text}\n  make test-faults CASE='{case}'", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(f"\n{_table(counts)}")
    print(f"seed {seed}, {injected} injections in {time.monotonic() - begun:.0f} s")
    print(f"{max(0, injected - failed)} passed, {failed} failed")
    if failed or not injected:
        raise SystemExit(1)

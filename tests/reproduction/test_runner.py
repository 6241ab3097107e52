"""Plans under way, with programs that only write files: locks, signals, kills, needs, damage, and results."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from rs_consistency.cli import reproduce
from rs_consistency.common import files
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import write_json
from rs_consistency.reproduction import runner as runner_module
from rs_consistency.reproduction.plan import Options, make_plan
from rs_consistency.reproduction.results import check_keepable, keep, read_results
from rs_consistency.reproduction.runner import Runner
from rs_consistency.reproduction.state import State, calls_of, inspect, is_trained
from tests import fakes
from tests.helpers import ROOT, count_lines, kill_when
from tests.plans import FAKES, MACHINE, AtOnce, cells_of, estimate, runner_of


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Programs that run at once, in this process, but where the test is about a process."""
    monkeypatch.setattr(runner_module, "_POLL_SECONDS", 0.02)
    if "in_processes" not in request.keywords:
        monkeypatch.setattr(runner_module, "subprocess", AtOnce)


@pytest.fixture
def fake_plans(monkeypatch):
    """`reproduce.main` on `MACHINE`, with programs that only write files, and without the tables and pictures."""
    monkeypatch.setitem(Runner.__init__.__kwdefaults__, "modules", FAKES)
    monkeypatch.setattr("rs_consistency.reproduction.machine.this_machine", lambda jobs: MACHINE)
    monkeypatch.setattr(reproduce, "_render", lambda *_: "")  # takes seconds; test_comparison.py is about them


@contextlib.contextmanager
def held(folder, cell):
    """Another process is at the cell, as far as anybody can tell."""
    descriptor = os.open(folder / f".{cell.name}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield lambda: os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.in_processes
def test_a_run_that_a_signal_ended_starts_again_and_says_where(tmp_path, capfd):
    (cell,) = cells_of(tmp_path)
    (tmp_path / f"crash_{cell.name}").touch()
    finished = []
    outcome = runner_of(tmp_path, finished.append).run([cell])
    assert outcome.finished == finished == [cell] and not outcome.failed
    assert f"{cell.name}: train ended by signal 9; starting it again" in capfd.readouterr().err
    calls = calls_of(tmp_path / cell.name)
    assert [call["program"] for call in calls] == ["train", "certify"]  # the first had made nothing
    assert {(call["device"], call["processor"]) for call in calls} == {("1 x cpu (cpu)", "a processor")}


@pytest.mark.parametrize(("status", "number"), [(143, 15), (2, None)])
def test_a_run_that_was_told_to_end_starts_again_and_another_error_does_not(status, number, tmp_path, capfd):
    (cell,) = cells_of(tmp_path)
    (tmp_path / f"crash_{cell.name}").write_text(str(status))
    outcome = runner_of(tmp_path).run([cell])
    assert outcome.finished == ([cell] if number else []) and bool(outcome.failed) == (not number)
    assert (f"train ended by signal {number}; starting it again" in capfd.readouterr().err) == bool(number)


def test_an_interrupted_plan_tells_its_runs_to_end():
    process = subprocess.Popen(["sleep", "600"])
    runner_module._end([process])
    assert process.returncode == -signal.SIGTERM


def test_calls_whose_work_was_taken_away_are_forgotten(tmp_path):
    (cell,) = cells_of(tmp_path)
    workdir, runner = tmp_path / cell.name, runner_of(tmp_path)

    def programs_and_starts():
        runner.run([cell])
        return [(call["program"], call["started"]) for call in calls_of(workdir)]

    before = programs_and_starts()
    assert [program for program, _ in before] == ["train", "certify"]
    write_json(tmp_path / f".{cell.name}.calls.json", {"calls": [{"program": p, "started": "then"} for p, _ in before]})
    (workdir / "certificates.tsv").unlink()
    (train, _), (certify, started) = programs_and_starts()
    assert (train, certify) == ("train", "certify") and started != "then"
    assert calls_of(workdir)[0]["started"] == "then"
    shutil.rmtree(workdir)
    assert [program for program, started in programs_and_starts() if started != "then"] == ["train", "certify"]
    assert len(calls_of(workdir)) == 2


def test_a_damaged_last_checkpoint_is_trained_again_once(tmp_path, capfd):
    saved, lost = cells_of(tmp_path, methods=["gaussian", "stability"])
    for cell, text in ((saved, ""), (lost, "for good")):
        fakes.write_trained(cell.config(), tmp_path / cell.name)
        (tmp_path / f"damaged_{cell.name}").write_text(text)
    outcome = runner_of(tmp_path).run([saved, lost])
    assert outcome.finished == [saved]
    assert [call["program"] for call in calls_of(tmp_path / saved.name)] == ["train", "certify"]
    assert f"{saved.name}: its last checkpoint is damaged; training it again" in capfd.readouterr().err
    assert outcome.failed[lost.name].startswith("certify: ")
    assert not (tmp_path / lost.name / "certificates.tsv").exists()


@pytest.mark.in_processes
def test_a_signal_while_a_damaged_checkpoint_is_trained_again_costs_nothing(tmp_path):
    (cell,) = cells_of(tmp_path)
    fakes.write_trained(cell.config(), tmp_path / cell.name)
    for name in ("damaged", "crash"):
        (tmp_path / f"{name}_{cell.name}").touch()
    assert runner_of(tmp_path).run([cell]).finished == [cell]


def test_nothing_learns_from_a_teacher_whose_last_checkpoint_is_damaged(tmp_path, monkeypatch):
    teacher, student = cells_of(tmp_path, "cifar10", methods=["catrs"], sigmas=[0.25])
    fakes.write_trained(teacher.config(), tmp_path / teacher.name)
    (tmp_path / f"damaged_{teacher.name}").touch()
    runner, started = runner_of(tmp_path, jobs=2), []
    begin = runner.start
    monkeypatch.setattr(runner, "start", lambda cell, *rest: started.append((cell, rest[0])) or begin(cell, *rest))
    assert not runner.run([teacher, student]).failed
    assert started[:3] == [(teacher, "certify"), (teacher, "train"), (teacher, "certify")]
    assert started[3:] == [(student, "train"), (student, "certify")]


def test_the_batch_of_a_plan_is_that_of_its_certifications(tmp_path, monkeypatch):
    (cell,) = cells_of(tmp_path)
    commands = []
    monkeypatch.setattr(runner_module.subprocess, "Popen", lambda command, **_: commands.append(command))
    for batch_size in (None, 64):
        runner = runner_of(tmp_path, batch_size=batch_size)
        for program in ("train", "certify"):
            runner.start(cell, program, 0)
    assert ["--batch_size=64" in command for command in commands] == [False, False, False, True]


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path):
    mine, other = cells_of(tmp_path, methods=["gaussian", "stability"])
    runner = runner_of(tmp_path)
    with held(tmp_path, other):
        outcome = runner.run([mine, other])
    assert outcome.finished == [mine] and outcome.elsewhere == [other] and not outcome.failed
    assert not (tmp_path / other.name).exists()
    assert runner.run([mine, other]).finished == [mine, other]


def test_cells_that_another_machine_left_are_taken_at_the_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runner_module, "_SECONDS_BETWEEN_LINES", 0)
    other, mine = cells_of(tmp_path, methods=["gaussian", "stability"])
    runner = runner_of(tmp_path)
    with held(tmp_path, other) as release:
        begin = runner.start

        def start(cell, program, slot):  # the other machine goes while this one is at its cell
            if (cell, program) == (mine, "train"):
                release()
            return begin(cell, program, slot)

        monkeypatch.setattr(runner, "start", start)
        outcome = runner.run([other, mine])
    assert outcome.finished == [mine, other] and not outcome.elsewhere
    shown = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "elsewhere" in line]
    assert shown and all(
        f"{other.name} elsewhere" in line and float(line.split()[1].split("/")[0]) < 2 for line in shown
    )


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()

    def lock(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.fcntl, "flock", flock)
        with (tmp_path / "file").open() as file:
            files.lock(file.fileno(), "workdir=x")

    lock(errno.ENOLCK)
    assert "workdir=x cannot be locked here (No locks available)" in capsys.readouterr().err
    with pytest.raises(OSError, match="Input/output"):
        lock(errno.EIO)
    with pytest.raises(UserError, match="in use by another process"):
        lock(errno.EWOULDBLOCK)


def test_what_needs_a_cell_waits_for_it_wherever_it_is_trained(tmp_path, capfd):
    teacher, student = cells_of(tmp_path, "cifar10", methods=["catrs"], sigmas=[0.25])
    runner = runner_of(tmp_path, jobs=2)
    with held(tmp_path, teacher) as release:
        looked = iter(range(5))

        def show(*_):
            if next(looked, None) is None and not (tmp_path / teacher.name).exists():
                fakes.write_trained(teacher.config(), tmp_path / teacher.name)  # by the other process
                release()

        runner._show = show
        outcome = runner.run([teacher, student])
    assert not outcome.failed and not outcome.elsewhere
    assert {cell.name for cell in outcome.finished} == {teacher.name, student.name}
    assert [call["program"] for call in calls_of(tmp_path / teacher.name)] == ["certify"]
    err = capfd.readouterr().err
    assert err.count(f"{student.name} waits for {teacher.name}, which another process is at") == 1
    assert runner.speeds.knows(student)  # measured as soon as it could be


def test_a_teacher_with_a_schedule_of_its_own_is_trained_first_and_not_kept(tmp_path):
    results = tmp_path / "results"
    cells = cells_of(tmp_path, methods=["gaussian", "catrs"], sigmas=[0.25], epochs=None)
    runner = runner_of(tmp_path, lambda cell: keep(cell, tmp_path / cell.name, results), jobs=3)
    assert not runner.run(cells).failed
    kept = {one.name: one.epochs for one in read_results(results / "mnist")}
    teacher, student = "gaussian_teacher_sigma0.25_seed0", "catrs_sigma0.25_seed0"
    assert kept == {"gaussian_sigma0.25_seed0": 90, student: 150}
    assert len((tmp_path / teacher / "certificates.tsv").read_text().splitlines()) == 2  # the header and an image
    assert json.loads((tmp_path / student / "config.json").read_text())["catrs"]["teacher"] == str(tmp_path / teacher)


def test_what_needs_a_cell_that_failed_fails_and_says_so(tmp_path):
    cells = cells_of(tmp_path, "cifar10", methods=["catrs"], sigmas=[0.25])
    other = cells_of(tmp_path, "cifar10", sigmas=[0.25], epochs=3)[0]
    fakes.write_trained(other.config(), tmp_path / cells[0].name)
    outcome = runner_of(tmp_path).run(cells)
    assert set(outcome.failed) == {cell.name for cell in cells}
    assert all("holds a run with another config (num_epochs: 3 -> 2" in reason for reason in outcome.failed.values())
    with pytest.raises(UserError, match="another config"):  # a finished run, but not the teacher that is wanted
        is_trained(cells[0], tmp_path / cells[0].name)
    assert "is not in this plan" in runner_of(tmp_path).run(cells[1:]).failed[cells[1].name]


def test_a_plan_that_is_killed_while_it_certifies_goes_on(tmp_path, fake_plans, capsys):
    folder = tmp_path / "runs"
    folder.mkdir()
    arguments = ["--methods=gaussian", "--sigmas=0.5", "--images=4"]
    name = "gaussian_sigma0.50_seed0"
    table = folder / name / "certificates.tsv"
    (folder / f"hang_{name}").touch()
    command = [sys.executable, "-m", "tests.plans", folder, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_when(process, lambda: count_lines(table) == 2)
    (folder / f"hang_{name}").unlink()
    first = table.read_bytes()
    # The certification ended with the plan: it holds nothing.
    reproduce.main([*arguments, f"--workdir={folder}", f"--results={tmp_path / 'results'}"])
    assert "epoch 90/90, image 1/4, about 0:00:0" in capsys.readouterr().out
    assert table.read_bytes().startswith(first) and count_lines(table) == 5
    run = json.loads((tmp_path / "results" / "mnist" / name / "run.json").read_text())
    assert [call["program"] for call in run["calls"]] == ["train", "certify", "certify"]


def test_a_damaged_record_fails_its_cell_and_no_other(tmp_path):
    bad, good = cells_of(tmp_path, methods=["gaussian", "stability"])
    for text, message in (
        ("{}\n", "line 1 is damaged"),
        ('{"epoch": 0, "step": 5, "noisy_images_per_second": 1.0}\n', "its last line is damaged"),
        ('{"epoch": 1}\n', "its last line is damaged"),
    ):
        folder = tmp_path / str(len(text))
        fakes.write_trained(bad.config(), folder / bad.name)
        (folder / bad.name / "metrics.jsonl").write_text(text)
        runner = runner_of(folder)
        assert runner.look(bad) == runner.glance(bad) == State()
        runner.measure([bad, good])
        assert estimate(runner, [bad, good]).unknown == 0
        assert message in runner.run([bad]).failed[bad.name]
    outcome = runner.run([bad, good])
    assert outcome.finished == [good] and set(outcome.failed) == {bad.name}


def test_certificates_with_other_settings_do_not_count(tmp_path):
    (cell,) = cells_of(tmp_path)
    workdir = tmp_path / cell.name
    assert runner_of(tmp_path).run([cell]).finished == [cell]
    assert inspect(cell, workdir).certified
    record = json.loads((workdir / "certificates.json").read_text())
    assert record["checkpoint_step"] == 10
    (workdir / "certificates.json").write_text(json.dumps({key: record[key] for key in record if key != "finished"}))
    state = inspect(cell, workdir)
    assert state.images == 4 and not state.certified  # killed after the last line; certify.py has to finish it
    (workdir / "certificates.json").write_text(json.dumps(record))
    lines = (workdir / "certificates.tsv").read_text()
    (workdir / "certificates.tsv").write_text(lines.replace("0.500000", "0.600000", 1))
    with pytest.raises(UserError, match="was changed after it was finished"):
        inspect(cell, workdir)
    (workdir / "certificates.tsv").write_text("".join(lines.splitlines(keepends=True)[:3]))  # certify.py goes on
    assert inspect(cell, workdir)[2:4] == (2, False)
    (workdir / "certificates.tsv").write_text(lines)
    others = {
        "split": "train",
        "split_size": 20_000,
        "alpha": 0.01,
        "n0": 10,
        "bound": "two_class",
        "dtype": "bfloat16",
        "checkpoint_step": 5,
        "n": 7,
    }
    for key, value in others.items():
        (workdir / "certificates.json").write_text(json.dumps({**record, key: value}))
        with pytest.raises(UserError, match=rf"was made with other settings \({key}: {value!r} -> "):
            inspect(cell, workdir)


def test_results_of_other_settings_are_refused_before_anything_runs(tmp_path, fake_plans, capsys):
    arguments = ["--methods=gaussian", "--sigmas=0.5", "--images=4", "--n=1000"]
    results = tmp_path / "results"
    command = [*arguments, f"--results={results}"]
    reproduce.main([*command, f"--workdir={tmp_path / 'a'}"])
    kept = results / "mnist" / "gaussian_sigma0.50_seed0"
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    capsys.readouterr()
    for other, named in (
        ("--epochs=1", "epochs: 90 -> 1"),
        ("--images=5", "images: 4 -> 5"),
        ("--n=30", "n: 1000 -> 30"),
        ("--config=optimizer.lr=0.1", "deviations: "),
    ):
        with pytest.raises(SystemExit):
            reproduce.main([*command, other, f"--workdir={tmp_path / 'b'}"])
        err = capsys.readouterr().err
        assert f"results={results} holds gaussian_sigma0.50_seed0 with other settings" in err
        assert named in err and "choose another --results" in err
    assert not (tmp_path / "b").exists()
    reproduce.main([*command, "--images=5", "--dry_run", f"--workdir={tmp_path / 'e'}"])
    assert "note: results=" in capsys.readouterr().err  # what would be refused, beside the plan
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    # The same settings, in whatever place, are the same cell.
    reproduce.main(
        [*command, f"--workdir={tmp_path / 'c'}", "--config=dataset.cache_dir=/nowhere", "--config=optimizer.lr=0.01"]
    )
    assert "/nowhere" not in "".join(path.read_text() for path in kept.glob("*.json"))
    assert json.loads((kept / "run.json").read_text())["deviations"] == ["4 of 10,000 images", "n 1,000"]
    # A version that counted them otherwise.
    run = json.loads((kept / "run.json").read_text())
    (kept / "run.json").write_text(json.dumps({**run, "deviations": ["4 of 60,000 images", "n 1,000"]}))
    reproduce.main([*command, f"--workdir={tmp_path / 'a'}"])
    assert json.loads((kept / "run.json").read_text())["deviations"] == ["4 of 10,000 images", "n 1,000"]
    stamps = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    reproduce.main([*command, f"--workdir={tmp_path / 'a'}"])  # the same once more: others may be reading it
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == stamps
    # Every 1,250th image is more than every 2,500th, and not the other way round.
    capsys.readouterr()
    reproduce.main([*command, "--images=8", f"--workdir={tmp_path / 'd'}"])
    assert "1 cells, 1 to do, 1 at a time" in capsys.readouterr().out  # not more than there are cells
    run = json.loads((kept / "run.json").read_text())
    assert run["images"] == 8 and run["deviations"] == ["8 of 10,000 images", "n 1,000"]
    for fewer_or_other in (["--images=4"], ["--images=16", "--n=30"]):
        with pytest.raises(SystemExit):
            reproduce.main([*command, *fewer_or_other, f"--workdir={tmp_path / 'b'}"])
    assert "(n: 1000 -> 30; deviations: ['n 1,000'] -> ['n 30'])" in capsys.readouterr().err
    assert json.loads((kept / "run.json").read_text()) == run


def test_the_whole_table_can_be_run_beside_the_results_that_are_here():
    cells = make_plan("mnist", Options(seeds=5), workdir=ROOT / "runs")
    assert any((ROOT / "results" / "mnist" / cell.name).exists() for cell in cells)
    check_keepable(cells, ROOT / "results")


def test_a_cell_that_cannot_go_on_is_told_before_anything_runs(tmp_path, capsys):
    (cell,), (other,) = cells_of(tmp_path), cells_of(tmp_path, epochs=3)
    fakes.write_trained(other.config(), tmp_path / cell.name)
    assert runner_of(tmp_path).look(cell) == State()
    assert f"{cell.name}: workdir=" in (err := capsys.readouterr().err) and "another config (num_epochs: 3 -> 2" in err

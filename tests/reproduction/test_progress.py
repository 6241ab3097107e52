"""The report of a plan on itself: speeds, time and the bar; with programs that only write files."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rs_consistency.reproduction import runner as runner_module
from rs_consistency.reproduction.speeds import Speeds
from rs_consistency.reproduction.state import State
from tests.helpers import ROOT, kill_when, processes_with
from tests.plans import MACHINE, AtOnce, cells_of, estimate, runner_of


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Programs that run at once, in this process, but where the test is about a process."""
    monkeypatch.setattr(runner_module, "_POLL_SECONDS", 0.02)
    if "in_processes" not in request.keywords:
        monkeypatch.setattr(runner_module, "subprocess", AtOnce)


def test_the_last_line_of_the_progress_tells_the_end(tmp_path, capfd):
    cells = cells_of(tmp_path, methods=["gaussian", "stability"])
    runner_of(tmp_path).run(cells)
    last = capfd.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("cells 2.00/2 |") and last.endswith("left about 0:00:00")


def test_finished_cells_are_no_unknown_time(tmp_path):
    cells = cells_of(tmp_path, methods=["gaussian", "stability"])
    there = runner_of(tmp_path, machine=MACHINE._replace(host="there"))
    assert there.run(cells[:1]).finished == cells[:1]
    runner = runner_of(tmp_path)
    runner.speeds.learn(cells[1], epoch_seconds=10.0, votes_per_second=440.0)
    assert not runner.speeds.knows(cells[0]) and estimate(runner, cells).text() == "about 0:00:30"


def test_runs_that_share_an_accelerator_get_a_share_of_the_measured_speed(tmp_path):
    (cell,) = cells_of(tmp_path)
    seconds = {}
    for platform in ("cpu", "gpu"):
        machine = MACHINE._replace(platform=platform)
        runner = runner_of(tmp_path / platform, jobs=3, machine=machine)
        runner.measure([cell])
        seconds[platform] = runner.speeds.seconds_left(cell, State())
    assert seconds["gpu"] == pytest.approx(3 * seconds["cpu"])


def test_a_damaged_list_of_calls_costs_the_speed_before_a_plan_starts(tmp_path, capsys):
    (cell,) = cells_of(tmp_path)
    assert runner_of(tmp_path).run([cell]).finished == [cell]
    for text in ('{"calls": [{}]}', '{"calls": null}', "{"):
        (tmp_path / f".{cell.name}.calls.json").write_text(text)
        assert runner_of(tmp_path).look(cell).certified
        assert "its speed is not known: " in capsys.readouterr().err


@pytest.mark.in_processes
def test_a_measurement_that_does_not_end_costs_the_estimate_alone(tmp_path, monkeypatch, capfd):
    cells = cells_of(tmp_path, methods=["gaussian", "stability"])
    runner = runner_of(tmp_path)
    runner.speeds.learn(cells[0], epoch_seconds=10.0, votes_per_second=440.0)
    (tmp_path / "hang_measure").touch()
    monkeypatch.setattr(runner_module, "_MEASURE_SECONDS", 1)
    runner.measure(cells)
    assert "its speed is not known: not measured in 1 seconds" in capfd.readouterr().err
    assert estimate(runner, cells).text() == "at least 0:00:30, without 1 cell whose speed is not known"
    assert estimate(runner, cells[1:]).text() == "time of 1 cell not known"


def test_speeds_are_those_of_this_machine_and_others_keep_theirs(tmp_path):
    (cell,) = cells_of(tmp_path)
    here, there = (Speeds(tmp_path / "speeds.json", where=where) for where in ("here", "there"))
    here.learn(cell, keep=True, epoch_seconds=1.0, votes_per_second=1.0)
    there.learn(cell, keep=True, epoch_seconds=2.0, votes_per_second=2.0)
    here.learn(cell, keep=True, epoch_seconds=3.0)
    for where, seconds in (("here", 3.0), ("there", 2.0)):
        kept = Speeds(tmp_path / "speeds.json", where=where)
        assert kept.seconds_left(cell, State(images=4)) == pytest.approx(2 * seconds)
    assert not Speeds(tmp_path / "speeds.json", where="elsewhere").knows(cell)
    (tmp_path / "speeds.json").write_text("{")
    assert not Speeds(tmp_path / "speeds.json", where="here").knows(cell)


def test_speeds_of_another_machine_or_number_of_jobs_are_not_learned(tmp_path):
    (cell,) = cells_of(tmp_path)
    there = runner_of(tmp_path, machine=MACHINE._replace(host="there"))
    assert there.run([cell]).finished == [cell] and there.speeds.knows(cell)
    for jobs in (1, 2):
        runner = runner_of(tmp_path, jobs=jobs)
        assert runner.look(cell).certified and not runner.speeds.knows(cell)
    assert there.look(cell).certified and Speeds(tmp_path / "speeds.json", where=there.where).knows(cell)
    shutil.rmtree(tmp_path / cell.name)
    assert runner_of(tmp_path).run([cell]).finished == [cell]
    assert runner_of(tmp_path).speeds.knows(cell) and not runner_of(tmp_path, jobs=2).speeds.knows(cell)


def test_runs_that_share_a_gpu_take_no_memory_in_advance(tmp_path, monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.delenv(name, raising=False)

    def environment(platform, jobs):
        machine = MACHINE._replace(platform=platform)
        return runner_of(tmp_path, jobs=jobs, machine=machine)._environment().get(name)

    assert [environment("gpu", 2), environment("gpu", 1), environment("cpu", 2)] == ["false", None, None]
    monkeypatch.setenv(name, "true")
    assert environment("gpu", 2) == "true"  # as the user wants it


def test_the_bar_shows_every_change(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runner_module, "_SECONDS_BETWEEN_LINES", 0)
    with runner_of(tmp_path)._bar(10) as bar:
        for number in (5.0, 5.01, 5.02, 5.03):
            bar.n = number
            bar.update(0)
            time.sleep(0.01)
    shown = capfd.readouterr().err
    assert all(f"{number:.2f}/10" in shown for number in (5.0, 5.01, 5.02, 5.03))


def test_compiled_code_and_speeds_are_kept_apart_by_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folder = Path(runner_of(tmp_path)._environment()["JAX_COMPILATION_CACHE_DIR"])
    assert folder.parent == tmp_path / ".compiled" and folder.name.startswith("xla-")


def test_a_measurement_ends_with_its_plan_however_that_ends(tmp_path):
    (tmp_path / "hang_measure").touch()
    command = [sys.executable, "-m", "tests.plans", tmp_path, "--methods=gaussian", "--sigmas=0.5", "--dry_run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def measuring():
        return processes_with(f"{tmp_path}/.measured")

    kill_when(process, measuring)
    deadline = time.monotonic() + 20
    while measuring() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not measuring()

"""reproduce.py: plans, and killed and failing plans on tiny settings, with the programs as they are."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from rs_consistency.certificates.selection import Shard
from rs_consistency.reproduction.machine import this_machine
from rs_consistency.reproduction.plan import (
    Options,
    chosen_here,
    cost,
    deviations,
    follows_epochs,
    make_plan,
    not_available,
    share_of,
)
from rs_consistency.reproduction.published import TABLES, TRADEOFF, Published, table_of
from rs_consistency.reproduction.runner import Runner
from rs_consistency.reproduction.speeds import Speeds
from rs_consistency.reproduction.state import State
from tests.helpers import ROOT, count_lines, kill_when, processes_with, start
from tests.plans import TOYS

TINY = [
    "--table=mnist",
    "--sigmas=0.5",
    "--dataset=mnist_subset",
    "--model=linear",
    "--epochs=3",
    "--images=4",
    "--n=30",
    "--jobs=2",
    "--config",
    "batch_size=2000",
    "--config",
    "num_devices=1",
    "--config",
    "dataset.augment=none",
]


@pytest.fixture
def toys(monkeypatch):
    """Plans in this process start the real programs, which know the linear model."""
    monkeypatch.setitem(Runner.__init__.__kwdefaults__, "modules", TOYS)


def plan(table="mnist", folder=ROOT, **options):
    return make_plan(table, Options(**options), workdir=folder)


def test_the_mnist_table_is_six_methods_at_three_sigmas_as_published():
    cells = plan()
    assert len(cells) == 18 and len({cell.name for cell in cells}) == 18
    assert not any(deviations(cell) for cell in cells)
    by_name = {cell.name: cell for cell in cells}
    config = by_name["smoothadv+consistency_sigma1.00_seed0"].config()
    assert (config.method, config.consistency.lbd, config.num_noise, config.num_epochs) == ("smoothadv", 1.0, 4, 90)
    assert by_name["macer_sigma1.00_seed0"].config().macer.lbd == 6.0
    table = table_of("mnist")
    assert table.cells["consistency", 0.5] == Published(1.6653, 0.0007, 5, 1.6548)
    assert table.cells["macer", 1.0] == Published(1.5950, 0.0051, 5, 1.5950) and TRADEOFF[25.0] == (1.2261, 0.732)
    assert {name: len(plan(name)) for name in TABLES} == {
        "mnist": 18,
        "tradeoff": 6,
        "fashion_mnist": 22,  # with the teacher
        "cifar10": 27,
        "imagenet": 7,
    }


def test_seeds_and_shorter_schedules_are_settings_of_a_cell():
    cells = plan(methods=["smoothadv"], sigmas=[0.25], seeds=2, epochs=9, images=500)
    assert [cell.config().seed for cell in cells] == [0, 1]
    config = cells[1].config()
    assert (config.num_epochs, config.optimizer.lr_step_size, config.smoothadv.warmup_epochs) == (9, 3, 1)
    assert cells[0].selection.indices().tolist() == list(range(0, 10_000, 20))
    notes = deviations(cells[1])
    assert "num_epochs 9" in notes and "500 of 10,000 images" in notes and not any("seed" in note for note in notes)
    weights = [cell.config().consistency.lbd for cell in plan("tradeoff")]
    assert weights == [1, 5, 15, 20, 25, 30]


def test_a_shorter_sun_drops_and_weighs_earlier():
    cell, baseline = plan("cifar10", methods=["sun", "gaussian"], sigmas=[0.5], epochs=15)
    assert (cell.config().sun.discard_epoch, cell.config().sun.weigh_every) == (7, 1)
    kept = [[text for text in deviations(each) if not follows_epochs(text)] for each in (cell, baseline)]
    assert kept[0] == kept[1] == ["num_epochs 15", "optimizer.lr_step_size 5"]


def test_catrs_waits_for_its_teacher(tmp_path):
    cells = plan("cifar10", tmp_path, methods=["catrs"], sigmas=[0.25])
    assert [cell.name for cell in cells] == ["gaussian_sigma0.25_seed0", "catrs_sigma0.25_seed0"]
    assert cells[1].needs == cells[0].name and cells[0].needs is None
    assert cells[1].config().catrs.teacher == str(tmp_path / cells[0].name)


def test_a_teacher_with_another_schedule_is_a_cell_of_its_own(tmp_path):
    teacher, student, own, *_ = cells = plan(methods=["catrs", "gaussian"], folder=tmp_path)
    names = ["gaussian_teacher_sigma0.25_seed0", "catrs_sigma0.25_seed0", "gaussian_sigma0.25_seed0"]
    assert [cell.name for cell in cells[:3]] == names and len(cells) == 7
    assert student.needs == names[0] and student.config().catrs.teacher == str(tmp_path / names[0])
    schedules = [(cell.config().num_epochs, cell.config().optimizer.lr_step_size) for cell in (teacher, student, own)]
    assert schedules == [(150, 50), (150, 50), (90, 30)]
    assert deviations(teacher)[:2] == ["num_epochs 150", "optimizer.lr_step_size 50"] and deviations(student) == []
    assert [cell.selection.size for cell in (teacher, student)] == [1, 10_000]  # no cell of the table
    # With as many epochs for every cell, the teacher is the table's own cell.
    cells = plan(methods=["catrs", "gaussian"], sigmas=[0.25], epochs=3)
    assert [cell.name for cell in cells] == [names[2], names[1]]
    assert {(cell.config().num_epochs, cell.config().optimizer.lr_step_size) for cell in cells} == {(3, 1)}


@pytest.mark.parametrize(("table", "count"), [("mnist", 2), ("mnist", 6), ("cifar10", 3)])
def test_shards_divide_a_plan_by_time(table, count):
    cells = plan(table, seeds=2, images=500)
    shares = [share_of(cells, Shard(index, count)) for index in range(1, count + 1)]
    assert sorted(cell.name for share in shares for cell in share) == sorted(cell.name for cell in cells)
    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) < 1.3 * min(loads)  # every count-th cell: 20 times, where the methods line up with the shares
    for share in shares:
        names = [cell.name for cell in share]
        assert names == [cell.name for cell in cells if cell.name in names]


def test_a_share_has_what_its_cells_need():
    cells = plan("cifar10", seeds=3, methods=["catrs", "gaussian"])
    for count in range(2, 7):
        for index in range(1, count + 1):
            share = share_of(cells, Shard(index, count))
            assert {cell.needs for cell in share} - {None} <= {cell.name for cell in share}


def test_deviations_are_what_differs_from_the_published_and_no_place():
    here = {"dataset.data_dir": "/home/me", "dataset.cache_dir": "/tmp/x", "num_devices": 1, "eval_batch_size": 50}
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], settings={**here, "batch_size": 256, "optimizer.lr": 0.01})
    assert deviations(cell) == [] and cell.config().dataset.data_dir == "/home/me"
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], settings={"init_from": "/home/me/run", "batch_size": 128}, n=50)
    assert deviations(cell) == ["init_from run", "batch_size 128", "n 50"]
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], settings={"init_from": "some/run"})
    assert cell.overrides["init_from"] == str(Path("some/run").resolve())  # as the run's config.json has it
    assert not any(deviations(cell) for cell in plan("tradeoff"))
    (cell,) = plan("imagenet", methods=["gaussian"], sigmas=[0.5])
    assert deviations(cell) == ["images picked in the order of tensorflow-datasets instead of the original one"]
    (cell,) = plan("imagenet", methods=["smoothadv"], sigmas=[0.5])
    assert deviations(cell)[0] == "500 of 50,000 images"  # of which 427 are published
    (cell,) = plan("imagenet", methods=["gaussian"], sigmas=[0.5], images=50_000)
    assert deviations(cell) == ["50,000 of 50,000 images"]  # of which 500 are published
    (cell,) = plan("cifar10", methods=["gaussian"], sigmas=[0.5], dataset="svhn")
    assert deviations(cell) == ["dataset.name svhn", "8,678 of 26,032 images"]
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], dataset="mnist_subset")
    assert deviations(cell) == ["dataset.name mnist_subset"]  # all of its images


def test_images_are_spread_evenly():
    for images in (1, 7, 500, 3334, 5000, 10_000):
        chosen = plan(methods=["gaussian"], sigmas=[0.5], images=images)[0].selection.indices()
        assert len(chosen) == images and chosen[0] == 0
        assert images == 1 or (len(set(chosen[1:] - chosen[:-1])) == 1 and 10_000 - chosen[-1] <= chosen[1])
    assert len(plan("cifar10", methods=["gaussian"], dataset="svhn")[0].selection.indices()) == 8678


def test_cells_without_published_settings_are_named():
    assert not_available("imagenet").endswith(
        "not run here: smoothadv at sigma 0.25; catrs at sigma 1; sun at sigma 0.25, 0.5, 1"
    )
    assert {not_available(name) for name in TABLES if name != "imagenet"} == {""}


def test_settings_that_were_not_published_are_named():
    assert chosen_here("mnist", ["gaussian", "catrs"]) == "not published, so chosen here: catrs.lbd at sigma 0.5, 1"
    assert chosen_here("mnist", ["gaussian", "smoothmix"]) == chosen_here("fashion_mnist", ["gaussian"]) == ""
    assert chosen_here("fashion_mnist", ["macer", "catrs"]).endswith("(those of MNIST) at sigma 0.25, 0.5, 1")


def test_time_left_follows_from_what_was_measured(tmp_path):
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], images=500)
    speeds = Speeds(tmp_path / "speeds.json")
    assert speeds.seconds_left(cell, State()) is None
    speeds.learn(cell, keep=True, epoch_seconds=10.0, votes_per_second=100_100.0)
    speeds = Speeds(tmp_path / "speeds.json")
    assert speeds.seconds_left(cell, State()) == pytest.approx(90 * 10 + 500)
    assert speeds.seconds_left(cell, State(epochs=30)) == pytest.approx(60 * 10 + 500)
    assert speeds.seconds_left(cell, State(epochs=90, trained=True, images=400)) == pytest.approx(100)


def test_a_killed_plan_goes_on_and_a_failing_cell_stops_no_other(program, toys, tmp_path, monkeypatch):
    folder, results = tmp_path / "runs", tmp_path / "results"
    arguments = [*TINY, "--methods=gaussian,stability", f"--workdir={folder}", f"--results={results}"]
    folder.mkdir()
    machine = this_machine()
    monkeypatch.setattr("rs_consistency.reproduction.machine.this_machine", lambda jobs: machine)  # asked once
    speeds = Speeds(folder / "speeds.json", where=machine.where(2))
    for cell in plan(methods=["gaussian", "stability"], sigmas=[0.5], dataset="mnist_subset", model="linear"):
        speeds.learn(cell, keep=True, epoch_seconds=2.0, votes_per_second=1e4)
    (folder / "stability_sigma0.50_seed0").write_text("in the way")

    process = start("reproduce.py", *arguments, toy=True)
    metrics = folder / "gaussian_sigma0.50_seed0" / "metrics.jsonl"
    kill_when(process, lambda: (metrics.parent / "checkpoints" / "5").is_dir())  # of the first epoch
    assert 1 <= count_lines(metrics) < 3

    program("cli.reproduce", *arguments)
    assert program.status == 1
    assert not processes_with(str(folder))
    failures = [line for line in program.err.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1 and failures[0].startswith("failed: stability_sigma0.50_seed0: ")
    assert "1 of 2 cells failed" in program.err
    assert "continuing after step" in (folder / "gaussian_sigma0.50_seed0.log").read_text()
    assert count_lines(metrics) == 3
    kept = results / "mnist" / "gaussian_sigma0.50_seed0"
    assert sorted(path.name for path in kept.iterdir()) == [
        "certificates.json",
        "certificates.tsv.gz",
        "config.json",
        "metrics.jsonl",
        "run.json",
    ]
    assert str(tmp_path) not in "".join(path.read_text() for path in kept.glob("*.json*"))
    run = json.loads((kept / "run.json").read_text())
    assert run["epochs"] == 3 and run["images"] == 4 and "4 of 1,000 images" in run["deviations"]
    assert [call["program"] for call in run["calls"]] == ["train", "train", "certify"]
    assert {call["device"] for call in run["calls"]} == {"1 x cpu (cpu)", machine.device()}  # num_devices is 1
    assert re.search(r"^gaussian +0\.50 ", program.out, re.MULTILINE) and "written: " in program.out
    packed = (kept / "certificates.tsv.gz").read_bytes()
    assert gzip.decompress(packed) == (folder / kept.name / "certificates.tsv").read_bytes()

    # The same command after the obstacle is gone does what is left, and then nothing.
    (folder / "stability_sigma0.50_seed0").unlink()
    assert "2 cells, 1 to do, 2 at a time" in program.succeeds("cli.reproduce", *arguments, "--dry_run").out
    shutil.copytree(folder / "gaussian_sigma0.50_seed0", folder / "stability_sigma0.50_seed0")
    program("cli.reproduce", *arguments)  # another method's run in its place
    assert program.status == 1 and "holds a run with another config" in program.err
    assert (kept / "certificates.tsv.gz").read_bytes() == packed


@pytest.mark.slow  # with programs that only write files: test_runner.py
def test_a_damaged_last_checkpoint_is_trained_again_from_the_one_before(program, toys, tmp_path):
    folder, kept = tmp_path / "runs", tmp_path / "results" / "mnist" / "gaussian_sigma0.50_seed0"
    arguments = [*TINY, "--methods=gaussian", f"--workdir={folder}", f"--results={tmp_path / 'results'}"]

    def run():
        program.succeeds("cli.reproduce", *arguments)
        lines = gzip.decompress((kept / "certificates.tsv.gz").read_bytes()).decode().splitlines()
        made = json.loads((kept / "run.json").read_text())
        return [line.split("\t")[:5] for line in lines], [call["program"] for call in made["calls"]]  # without the time

    before, _ = run()
    workdir = folder / kept.name
    for name in ("certificates.tsv", "certificates.json"):
        (workdir / name).unlink()
    largest = max((workdir / "checkpoints" / "15").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert run() == (before, ["train", "train", "certify"])
    assert "its last checkpoint is damaged; training it again from the one before" in program.err
    assert (folder / f"{kept.name}.log").read_text().count("continuing after step 10") == 1


def test_speed_is_measured_before_a_plan_starts(program, toys, tmp_path):
    arguments = [*TINY, "--methods=gaussian", f"--workdir={tmp_path}", "--dry_run"]
    out = program.succeeds("cli.reproduce", *arguments).out
    assert "gaussian_sigma0.50_seed0  epoch 0/3, image 0/4, about 0:00" in out and "not as published: " in out
    assert not (tmp_path / "gaussian_sigma0.50_seed0").exists()
    (measured,) = json.loads((tmp_path / "speeds.json").read_text()).values()
    assert measured["epoch_seconds"] > 0 and measured["votes_per_second"] > 0
    assert "published without a cell" not in out and "chosen here" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=svhn", "--workdir=x"], "table='svhn' is unknown; use one of mnist, tradeoff, fashion_mnist"),
        ([], "workdir is missing: add --workdir=FOLDER"),
        (["--methods=magic", "--workdir=x"], "methods='magic' is unknown; use one of catrs, consistency"),
        (["--methods=", "--workdir=x"], "methods is empty; name some, or leave it out for all"),
        (["--sigmas=,", "--workdir=x"], "sigmas is empty; name some, or leave it out for all"),
        (["--render", "--jobs=2"], "--render and --jobs exclude each other"),
        (["--render", "--workdir=x"], "--render and --workdir exclude each other"),
        (["--render", "--config", "model=lenet"], "--render and --config exclude each other"),
        (
            ["--results=/dev/null/x", "--workdir=x"],
            "/dev/null takes no files (Not a directory); choose",
        ),
        (["--sigmas=0.3", "--workdir=x"], "sigmas=0.3: table=mnist has 0.25, 0.5, 1.0"),
        (["--seeds=0", "--workdir=x"], "seeds=0: use a whole number of at least 1"),
        (["--images=20000", "--workdir=x"], "images=20000: use a whole number of at least 1 and at most 10000"),
        (
            ["--table=tradeoff", "--methods=macer", "--workdir=x"],
            "methods=macer: table=tradeoff compares values of lbd",
        ),
        (["--dataset=cifar10", "--workdir=x"], "dataset=cifar10 has other images or classes than mnist"),
        (["--table=imagenet", "--methods=macer", "--workdir=x"], "methods='macer' is unknown; use one of consistency"),
        (
            ["--table=imagenet", "--methods=smoothadv", "--sigmas=0.25", "--workdir=x"],
            "methods=smoothadv: no settings are published for sigma 0.25; choose others",
        ),
        (["--config", "sigma=1", "--workdir=x"], "config=sigma=1: this key has an option of its own"),
        (["--config", "lr", "--workdir=x"], "config=lr: write KEY=VALUE, such as optimizer.lr=0.02"),
        (["--config", "optimizer.rate=1", "--workdir=x"], "config=optimizer.rate=1: there is no such key"),
        (["--config", "optimizer=1", "--workdir=x"], "config=optimizer=1: there is no such key"),
        (["--config", "batch_size=x", "--workdir=x"], "config=batch_size=x: use a whole number, such as 256"),
        (["--config", "batch_size=-1", "--workdir=x"], "batch_size=-1: use a whole number of at least 1"),
        (["--config", "macer.deferred=2", "--workdir=x"], "config=macer.deferred=2: use True or False, such as True"),
        (["--config", "catrs.teacher=x", "--workdir=x"], "config=catrs.teacher=x: the plan trains the teacher itself"),
        (
            ["--table=tradeoff", "--config", "consistency.lbd=3", "--workdir=x"],
            "config=consistency.lbd=3: table=tradeoff compares values of it; leave it out",
        ),
        (["--images=6000", "--workdir=x"], "images=6000: they are every 2nd, 3rd, ... of 10,000; use 5000 or 10000"),
        (["--images=300", "--workdir=x"], "images=300: they are every 2nd, 3rd, ... of 10,000; use 295 or 304"),
        (["--shard=9/2", "--workdir=x"], "shard='9/2': use I/K"),
        (["--render", "--results=nowhere"], "holds no finished cell; run reproduce.py without --render first"),
    ],
)
def test_bad_input_is_named(program, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in program.fails("cli.reproduce", *arguments)
    assert not list(tmp_path.iterdir())

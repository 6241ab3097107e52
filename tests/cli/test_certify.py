"""Runs of certify.py: files, kill and continue, other settings, damaged input."""

import fcntl
import json
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import rs_consistency
from rs_consistency import data
from rs_consistency.certificates import write
from rs_consistency.certificates.columns import CERTIFY, format_radius, format_time
from rs_consistency.common.errors import EXIT_INTERRUPTED, EXIT_NOT_FINISHED
from rs_consistency.models import create_model
from rs_consistency.training.checkpoints import digest
from tests.helpers import count_lines, damage_checkpoint, final_params, kill_when, rows, start

QUICK = ["--n0=20", "--n=100", "--batch_size=128"]


@pytest.fixture(scope="module")
def trained(toy_trained):
    """The run of the linear model: none of these tests is about a network."""
    return toy_trained


@pytest.fixture(scope="module")
def certified(trained, tmp_path_factory):
    """An uninterrupted run over every second of the 60 test images."""
    from rs_consistency.cli import certify

    output = tmp_path_factory.mktemp("certified") / "c.tsv"
    certify.main([f"--workdir={trained}", *QUICK, "--skip=2", f"--output={output}"])
    return output


def test_the_file_says_what_the_library_says(trained, certified):
    split = data.load("mnist", "test")
    params = final_params(trained)
    model = create_model("linear", num_classes=10)
    indices = np.arange(0, 60, 2)
    expected = rs_consistency.certify(
        lambda images: model.apply({"params": params}, images),
        split.images[indices] / np.float32(255),
        sigma=0.5,
        num_classes=10,
        n0=20,
        n=100,
        indices=indices,
    )
    header, *lines = (line.split("\t") for line in certified.read_text().splitlines())
    assert header[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert header[6:] == ["count0", "count", "count_runner_up", "selected", "count_label", "votes"]
    assert len(lines) == 30
    for i, line in enumerate(lines):
        cells = dict(zip(header, line, strict=True))
        selected = int(cells["selected"])
        assert int(cells["idx"]) == indices[i]
        assert int(cells["label"]) == split.labels[indices[i]]
        assert int(cells["predict"]) == expected.prediction[i]
        assert 0 <= expected.radius[i] - float(cells["radius"]) < 1e-6  # rounded down
        assert int(cells["correct"]) == (expected.prediction[i] == split.labels[indices[i]])
        assert selected == expected.counts0[i].argmax()
        assert int(cells["count0"]) == expected.counts0[i, selected]
        assert int(cells["count"]) == expected.counts[i, selected]
        assert int(cells["count_runner_up"]) == np.delete(expected.counts[i], selected).max()
        assert int(cells["count_label"]) == expected.counts[i, split.labels[indices[i]]]
        assert cells["votes"] == "100"
    wrong = [cells[6:][3] != cells[1] and cells[6:][4] != "0" for cells in lines]
    assert any(wrong)  # the votes for a label that was not selected are not lost


def test_the_record_binds_settings_model_and_data(trained, certified):
    record = json.loads(certified.with_suffix(".json").read_text())
    expected = {
        "sigma": 0.5,
        "n0": 20,
        "n": 100,
        "alpha": 0.001,
        "seed": 0,
        "skip": 2,
        "dataset": "mnist",
        "split": "test",
        "model": "linear",
        "checkpoint_step": 14,
        "parameter_digest": digest({"params": final_params(trained)}),
        "data_digest": data.load("mnist", "test").digest(),
        "device": "8 x cpu (cpu)",
    }
    assert {key: record[key] for key in expected} == expected
    assert record["versions"]["jax"] == jax.__version__
    assert record["config"]["num_noise"] == 2


def test_defaults_are_the_published_ones(program, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    out = program.succeeds("cli.certify", f"--workdir={tmp_path / 'run'}", "--max=1", "--n=50", "--batch_size=64").out
    record = json.loads((tmp_path / "run" / "certificates.json").read_text())
    assert (record["n0"], record["alpha"], record["sigma"], record["skip"], record["split"]) == (
        100,
        0.001,
        0.5,
        1,
        "test",
    )
    assert "1 images, ACR" in out
    assert "default: 100000" in program.succeeds("cli.certify", "--help").out


def test_max_counts_certified_images_and_can_be_raised(program, trained, certified, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--skip=2", f"--output={tmp_path / 'c.tsv'}"]
    program.succeeds(*command, "--max=5")
    assert [row[0] for row in rows(tmp_path / "c.tsv")[1:]] == ["0", "2", "4", "6", "8"]
    program.succeeds(*command, "--max=12")
    assert "holds 5 images already" in program.err
    assert rows(tmp_path / "c.tsv") == rows(certified)[:13]
    program.succeeds(*command, "--max=3")  # nothing to do, nothing lost
    assert rows(tmp_path / "c.tsv") == rows(certified)[:13]


def test_other_splits_sigmas_and_devices(program, trained, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--max=3", "--split=train", "--sigma=0.25"]
    program.succeeds(*command, f"--output={tmp_path / 'eight.tsv'}", "--num_devices=8")
    program.succeeds(*command, f"--output={tmp_path / 'one.tsv'}", "--num_devices=1", "--batch_size=50")
    assert rows(tmp_path / "eight.tsv") == rows(tmp_path / "one.tsv")
    assert json.loads((tmp_path / "one.json").read_text())["sigma"] == 0.25


def test_a_killed_certification_continues_to_the_same_file(program, trained, certified, tmp_path):
    command = [f"--workdir={trained}", *QUICK, "--skip=2", f"--output={tmp_path / 'killed.tsv'}"]
    killed = tmp_path / "killed.tsv"
    process = start("certify.py", *command, toy=True)
    kill_when(process, lambda: count_lines(killed) >= 4)
    finished = killed.read_bytes()
    assert finished.count(b"\n") < 31
    killed.write_bytes(finished + b"17\t3\t3\t0.7")  # a line cut off by the kill
    program.succeeds("cli.certify", *command)
    assert killed.read_bytes().startswith(finished)
    assert rows(killed) == rows(certified)
    assert "continued_with" not in json.loads(killed.with_suffix(".json").read_text())


def test_going_on_with_another_device_is_recorded(program, trained, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, f"--output={tmp_path / 'c.tsv'}"]
    program.succeeds(*command, "--max=2")
    for _ in range(2):
        program.succeeds(*command, "--max=4", "--num_devices=1")
    (other,) = json.loads((tmp_path / "c.json").read_text())["continued_with"]
    assert other["device"] == "1 x cpu (cpu)"


@pytest.mark.parametrize("content", ["", CERTIFY.header[:5], CERTIFY.header, CERTIFY.header + "0\t7"])
def test_a_file_killed_before_its_first_line_is_started_again(program, trained, certified, tmp_path, content):
    (tmp_path / "c.json").write_text(
        '{"n": 17, "parameter_digest": ""}'
    )  # made with other settings, which do not matter yet
    (tmp_path / "c.tsv").write_text(content)
    command = [f"--workdir={trained}", *QUICK, "--skip=2", "--max=3", f"--output={tmp_path / 'c.tsv'}"]
    program.succeeds("cli.certify", *command)
    assert rows(tmp_path / "c.tsv") == rows(certified)[:4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=400"], "n: 100 -> 400"),
        (["--alpha=0.01"], "alpha: 0.001 -> 0.01"),
        (["--seed=1"], "seed: 0 -> 1"),
        (["--skip=3", "--sigma=1"], "sigma: 0.5 -> 1.0; skip: 2 -> 3"),
        (["--split=train"], "split: 'test' -> 'train'"),
    ],
)
def test_a_file_made_with_other_settings_is_refused(program, trained, certified, arguments, message):
    before = certified.read_bytes()
    command = [f"--workdir={trained}", *QUICK, "--skip=2", f"--output={certified}", *arguments]
    error = program.fails("cli.certify", *command)
    assert "was made with other settings" in error and message in error
    assert certified.read_bytes() == before


def test_foreign_and_damaged_files_are_refused(program, trained, certified, tmp_path):
    output = tmp_path / "c.tsv"
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--skip=2", f"--output={output}"]
    shutil.copy(certified, output)
    assert "has no c.json that says how it was made" in program.fails(*command)
    shutil.copy(certified.with_suffix(".json"), tmp_path / "c.json")
    lines = certified.read_text().splitlines(keepends=True)
    with_nan = "\t".join("nan" if i == 3 else cell for i, cell in enumerate(lines[1].split("\t")))
    for damaged, message in {
        "".join([lines[0], *lines[2:]]): "line 2, is not what this program wrote",
        "".join([*lines[:4], "8\t1\tx\n", *lines[5:]]): "line 5, is not what this program wrote",
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n": "not those of this program",
        "some notes": "is not a certificate file",
        "".join([lines[0], with_nan]): "line 2, is not what this program wrote",
    }.items():
        output.write_text(damaged)
        assert message in program.fails(*command)
        assert output.read_text() == damaged
    (tmp_path / "c.json").write_text('{"sigma"')
    shutil.copy(certified, output)
    assert "c.json is damaged" in program.fails(*command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma=0"], "sigma=0.0: use a number greater than 0"),
        (["--sigma=nan"], "sigma=nan: use a number greater than 0"),
        (["--alpha=0"], "alpha=0.0: use a number in (0, 1)"),
        (["--alpha=1"], "alpha=1.0: use a number in (0, 1)"),
        (["--n=0"], "n=0: use a whole number of at least 1"),
        (["--n0=-5"], "n0=-5: use a whole number of at least 1"),
        (["--skip=0"], "skip=0: use a whole number of at least 1"),
        (["--max=0"], "max=0: use a whole number of at least 1"),
        (["--batch_size=0"], "batch_size=0: use a whole number of at least 1"),
        (["--num_devices=99"], "num_devices=99: this machine has 8 cpu device(s)"),
        (["--split=valid"], "split='valid' is unknown; use one of train, test"),
        (["--workdir=/nowhere"], "workdir=/nowhere does not exist"),
        (["--output=/nowhere/c.tsv"], "output=/nowhere/c.tsv: its folder does not exist"),
        (["--output=/proc/c.tsv"], "/proc/c.tsv"),
        (["--output=/tmp"], "output=/tmp: the name must end in .tsv"),
        (["--n=1e5.5"], "argument --n: invalid whole number value: '1e5.5'"),
        (["--sigma=much"], "argument --sigma: invalid float value: 'much'"),
        (["--alpha=1e-150"], "alpha=1e-150: use a number of at least 1e-100"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--output=c.json"], "output=c.json: the name must end in .tsv"),
        (["--output=c"], "output=c: the name must end in .tsv"),
    ],
)
def test_bad_settings_of_certify(program, trained, arguments, message):
    assert message in program.fails("cli.certify", f"--workdir={trained}", *QUICK, *arguments)
    assert not (trained / "certificates.tsv").exists()


def test_a_file_of_something_else_is_not_overwritten(program, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    command = ["cli.certify", f"--workdir={workdir}", *QUICK, "--max=1"]
    error = program.fails(*command, f"--output={workdir / 'config.tsv'}")
    assert "config.json is there already and is no record of a certification" in error
    program.succeeds(*command, "--n0=2e1")  # and the run is as good as before


def test_two_programs_cannot_write_one_file(program, trained, certified):
    with certified.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error = program.fails("cli.certify", f"--workdir={trained}", *QUICK, "--skip=2", f"--output={certified}")
    assert f"output={certified} is in use by another process" in error


def test_an_interrupted_certification_says_that_it_continues(trained, tmp_path):
    output = tmp_path / "c.tsv"
    command = [f"--workdir={trained}", "--n0=20", "--n=1000", "--batch_size=128", f"--output={output}"]
    process = start("certify.py", *command, toy=True)
    deadline = time.monotonic() + 120
    while count_lines(output) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert err.splitlines()[-1] == "error: interrupted; the same command continues"
    assert output.read_bytes().endswith(b"\n")


def test_an_unfinished_run_is_told(program, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "checkpoints" / "14")
    program("cli.certify", f"--workdir={workdir}", *QUICK, "--max=1", "--finished")
    assert program.status == EXIT_NOT_FINISHED and not list(workdir.glob("certificates*"))
    assert f"error: workdir={workdir}: the newest checkpoint that can be read is of step 7 of 14" in program.err
    program.succeeds(
        "cli.certify", f"--workdir={trained}", *QUICK, "--max=1", "--finished", f"--output={tmp_path}/c.tsv"
    )
    program.succeeds("cli.certify", f"--workdir={workdir}", *QUICK, "--max=1")
    assert "note: the training is not finished: step 7 of 14" in program.err


def test_a_device_without_memory_is_one_line(program, trained, tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.\nat length")

    monkeypatch.setattr("rs_consistency.certificates.question.count_votes", full)
    error = program.fails("cli.certify", f"--workdir={trained}", f"--output={tmp_path / 'c.tsv'}")
    assert "the device's memory is full; use a smaller batch (--batch_size" in error


def test_a_workdir_without_a_checkpoint(program, trained, tmp_path):
    assert "has no config.json" in program.fails("cli.certify", f"--workdir={tmp_path}")
    shutil.copy(trained / "config.json", tmp_path)
    assert "has no checkpoint yet; train it first" in program.fails("cli.certify", f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert "lacks a key" in program.fails("cli.certify", f"--workdir={tmp_path}")


def test_damaged_newest_checkpoints_are_stepped_over_and_left_alone(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    damages = {17: "empty", 16: "truncated", 15: "flipped", 14: "no manifest"}
    for step, damage in damages.items():
        shutil.copytree(trained / "checkpoints" / "14", workdir / "checkpoints" / str(step), dirs_exist_ok=True)
        damage_checkpoint(workdir / "checkpoints" / str(step), damage)
    # In a process of its own: libraries must not print tracebacks at its end either.
    process = start("certify.py", f"--workdir={workdir}", *QUICK, "--max=1", toy=True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    notes = [line for line in err.splitlines() if line and "certifying" not in line]
    assert len(notes) == 5, err
    for step, line in zip(damages, notes, strict=False):
        assert line.startswith(f"note: checkpoint {workdir / 'checkpoints' / str(step)} is unreadable: ")
        assert (workdir / "checkpoints" / str(step)).is_dir()
    assert notes[4].startswith("note: the training is not finished: step 7 of 14")
    assert json.loads((workdir / "certificates.json").read_text())["checkpoint_step"] == 7


def test_a_full_disk_loses_no_whole_line(program, trained, certified, tmp_path, monkeypatch):
    output = tmp_path / "c.tsv"
    command = [f"--workdir={trained}", *QUICK, "--skip=2"]
    # A limit on the size of files stands in for the disk: room for two or three more lines.
    program.succeeds("cli.certify", *command, f"--output={output}", "--max=10")
    limit = output.stat().st_size + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_json = write.write_json

    def write_record(*args):  # which is larger than the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        write_json(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    monkeypatch.setattr(write, "write_json", write_record)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        error = program.fails("cli.certify", *command, f"--output={output}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert f"{output}: File too large; free space and run the same command again" in error
    assert output.read_bytes().endswith(b"\n") and len(rows(output)) >= 11
    program.succeeds("cli.certify", *command, f"--output={output}")
    assert rows(output) == rows(certified)


def test_printed_radii_are_rounded_down_and_times_are_those_of_the_field():
    assert format_radius(0.0) == "0.000000"
    assert format_radius(1.9057286) == "1.905728"
    assert format_radius(np.nextafter(2, 0)) == "1.999999"
    assert format_time(0.87925) == "0:00:00.879250"
    assert format_time(3725.5) == "1:02:05.500000"
    assert format_time(90_000) == "25:00:00.000000"

"""Runs of train.py: files, kill and resume, damaged checkpoints, divergence."""

import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rs_consistency.common.errors import EXIT_INTERRUPTED
from rs_consistency.training import metrics
from rs_consistency.training.checkpoints import digest
from tests.helpers import TOY, count_lines, damage_checkpoint, final_params, kill_when, start, write_tfds


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_params(one, other):
    for a, b in zip(jax.tree.leaves(final_params(one)), jax.tree.leaves(final_params(other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_leaves_config_metrics_tensorboard_and_checkpoints(toy_trained):
    config = json.loads((toy_trained / "config.json").read_text())
    assert config["sigma"] == 0.5 and config["optimizer"]["lr"] == 0.01
    assert [record["epoch"] for record in records(toy_trained)] == [1, 2]
    last = records(toy_trained)[-1]
    assert set(last) == {
        "epoch",
        "step",
        "loss",
        "cross_entropy",
        "consistency",
        "lr",
        "noisy_images_per_second",
        "noisy_test_accuracy",
    }
    assert last["step"] == 14 and last["lr"] == pytest.approx(0.01) and last["noisy_images_per_second"] > 0
    assert last["noisy_test_accuracy"] * 60 == pytest.approx(round(last["noisy_test_accuracy"] * 60))
    assert sorted(path.name for path in (toy_trained / "checkpoints").iterdir()) == ["14", "7"]
    events = EventAccumulator(str(toy_trained / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [7, 14]


def test_rerunning_a_finished_run_says_so_and_changes_nothing(program, toy_trained, tmp_path):
    shutil.copytree(toy_trained, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "all 2 epochs are done" in program.succeeds("cli.train", *TOY, f"--workdir={tmp_path / 'run'}").out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_killed_run_resumes_to_the_same_parameters(program, tmp_path):
    config = [*TOY, "--config.num_epochs=12", "--config.checkpoint_keep=2", "--config.num_devices=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program.succeeds("cli.train", *config, f"--workdir={whole}")

    process = start("train.py", *config, f"--workdir={killed}", toy=True)
    kill_when(process, lambda: count_lines(killed / "metrics.jsonl") >= 4)
    finished = count_lines(killed / "metrics.jsonl")
    assert 4 <= finished < 12
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 99, "st')  # a line cut off by the kill

    program.succeeds("cli.train", *config, f"--workdir={killed}")
    assert "continuing after step" in program.err
    assert_same_params(whole, killed)
    assert [record["epoch"] for record in records(killed)] == list(range(1, 13))
    for one, other in zip(records(whole), records(killed), strict=True):
        one.pop("noisy_images_per_second"), other.pop("noisy_images_per_second")
        assert one == other
    events = EventAccumulator(str(killed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(7, 13 * 7, 7))
    # The newest two are kept, whatever happened between.
    assert sorted(int(path.name) for path in (killed / "checkpoints").iterdir()) == [11 * 7, 12 * 7]


def test_a_run_with_several_steps_in_a_call_is_the_same_run(program, toy_trained, tmp_path, monkeypatch):
    monkeypatch.setattr("rs_consistency.training.step.steps_per_call", lambda _: 4)
    run = tmp_path / "run"
    program.succeeds("cli.train", *TOY, "--config.checkpoint_every_steps=3", f"--workdir={run}")
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [9, 12, 14]  # keeps three
    for one, other in zip(jax.tree.leaves(final_params(run)), jax.tree.leaves(final_params(toy_trained)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # 14 steps, compiled in another way
    for one, other in zip(records(run), records(toy_trained), strict=True):
        assert one["step"] == other["step"] and one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_run_on_one_device_continues_on_eight(program, tmp_path, toy_trained):
    one_then_eight = tmp_path / "run"
    program.succeeds("cli.train", *TOY, "--config.num_devices=1", f"--workdir={one_then_eight}")
    shutil.rmtree(one_then_eight / "checkpoints" / "14")
    program.succeeds("cli.train", *TOY, f"--workdir={one_then_eight}")
    assert "continuing after step 7" in program.err
    for a, b in zip(*map(jax.tree.leaves, (final_params(one_then_eight), final_params(toy_trained))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # sums in another order


def test_a_second_program_is_refused_and_an_interrupted_run_ends_at_once(program, tmp_path):
    # Interrupted while steps are under way: XLA's threads must not outlive the interpreter.
    command = [*TOY, "--config.num_epochs=100000", "--config.checkpoint_every_epochs=1000", f"--workdir={tmp_path}"]
    process = start("train.py", *command, toy=True)
    try:
        deadline = time.monotonic() + 120
        while count_lines(tmp_path / "metrics.jsonl") < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert f"workdir={tmp_path} is in use by another process" in program.fails("cli.train", *command)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_INTERRUPTED, err
    assert err.splitlines()[-1] == "error: interrupted; the same command continues"


def test_another_config_in_a_workdir_is_refused(program, toy_trained):
    error = program.fails(
        "cli.train", *TOY, "--config.sigma=0.25", "--config.optimizer.lr=0.1", f"--workdir={toy_trained}"
    )
    assert "holds a run with another config (optimizer.lr: 0.01 -> 0.1; sigma: 0.5 -> 0.25)" in error


def test_another_dataset_under_the_same_name_is_refused(program, toy_trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(toy_trained, workdir)
    images, labels = np.zeros((300, 28, 28, 1), np.uint8), np.zeros(300, int)
    write_tfds(tmp_path / "other", "mnist", "3.0.1", {"train": (images, labels), "test": (images, labels)})
    error = program.fails("cli.train", *TOY, f"--config.dataset.data_dir={tmp_path / 'other'}", f"--workdir={workdir}")
    assert "holds a run on other data: the training split of mnist is not what it was" in error


def test_data_that_moved_is_found_again(program, toy_trained, tfds_dir, tmp_path):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(toy_trained, workdir)
    shutil.copytree(tfds_dir, moved)
    program.succeeds("cli.train", *TOY, f"--config.dataset.data_dir={moved}", f"--workdir={workdir}")
    assert json.loads((workdir / "config.json").read_text())["dataset"]["data_dir"] == str(moved)
    shutil.rmtree(moved)
    command = ["cli.certify", f"--workdir={workdir}", "--n=10", "--max=1"]
    assert "is not prepared in" in program.fails(*command)
    program.succeeds(*command, f"--data_dir={tfds_dir}")


def test_a_damaged_record_is_named(program, toy_trained, tmp_path):
    shutil.copytree(toy_trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "14")
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    good = metrics_file.read_bytes()
    for line in (b"{", b"[1]", b"\xff\xfe", b'{"epoch": "one"}'):
        metrics_file.write_bytes(line + b"\n" + good)
        assert "metrics.jsonl, line 1 is damaged" in program.fails("cli.train", *TOY, f"--workdir={tmp_path / 'run'}")


def test_a_damaged_config_and_foreign_checkpoints_are_refused(program, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in program.fails("cli.train", *TOY, f"--workdir={tmp_path}")
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    assert "has checkpoints but no config.json" in program.fails("cli.train", *TOY, f"--workdir={tmp_path}")


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_stepped_over_and_made_again(program, toy_trained, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(toy_trained, workdir)
    damage_checkpoint(workdir / "checkpoints" / "14", damage)
    program.succeeds("cli.train", *TOY, f"--workdir={workdir}")
    damaged, continuing = program.err.splitlines()  # and nothing else
    assert damaged.startswith(f"note: checkpoint {workdir / 'checkpoints' / '14'} is unreadable: ")
    assert continuing == "note: continuing after step 7"
    assert_same_params(workdir, toy_trained)
    assert (workdir / "damaged_checkpoints" / "14").is_dir()
    assert [record["epoch"] for record in records(workdir)] == [1, 2]


def test_only_unreadable_checkpoints_are_an_error(program, toy_trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(toy_trained, workdir)
    for step in ("7", "14"):
        damage_checkpoint(workdir / "checkpoints" / step, "truncated")
    for name, arguments in {"train": TOY, "certify": ["--n=10"]}.items():
        error = program.fails(f"cli.{name}", *arguments, f"--workdir={workdir}")
        assert f"every checkpoint in {workdir / 'checkpoints'} is unreadable (steps 14, 7)" in error


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(program, tmp_path, monkeypatch):
    # The learning rate becomes absurd in the second epoch.
    monkeypatch.setattr(
        "rs_consistency.training.step.make_schedule",
        lambda config, steps: optax.piecewise_constant_schedule(1e-2, {steps: 1e32}),
    )
    error = program.fails("cli.train", *TOY, f"--workdir={tmp_path}")
    assert "training diverged at step " in error
    assert int(error.split("at step ")[1].split()[0]) in range(7, 14)
    assert "optimizer.lr=0.01 is too large or consistency.lbd=5.0 is too large" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_params(tmp_path)))


def test_a_full_disk_is_one_line_and_the_run_can_go_on(program, toy_trained, tmp_path):
    # A limit on the size of files stands in for the disk: no checkpoint fits in 16 KiB.
    process = start("train.py", *TOY, f"--workdir={tmp_path}", toy=True, limit_kib=16)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        f"error: a checkpoint could not be written to {tmp_path}/checkpoints: File too large; free space or"
    ), err
    program.succeeds("cli.train", *TOY, f"--workdir={tmp_path}")
    assert_same_params(tmp_path, toy_trained)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["14", "7"]


def test_records_that_cannot_be_written_are_one_line(program, tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(metrics.MetricsWriter, "write", full)
    assert "metrics.jsonl: No space left on device" in program.fails("cli.train", *TOY, f"--workdir={tmp_path}")


def test_the_digest_depends_on_every_parameter(toy_trained):
    params = final_params(toy_trained)
    first = digest(params)
    assert first == digest(jax.tree.map(np.copy, params)) and len(first) == 64
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"] + np.float32(1e-3)
    assert digest(params) != first


def test_train_from_another_folder(tmp_path):
    process = start("train.py", *TOY, "--config.num_epochs=1", "--workdir=run", toy=True, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[0] == (
        "mnist, linear, sigma 0.5: gaussian + consistency (lbd 5, eta 0.5, default), M 2;"
        " 1 epochs of 7 steps of 32 examples"
    )
    assert out.splitlines()[1] == "devices: 8 x cpu (cpu)" and out.splitlines()[2].startswith("epoch 1/1 ")
    assert (tmp_path / "run" / "checkpoints" / "7").is_dir()


def test_a_profile_leaves_a_trace_and_the_run_alone(program, toy_trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(toy_trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = program.succeeds("cli.train", *TOY, "--config.num_devices=1", f"--workdir={run}", "--profile=2").out
    steps, milliseconds, speed, folder = re.match(
        r"(\d+) steps, ([\d.]+) ms a step while tracing, (\d+) noisy images/s; the trace is in (\S+): ", line
    ).groups()
    assert steps == "2" and folder == str(run / "tensorboard")
    assert float(milliseconds) * float(speed) == pytest.approx(64 * 1000, rel=0.05)  # rounded, a step of 64 images
    new = {path for path in run.rglob("*") if path.is_file()} - set(before)
    assert [path.name.split(".", 1)[1] for path in sorted(new)] == ["trace.json.gz", "xplane.pb"]
    assert all(path.parent.parent == run / "tensorboard" / "plugins" / "profile" for path in new)
    assert all(path.read_bytes() == content for path, content in before.items())
    for number in (0, 5):
        message = f"profile={number}: use a number of steps from 1 to 4, which one epoch has"
        error = program.fails("cli.train", *TOY, f"--workdir={tmp_path / 'new'}", f"--profile={number}")
        assert message in error and not (tmp_path / "new").exists()

"""--dry_run: says what a command would do, writes nothing but caches, and refuses what the command would refuse."""

import re
import shutil

import jax
import numpy as np
import pytest

from configs import mnist
from rs_consistency.devices.compiler import memory_of
from rs_consistency.smoothing import speed, votes
from rs_consistency.smoothing.speed import measure_votes
from rs_consistency.smoothing.votes import vote_settings
from rs_consistency.training import dry_run
from rs_consistency.training.session import Session
from tests.helpers import TOY


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    for module in (dry_run, speed):
        monkeypatch.setattr(module, "_MEASURED_SECONDS", 0.05)  # instead of 2


def everything_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_is_planned_without_a_trace_of_it(program, tmp_path):
    out = program.succeeds("cli.train", *TOY, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "200 training and 60 test images; a step takes 32 examples x 2 noisy copies of 28 x 28 x 1" in out
    assert "linear, 7,850 parameters, float32" in out and "new; 14 of 14 steps to do" in out
    assert float(re.search(r"speed: ([\d,]+) noisy", out)[1].replace(",", "")) > 0
    assert "devices: 8 x cpu" in out and "time: about 0:" in out
    assert not list(tmp_path.iterdir())


def test_training_knows_how_far_a_run_is(program, toy_trained, tmp_path):
    shutil.copytree(toy_trained, tmp_path / "run")
    before = everything_in(tmp_path / "run")
    out = program.succeeds("cli.train", *TOY, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "at step 14; 0 of 14 steps to do" in out and "time: about 0:00:00" in out
    error = program.fails("cli.train", *TOY, "--config.sigma=1.0", f"--workdir={tmp_path / 'run'}", "--dry_run")
    assert "holds a run with another config (sigma: 0.5 -> 1.0)" in error
    assert everything_in(tmp_path / "run") == before


def test_a_method_that_prepares_is_asked_about_few_images_only(program, toy_trained, tmp_path):
    before = everything_in(toy_trained)
    catrs = ["--config.method=catrs", "--config.consistency.lbd=0", "--config.catrs.num_steps=1"]
    catrs += ["--config.catrs.num_votes=50", f"--config.catrs.teacher={toy_trained}"]
    out = program.succeeds("cli.train", *TOY, *catrs, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "not in it: the votes on training images that catrs counts" in out
    assert everything_in(toy_trained) == before and not (tmp_path / "run").exists()


def test_the_steps_of_the_last_epoch_are_measured(program, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        dry_run, "_measure_steps", lambda config, inputs, state: seen.append(int(state.step)) or (0.1, 0.1, 0.1, None)
    )
    sun = ["--config.method=sun", "--config.consistency.lbd=0", "--config.sun.discard_epoch=1"]
    out = program.succeeds("cli.train", *TOY, *sun, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert seen == [7] and "not in it: the votes on training images that sun counts" in out


@pytest.mark.parametrize("num_epochs", [3, 10**9])
def test_a_measurement_begins_with_the_last_epoch_that_int32_can_count(tmp_path, num_epochs):
    config = mnist.get_config()
    config.batch_size, config.num_epochs, config.model = 64, num_epochs, "linear"
    session = Session.open(config, tmp_path / "run")
    assert session.sizes.steps == 7
    state = session.late_state()
    assert int(state.step) == min(7 * num_epochs, 2**31 - 1) - 7 and state.step.dtype == np.int32
    for late, initial in zip(*map(jax.tree.leaves, (state.params, session.initial_state().params)), strict=True):
        np.testing.assert_array_equal(late, initial)


@pytest.mark.parametrize(("mode", "most"), [([], "about"), (["--mode=decide", "--radius=0.5"], "at most")])
def test_certification_is_planned(program, toy_trained, tmp_path, mode, most):
    shutil.copytree(toy_trained, tmp_path / "run")
    before = everything_in(tmp_path / "run")
    wanted = [f"--workdir={tmp_path / 'run'}", "--skip=3", "--n=300", "--batch_size=128", *mode]
    out = program.succeeds("cli.certify", *wanted, "--dry_run").out
    assert "linear, 7,850 parameters, float32, step 14; sigma 0.5" in out
    assert "20 of 60 of mnist, test, of shape 28 x 28 x 1; 0 done before" in out
    assert f"time: {most} 0:" in out and "in batches of 128" in out
    assert everything_in(tmp_path / "run") == before


def test_certification_counts_what_is_done(program, toy_trained, tmp_path):
    shutil.copytree(toy_trained, tmp_path / "run")
    wanted = [f"--workdir={tmp_path / 'run'}", "--n=100", "--batch_size=64"]
    program.succeeds("cli.certify", *wanted, "--max=5")
    assert (
        "60 of 60 of mnist, test, of shape 28 x 28 x 1; 5 done"
        in program.succeeds("cli.certify", *wanted, "--dry_run").out
    )


def test_memory_is_that_of_the_compiled_function():
    shape = jax.ShapeDtypeStruct((1024, 1024), np.float32)
    compiled = jax.jit(lambda x: x @ x).lower(shape).compile()
    assert 8 * 2**20 <= memory_of(compiled) <= 24 * 2**20  # one argument, one result, and what the product needs


@pytest.mark.parametrize("devices", [1, 8])
def test_votes_are_timed_even_where_a_group_takes_many_images(monkeypatch, devices):
    monkeypatch.setattr(votes, "_BATCHES_PER_CALL", {})  # as on an accelerator
    settings = vote_settings(
        sigma=0.5,
        num_classes=2,
        n0=1,
        n=100,
        seed=0,
        batch_size=1,
        image_shape=(2, 2, 1),
        devices=jax.devices()[:devices],
    )
    cost = measure_votes(
        lambda _, images: images.sum(axis=(1, 2, 3))[:, None] * np.float32([[1, -1]]),
        {},
        np.zeros((1, 2, 2, 1), np.uint8),
        settings=settings,
        devices=jax.devices()[:devices],
    )
    assert cost.per_second > 0


def test_a_plan_is_refused_where_the_command_would_be(program, toy_trained, tmp_path):
    shutil.copytree(toy_trained, tmp_path / "run")
    wanted = [f"--workdir={tmp_path / 'run'}", "--n=20", "--max=1", "--batch_size=64"]
    program.succeeds("cli.certify", *wanted)
    before = everything_in(tmp_path / "run")
    for change in ("--n=30", "--seed=1", "--skip=2"):
        refused = program.fails("cli.certify", *wanted, change)
        assert "was made with other settings" in refused
        assert program.fails("cli.certify", *wanted, change, "--dry_run") == refused
    (tmp_path / "notes.tsv").write_text("mine\n")
    for output in (tmp_path / "notes.tsv", tmp_path / "nowhere" / "a.tsv", tmp_path / "a.txt"):
        refused = program.fails("cli.certify", *wanted, f"--output={output}")
        assert program.fails("cli.certify", *wanted, f"--output={output}", "--dry_run") == refused
    assert everything_in(tmp_path / "run") == before


def test_what_writes_is_no_dry_run(program, tmp_path):
    error = program.fails("cli.train", *TOY, f"--workdir={tmp_path / 'run'}", "--dry_run", "--profile=2")
    assert "profile=2 writes a trace, and dry_run is to write nothing; leave out one" in error
    assert not list(tmp_path.iterdir())

"""--dry_run: says what a command would do, writes nothing, and refuses what the command would refuse."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import jax
import numpy as np
import pytest

from rs_consistency.estimates import memory_of
from tests.helpers import ROOT, TINY


def everything_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_is_planned_without_a_trace_of_it(program, tmp_path):
    out = program.succeeds("cli.train", *TINY, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "200 training and 60 test images; a step takes 32 examples x 2 noisy copies of 28 x 28 x 1" in out
    assert "lenet, 431,080 parameters, float32" in out and "new; 14 of 14 steps to do" in out
    assert float(re.search(r"speed: ([\d,]+) noisy", out)[1].replace(",", "")) > 0
    assert "devices: 8 x cpu" in out and "time: about 0:" in out
    assert not list(tmp_path.iterdir())


def test_training_knows_how_far_a_run_is(program, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = everything_in(tmp_path / "run")
    out = program.succeeds("cli.train", *TINY, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "at step 14; 0 of 14 steps to do" in out and "time: about 0:00:00" in out
    error = program.fails("cli.train", *TINY, "--config.sigma=1.0", f"--workdir={tmp_path / 'run'}", "--dry_run")
    assert "holds a run with another config (sigma: 0.5 -> 1.0)" in error
    assert everything_in(tmp_path / "run") == before


def test_a_method_that_prepares_is_asked_about_few_images_only(program, tmp_path):
    few = ["--config.method=gaussian", "--config.num_epochs=1", "--config.consistency.lbd=0", "--config.batch_size=64"]
    config = [f"--config={ROOT}/configs/mnist.py", "--config.eval_batch_size=60"]
    program.succeeds("cli.train", *config, *few, "--config.num_noise=1", f"--workdir={tmp_path / 'teacher'}")
    before = everything_in(tmp_path / "teacher")
    catrs = [*config, *few[1:], "--config.method=catrs", "--config.num_noise=4", "--config.catrs.num_votes=50"]
    catrs += [f"--config.catrs.teacher={tmp_path / 'teacher'}", "--config.catrs.num_steps=1"]
    out = program.succeeds("cli.train", *catrs, f"--workdir={tmp_path / 'run'}", "--dry_run").out
    assert "not in it: what catrs finds out about every training image first" in out
    assert everything_in(tmp_path / "teacher") == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("mode", "most"), [([], "about"), (["--mode=decide", "--radius=0.5"], "at most")])
def test_certification_is_planned(program, trained, tmp_path, mode, most):
    shutil.copytree(trained, tmp_path / "run")
    before = everything_in(tmp_path / "run")
    wanted = [f"--workdir={tmp_path / 'run'}", "--skip=3", "--n=300", "--batch_size=64", *mode]
    out = program.succeeds("cli.certify", *wanted, "--dry_run").out
    assert "lenet, 431,080 parameters, float32, step 14; sigma 0.5" in out
    assert "20 of 60 of mnist, test, of shape 28 x 28 x 1; 0 done before" in out
    assert f"time: {most} 0:" in out and "in batches of 64" in out
    assert everything_in(tmp_path / "run") == before


def test_certification_counts_what_is_done(program, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    wanted = [f"--workdir={tmp_path / 'run'}", "--n=100", "--batch_size=64"]
    program.succeeds("cli.certify", *wanted, "--max=5")
    assert (
        "60 of 60 of mnist, test, of shape 28 x 28 x 1; 5 done"
        in program.succeeds("cli.certify", *wanted, "--dry_run").out
    )
    assert "leave out --verify" in program.fails("cli.certify", *wanted, "--verify=2", "--dry_run")


def test_memory_is_that_of_the_compiled_function():
    shape = jax.ShapeDtypeStruct((1024, 1024), np.float32)
    compiled = jax.jit(lambda x: x @ x).lower(shape).compile()
    assert 8 * 2**20 <= memory_of(compiled) <= 24 * 2**20  # one argument, one result, and what the product needs


def test_the_package_installs_its_commands():
    ours = {
        one.name: one.load().__module__ for one in entry_points(group="console_scripts") if one.name.startswith("rs-")
    }
    names = ("train", "certify", "analyze")
    assert {f"rs-{name}": f"rs_consistency.cli.{name}" for name in names}.items() <= ours.items()
    command = Path(sys.executable).with_name("rs-train")
    done = subprocess.run([command, "--config=nowhere.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

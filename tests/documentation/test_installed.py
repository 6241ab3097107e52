"""The installed commands, started where no checkout is: they find configurations and go by their own names."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from rs_consistency.cli import start
from rs_consistency.cli.config_file import split
from tests.helpers import ROOT, TINY


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, from which this package can be imported and nothing else of the repository."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "rs_consistency").symlink_to(ROOT / "rs_consistency")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def command(name, *arguments, cwd):
    program = Path(sys.executable).with_name(name)
    done = subprocess.run(
        [program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_installed_commands_work_in_a_foreign_folder(elsewhere, trained):
    done = command("rs-train", *TINY, f"--workdir={elsewhere / 'run'}", "--dry_run", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "14 of 14 steps to do" in done.stdout and not list(elsewhere.iterdir())
    done = command("rs-train", *TINY, cwd=elsewhere)
    assert done.stderr == "error: --workdir is missing: rs-train --config=configs/mnist.py --workdir=runs/mnist\n"

    wanted = [f"--workdir={trained}", f"--output={elsewhere / 'one.tsv'}", "--n=20", "--max=1"]
    done = command("rs-certify", *wanted, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("devices: 8 x cpu (cpu)\n") and "next: rs-analyze " in done.stdout
    record = json.loads((elsewhere / "one.json").read_text())
    assert record["command"] == " ".join(["rs-certify", *wanted])
    done = command("rs-certify", "--nonsense", cwd=elsewhere)
    assert done.stderr.endswith("; rs-certify --help tells more\n")


PARSE = "import sys; from rs_consistency.cli.train import parse; print(parse(sys.argv[1:]).config.dataset.name)"


def parsed(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-c", PARSE, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_configuration_imports_from_its_neighbours_and_from_the_project(elsewhere):
    mine = elsewhere / "project" / "configs"
    mine.mkdir(parents=True)
    (mine / "base.py").write_text("NAME = 'svhn'\n")
    (mine / "mine.py").write_text(
        "from configs import base, default\n\n\ndef get_config():\n    config = default.get_config()\n"
        "    config.dataset.name = base.NAME\n    return config\n"
    )
    assert parsed("--config", str(mine / "mine.py"), cwd=elsewhere) == "svhn"
    (elsewhere / "alone.py").write_text("from configs import demo\n\nget_config = demo.get_config\n")
    assert parsed("--config=alone.py:method=gaussian", cwd=elsewhere) == "mnist_subset"
    # What is not here is the project's, so that `--config=configs/mnist.py` of the documentation works anywhere.
    assert parsed("--config=configs/cifar10.py:method=macer", cwd=elsewhere) == "cifar10"


def test_a_configuration_is_told_from_other_words():
    words = ["--n=5", "--config", "a.py:sigma=1", "--config.sigma", "0.5", "--output=x", "-config.model=lenet"]
    chosen = ["--config=a.py:sigma=1", "--config.sigma=0.5", "--config.model=lenet"]
    assert split(words) == (chosen, ["--n=5", "--output=x"])
    assert split(["--config", "--n=5"]) == (["--config"], ["--n=5"])


def test_the_package_installs_its_commands():
    ours = {one.name: one for one in entry_points(group="console_scripts") if one.name.startswith("rs-")}
    for name in ("train", "certify", "analyze", "reproduce", "export-torch"):
        program = ours[f"rs-{name}"].load()
        assert program is getattr(start, name.replace("-", "_"))
        assert callable(importlib.import_module(*program.args).main)
    done = command("rs-train", "--config=nowhere.py", cwd=os.getcwd())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

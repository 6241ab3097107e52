"""The documentation: it builds without warnings, names every key, and its commands and Python blocks run.

Blocks marked `bash` and `python` are executed, in their order and in one folder for each page, on fewer data and with
fewer votes; what is marked otherwise, or not at all, is not.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest

from configs import default
from rs_consistency import data, methods
from rs_consistency.cli import analyze, certify, reproduce, train
from rs_consistency.training.config import flatten
from tests.helpers import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    str(path.relative_to(DOCS))
    for path in DOCS.rglob("*.md")
    if re.search("^```(bash|python)$", path.read_text(), re.MULTILINE) and "_build" not in path.parts
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "train.py": train.main,
    "certify.py": certify.main,
    "analyze.py": analyze.main,
    "reproduce.py": reproduce.main,
}


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """An empty folder with `configs/`, and the embedded dataset cut down to 256 and 200 images."""
    whole = data.DATASETS["mnist_subset"]

    def read(*args):
        images, labels = whole.read(*args)
        number = {"train": 256, "test": 200}[args[1]]
        return images[:number], labels[:number]

    tables = [(table, dict(table)) for table in (data.DATASETS, methods.METHODS)]
    data.DATASETS["mnist_subset"] = whole._replace(read=read)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    yield tmp_path
    for table, before in tables:
        table.clear()
        table.update(before)


def run_command(line):
    words = [word for word in shlex.split(line) if not re.fullmatch("[A-Z_]+=.*", word)]
    if words[:2] == ["pip", "install"]:
        for word in words[2:]:
            if word.endswith(".txt"):
                assert (ROOT / word).exists()
        return
    assert words[0] == "python" and words[1] in PROGRAMS, f"no test runs this command: {line}"
    arguments = words[2:]
    if words[1] == "train.py":
        arguments += ["--config.num_epochs=1"]
    elif words[1] == "certify.py" and not any(word.startswith(("--verify", "--merge")) for word in arguments):
        arguments += ["--n=60"]  # enough to prove something with every setting of the pages
    elif words[1] == "reproduce.py" and "--render" not in arguments:
        arguments += ["--epochs=1", "--images=4", "--n=50", "--config", "batch_size=1000"]
    try:
        PROGRAMS[words[1]](arguments)
    except SystemExit as stop:
        assert not stop.code, f"exit status {stop.code} of: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_tells_to_do_works(page, small_world):
    namespace = {}
    for language, code in BLOCK.findall((DOCS / page).read_text()):
        if language == "python":
            exec(compile(code, f"docs/{page}", "exec"), namespace)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                run_command(line)


def test_a_wrong_command_in_a_page_would_be_noticed(small_world):
    with pytest.raises(AssertionError, match="exit status 2"):
        run_command("python analyze.py runs/nowhere")
    with pytest.raises(AssertionError, match="no test runs this"):
        run_command("python nowhere.py")


def config_reference():
    spec = importlib.util.spec_from_file_location("config_reference", DOCS / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference


def test_the_reference_has_every_key_of_a_configuration():
    page = config_reference()((ROOT / "configs" / "default.py").read_text())
    described = dict(re.findall(r"^\| `([\w.]+)` \| `.*` \| (.+) \|$", page, re.MULTILINE))
    assert set(described) == set(flatten(default.get_config()))
    with pytest.raises(ValueError, match=r"config\.x has no comment"):
        config_reference()("    config.x = 1\n")


def test_the_documentation_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run(
        [*command, DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "rs_consistency.certify" in (tmp_path / "html" / "api.html").read_text()

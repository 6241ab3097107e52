"""Names of files and folders, on the command lines of all programs."""

import argparse

import pytest

from rs_consistency.cli.common import user_path
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import cache_folder, check_utf8
from rs_consistency.data.tfds import resolve_data_dir
from rs_consistency.training.checkpoints import Checkpoints
from tests.helpers import ROOT, TOY

# The words of each program before a place; the place is the value of the last word.
WORDS = {
    "cli.train": [[*TOY, "--workdir"]],
    "cli.certify": [
        ["--workdir"],
        ["--workdir=new", "--output"],
        ["--workdir=new", "--data_dir"],
        ["--workdir=new", "--cache_dir"],
        ["--output=new.tsv", "--merge"],
        ["--config=configs/mnist.py", "--sigma=1", "--output=new.tsv", "--torch_checkpoint"],
    ],
    "cli.analyze": [["new", "--output"], ["new", "--match_images"], ["new", "--output=new", "--data_dir"]],
    "cli.reproduce": [["--workdir"], ["--workdir=new", "--results"]],
    "cli.export_torch": [["--output=new", "--workdir"], ["--workdir=new", "--output"]],
    "cli.prepare": [["mnist", "--data_dir"], ["mnist", "--manual_dir"]],
}
PLACES = {
    "~nobody_here/x": "the home folder is not known",
    "gs://bucket/x": "gs://bucket/x is no path of this machine",
    "file:///x": "file:///x is no path of this machine",
    "x\0y": "has a NUL character",
}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, several in WORDS.items() for words in several])
def test_a_place_that_is_none_here_is_one_line_and_nothing_is_written(name, words, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, message in PLACES.items():
        assert message in program.fails(name, *words[:-1], f"{words[-1]}={place}")
    if name != "cli.train":  # which says that --workdir is missing
        assert "is empty" in program.fails(name, *words[:-1], f"{words[-1]}=")
    assert not list(tmp_path.iterdir())


def test_places_in_the_environment(monkeypatch):
    for name, folder in (("XDG_CACHE_HOME", cache_folder), ("TFDS_DATA_DIR", lambda: resolve_data_dir(""))):
        monkeypatch.setenv(name, "~nobody_here/x")
        with pytest.raises(UserError, match=f"{name}=~nobody_here/x: the home folder is not known"):
            folder()


def test_what_is_a_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    for text in ("a b", "new\nline", "w\xf6rk", "w\udcff", "c:/x", ":", "x" * 300):
        assert str(user_path(text)) == text
    with pytest.raises(argparse.ArgumentTypeError):
        user_path("")


@pytest.mark.parametrize(("name", "words"), [("train", TOY), ("reproduce", ["--methods=gaussian"])])
def test_a_workdir_of_other_bytes_is_refused_before_anything_is_written(name, words, program, tmp_path):
    other = tmp_path / "w\udcff"
    error = program.fails(f"cli.{name}", *words, f"--workdir={other}")
    assert "/w\\udcff' is not UTF-8 here, and no checkpoint can be there; rename it" in error
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is not UTF-8 here"):
        Checkpoints(other)
    check_utf8(tmp_path / "w\xf6rk", "workdir")


def test_a_repeated_flag_is_told_and_the_last_counts(program, tmp_path):
    error = program.fails("cli.certify", "--workdir=a", f"--workdir={tmp_path}", "--n=1", "--n=1")
    assert f"workdir={tmp_path} has no config.json" in error
    assert program.err.count("note: ") == 1
    assert f"note: --workdir is given twice, as a and as {tmp_path}: the last counts" in program.err
    program.fails("cli.train", "--config=a.py", "--config=b.py", "--config.sigma=1", "--config.sigma=2")
    assert "note: --config.sigma is given twice, as 1 and as 2: the last counts" in program.err
    program.fails("cli.reproduce", "--config", "model=a", "--config", "model=b", "--workdir=new")
    assert "note: model is given twice, as a and as b: the last counts" in program.err


@pytest.mark.parametrize("cell", ["sigma=0.5,sigma=0.25", "method=macer,sigma=0.5,method=macer"])
def test_a_cell_names_each_key_once(cell, program):
    error = program.fails("cli.train", f"--config={ROOT}/configs/mnist.py:{cell}", "--workdir=new")
    assert f"'{cell}' after the config file names {cell[:6].rstrip('=')} twice; leave out one of them" in error

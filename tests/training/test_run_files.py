"""The files of a run that are read back: damaged, forged, or replaced meanwhile by the run itself."""

import json
import os
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rs_consistency import UserError
from rs_consistency.training import checkpoints as module
from rs_consistency.training import runs, teacher
from rs_consistency.training.checkpoints import Checkpoints
from rs_consistency.training.metrics import read_lines
from rs_consistency.training.step import restore_target
from tests.helpers import damage_checkpoint

GOOD_LINE = b'{"epoch": 1, "step": 7, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"null",
        b"[1]",
        b"7",
        b"\xff\xfe",
        b'{"epoch": "1"}',
        b'{"epoch": 1.0}',
        b'{"epoch": true}',
        b'{"epoch": 1e400}',
        b'{"epoch": 1, "step": "7"}',
        b'{"epoch": 1, "step": 7.5}',
        b'{"epoch": 1, "step": 7, "loss": NaN}',
        b'{"epoch": 1, "step": 7, "loss": null}',
        b'{"epoch": 1, "step": 7, "loss": {"a": 1}}',
        b'{"epoch": 1, "epoch": 2}',
        b'{"epoch": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"epoch": 1, "st{"epoch": 1, "step": 7}',
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD_LINE + line + b"\n" + GOOD_LINE)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged \(.*\); delete that line"):
        read_lines(path)
    path.write_bytes(GOOD_LINE + line)  # a last line that was cut
    assert read_lines(path) == [{"epoch": 1, "step": 7, "loss": 0.5}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": "0.5"}, "sigma='0.5': use a number"),
        ({"sigma": [0.5]}, "sigma=[0.5]: use a number"),
        ({"sigma": 0}, "sigma=0: use a number greater than 0"),
        ({"method": {}}, "method={}: use a text"),
        ({"optimizer": {"lr": 1.0}}, "the config lacks a key: optimizer."),
        ({"optimizer.lr": 1.0}, "no such key: optimizer.lr (near: optimizer.lr)"),
        ({"mine": 1}, "no such key: mine"),
        ({"macer": None}, "macer=None: use a block"),
    ],
)
def test_a_config_of_a_run_is_checked_like_one_from_a_file(program, toy_trained, tmp_path, change, message):
    config = json.loads((toy_trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert f"{tmp_path / 'config.json'}: {message}" in program.fails("cli.certify", f"--workdir={tmp_path}")


@pytest.mark.parametrize("number", ['"200"', "true", "0", "-1", "2.5", "null", "[200]"])
def test_a_number_of_examples_that_is_none_is_named(toy_trained, tmp_path, number):
    (tmp_path / "data.json").write_text(f'{{"train_digest": "", "train_examples": {number}}}')
    with pytest.raises(UserError, match=r"data.json does not say how many training examples"):
        runs.finished_step(tmp_path, runs.read_config(toy_trained))


def test_votes_of_a_teacher_that_cannot_be_are_made_again(tmp_path, capsys):
    def read(path, counts, **others):
        np.savez_compressed(path, counts=counts, **{"teacher": "a", **others})
        return teacher._read(path, total=3, num_classes=2, num_votes=5)

    path, good = tmp_path / "votes.npz", np.array([[5, 0], [2, 3]])
    assert read(path, good)[1] == "a" and not capsys.readouterr().err
    bad = [
        np.array(4 * [[5, 0]]),  # of more images
        good[:, :1],
        good[0],
        good[None],
        good.astype(float),
        good.astype(object),  # a pickle
        good.astype(str),
        np.array([[6, -1]]),
        np.array([[5, 0], [3, 3]]),
        np.zeros((0, 1), int),
    ]
    for counts in bad:
        assert read(path, counts) is None and "is unreadable; it is made again" in capsys.readouterr().err
    assert read(path, good, more=np.zeros(10**6, np.uint8)) is None  # 1 kB that asks for 1 MB
    np.save(tmp_path / "one.npy", good)
    (tmp_path / "one.npy").rename(path)
    assert teacher._read(path, 3, 2, 5) is None
    path.unlink()
    os.mkfifo(path)
    assert teacher._read(path, 3, 2, 5) is None
    path.unlink()
    assert teacher._read(path, 3, 2, 5) is None and teacher._read(None, 3, 2, 5) is None


@pytest.fixture(scope="module")
def target(toy_trained):
    return restore_target(runs.read_config(toy_trained), jax.devices()[:1])


def newest(workdir, target):
    with closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.restore_newest(target)


def test_a_state_of_another_step_than_its_folder_is_stepped_over(toy_trained, tmp_path, target, capsys):
    shutil.copytree(toy_trained, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "7", folder / "15")
    assert newest(tmp_path, target)[0] == 14
    assert (
        f"note: checkpoint {folder / '15'} is unreadable: its content is of step 7; trying" in capsys.readouterr().err
    )
    for name in ("007", "-3", "abc", "1_6", "+16", "16.5", "step_16"):
        shutil.copytree(folder / "7", folder / name)
    (folder / "16").write_text("a file")
    (folder / "17").symlink_to(tmp_path / "nowhere")
    shutil.rmtree(folder / "15")
    assert newest(tmp_path, target)[0] == 14 and not capsys.readouterr().err


@pytest.mark.parametrize("cast", [lambda x: x[:1], lambda x: x.astype(jnp.float16)])
def test_arrays_of_another_shape_or_type_are_stepped_over(toy_trained, tmp_path, target, capsys, cast):
    shutil.copytree(toy_trained, tmp_path, dirs_exist_ok=True)
    step, state = newest(tmp_path, target)
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        checkpoints.save(20, state.replace(step=jnp.int32(20), params=jax.tree.map(cast, state.params)))
    assert newest(tmp_path, target)[0] == step == 14
    assert f"{tmp_path / 'checkpoints' / '20'} is unreadable: " in capsys.readouterr().err


def test_a_save_that_did_not_save_is_an_error(toy_trained, tmp_path, target):
    shutil.copytree(toy_trained, tmp_path, dirs_exist_ok=True)
    _, state = newest(tmp_path, target)
    shutil.copytree(tmp_path / "checkpoints" / "7", tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp")
    with closing(Checkpoints(tmp_path, keep=3)) as checkpoints:
        for step in (13, 14):
            message = rf"checkpoint {step} was not written to .*: it holds steps \[7, 14\] already; move the later"
            with pytest.raises(UserError, match=message):
                checkpoints.save(step, state)
        checkpoints.save(15, state)
    assert (tmp_path / "checkpoints" / "15" / "default").is_dir()
    assert not (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").exists()  # a killed save left it


@pytest.fixture(scope="module")
def later(toy_trained, tmp_path_factory, target):
    """The folder of the checkpoints 15 to 20."""
    workdir = tmp_path_factory.mktemp("later")
    shutil.copytree(toy_trained, workdir, dirs_exist_ok=True)
    _, state = newest(workdir, target)
    with closing(Checkpoints(workdir, keep=6)) as checkpoints:
        for step in range(15, 21):
            checkpoints.save(step, state.replace(step=jnp.int32(step)))
    return workdir / "checkpoints"


@pytest.fixture
def training(toy_trained, later, tmp_path, monkeypatch):
    """A run whose trainer replaces the only checkpoint whenever it is read: six times, with step 20 at last."""
    folder, later, restore = (
        tmp_path / "run" / "checkpoints",
        shutil.copytree(later, tmp_path / "later"),
        Checkpoints._restore,
    )
    shutil.copytree(toy_trained, tmp_path / "run")
    shutil.rmtree(folder / "7")

    def replaced_meanwhile(checkpoints, step, target):
        if (later / str(step + 1)).exists():
            (later / str(step + 1)).rename(folder / str(step + 1))
            if step % 3 == 0:
                shutil.rmtree(folder / str(step))
            else:  # Orbax is in the middle of the removal
                damage_checkpoint(folder / str(step), "truncated" if step % 3 == 1 else "empty")
        return restore(checkpoints, step, target)

    monkeypatch.setattr(Checkpoints, "_restore", replaced_meanwhile)
    return tmp_path / "run"


def test_a_run_is_read_while_it_trains(training, target, capsys):
    step, state = newest(training, target)
    assert step == state.step == 20 and capsys.readouterr().err == ""


def test_a_damaged_step_stays_damaged_while_a_run_trains(training, target, capsys):
    damage_checkpoint(training.parent / "later" / "20", "truncated")
    with pytest.raises(UserError, match=r"every checkpoint in .* is unreadable \(steps 20, 19, 17, 16, 14\)"):
        newest(training, target)
    note = f"note: checkpoint {training / 'checkpoints' / '20'} is unreadable: "
    assert [line.startswith(note) for line in capsys.readouterr().err.splitlines()] == [True]


def test_a_run_that_is_always_faster_is_an_error_at_last(training, target, monkeypatch):
    monkeypatch.setattr(module, "_MOST_REPLACED", 3)
    with pytest.raises(UserError, match="are replaced before they are read; try again once the training is over"):
        newest(training, target)


def test_a_step_may_vanish_while_the_folder_is_listed(toy_trained, target, monkeypatch):
    manager, failures = module.ocp.CheckpointManager, [FileNotFoundError("7"), FileNotFoundError("14")]

    def listing(*args, **settings):
        if failures:
            raise failures.pop()
        return manager(*args, **settings)

    monkeypatch.setattr(module.ocp, "CheckpointManager", listing)
    assert newest(toy_trained, target)[0] == 14 and not failures

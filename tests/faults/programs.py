"""The programs under faults: how a folder is prepared for them, and their commands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from matplotlib.backends import backend_pdf  # noqa: F401  imported once, before all forks

from rs_consistency.certificates import columns, source
from rs_consistency.cli import analyze, certify, reproduce, train
from rs_consistency.common import version
from rs_consistency.report import page  # noqa: F401
from rs_consistency.reproduction import machine, render, runner  # noqa: F401
from rs_consistency.training import checkpoints, loop, runs  # noqa: F401
from tests import plans, toy  # noqa: F401  registers the model
from tests.faults.inject import run
from tests.helpers import ROOT

_TRAIN = [
    f"--config={ROOT}/configs/mnist.py:method=gaussian",
    "--config.model=linear",
    "--config.batch_size=48",
    "--config.eval_batch_size=20",
    "--config.num_epochs=3",
    "--config.checkpoint_keep=2",
]
_IMAGES, _VOTES = 6, 100
_QUICK = [f"--n={_VOTES}", "--batch_size=25", "--sampler=float"]
# Not mode attack: its files are written by the same writer, and its search takes ten times as long to compile.
_MODES = {
    "certify": ["--n0=10"],
    "tolerance": ["--n0=10", "--tolerance=0.2"],
    "decide": ["--n0=10", "--mode=decide", "--radius=0.1"],
    "predict": ["--mode=predict"],
}


class Program(NamedTuple):
    """A command on the files in a folder.

    `prepare` makes the files that it finds, `call` runs it, both with the folder. `state` is called after it, in its
    process, and returns what the files hold beyond their text.
    """

    prepare: Callable[[Path], None]
    call: Callable[[Path], None]
    state: Callable[[Path], str] = lambda folder: ""


def programs(trained: Path) -> dict[str, Program]:
    """Return the programs by name; `trained` is a folder with a finished run of `train_in`."""
    found = {
        "train": Program(_nothing, train_in, _newest),
        "train, continued": Program(lambda folder: _continued(folder, trained), train_in, _newest),
    }
    for mode, flags in _MODES.items():
        found[f"certify ({mode})"] = Program(lambda folder: _copy(folder, trained), _certify(flags))
    flags = _MODES["certify"]
    found |= {
        "certify, continued": Program(lambda folder: _certified(folder, trained, cut=True), _certify(flags)),
        "certify, finished": Program(lambda folder: _certified(folder, trained, cut=False), _certify(flags)),
        "merge": Program(lambda folder: _shards(folder, trained), _merge),
        "report": Program(lambda folder: _whole(folder, trained, flags), _report),
        "report, again": Program(lambda folder: _reported(folder, trained), _report),
        "reproduce": Program(_nothing, _reproduce),
        "reproduce, again": Program(_reproduced, _reproduce),
    }
    return found


def stand_still() -> None:
    """Fix times and code version, which differ between two runs, and let plans run the programs of `tests.fakes`."""
    source._VALUES_AT_ONCE = 2 * 28 * 28  # two images are read at a time, and so written
    columns.format_time = lambda seconds: "0:00:00.250000"
    version.git_commit = lambda folder: None
    version.source_digest = lambda folder: "0"
    machine.this_machine = lambda jobs: plans.MACHINE
    runner.Runner.__init__.__kwdefaults__["modules"] = plans.FAKES
    runner.subprocess, runner._POLL_SECONDS = plans.AtOnce, 0.02


def train_in(folder: Path) -> None:
    """Train the toy model in the folder."""
    train.main([*_TRAIN, f"--workdir={folder}/run", f"--config.dataset.cache_dir={folder}/cache"])


def _certify(flags: list[str], most: int = _IMAGES) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        certify.main([f"--workdir={folder}/run", f"--max={most}", *_QUICK, *flags])

    return call


def _merge(folder: Path) -> None:
    parts = [f"{folder}/run/certificates-{index}-of-2.tsv" for index in (1, 2)]
    certify.main(["--merge", *parts, f"--output={folder}/all.tsv"])


def _report(folder: Path) -> None:
    analyze.main([f"{folder}/run/certificates.tsv", f"--output={folder}/report", "--no_network"])


def _reproduce(folder: Path) -> None:
    options = ["--methods=gaussian", "--sigmas=0.25,0.5", "--images=4", "--epochs=2", "--n=1000", "--jobs=1"]
    reproduce.main([f"--workdir={folder}/runs", f"--results={folder}/results", *options])


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _copy(folder: Path, trained: Path) -> None:
    shutil.copytree(trained, folder)


def _newest(folder: Path) -> str:
    """Return step and digest of the newest checkpoint."""
    restored = runs.restore(folder / "run", jax.devices()[:1])
    return f"{restored.step} {checkpoints.digest(restored.variables)}"


def _done(call: Callable[[Path], None], folder: Path) -> None:
    ended = run(lambda: call(folder), below=folder)
    assert ended.status == 0, ended.err


def _continued(folder: Path, trained: Path) -> None:
    """A run whose last checkpoint is damaged: it is set aside, and the last epoch trained again."""
    _copy(folder, trained)
    last = max((folder / "run/checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    last.mkdir()


def _certified(folder: Path, trained: Path, *, cut: bool) -> None:
    """Half of the lines and a torn one; or all lines, in no order, and not yet finished."""
    _copy(folder, trained)
    _done(_certify(_MODES["certify"], _IMAGES // 2), folder)
    path = folder / "run/certificates.tsv"
    if cut:
        path.write_bytes(path.read_bytes() + path.read_bytes().splitlines()[-1][:9])
        return
    _done(_certify(_MODES["certify"]), folder)
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, *reversed(lines[:-1]), lines[-1]]))
    record = path.with_suffix(".json")
    text = record.read_text()
    record.write_text(text[: text.index(',\n  "finished"')] + "\n}\n")


def _whole(folder: Path, trained: Path, flags: list[str]) -> None:
    _copy(folder, trained)
    _done(_certify(flags), folder)


def _shards(folder: Path, trained: Path) -> None:
    _copy(folder, trained)
    for index in (1, 2):
        _done(_certify([*_MODES["certify"], f"--shard={index}/2"]), folder)


def _reported(folder: Path, trained: Path) -> None:
    """A report of fewer images is there already."""
    _copy(folder, trained)
    _done(_certify(_MODES["certify"], _IMAGES // 2), folder)
    _done(_report, folder)
    _done(_certify(_MODES["certify"]), folder)


def _reproduced(folder: Path) -> None:
    """All cells are certified, and nothing of the second is kept yet."""
    folder.mkdir()
    _done(_reproduce, folder)
    shutil.rmtree(folder / "results/mnist/gaussian-0.50-0", ignore_errors=True)

"""The programs under faults: how a folder is prepared for them, and their commands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.backends import backend_pdf  # noqa: F401  imported once, before all forks

from rs_consistency.certificates import columns, question
from rs_consistency.cli import analyze, certify, reproduce, train
from rs_consistency.common import version
from rs_consistency.report import page  # noqa: F401
from rs_consistency.reproduction import machine, render, runner  # noqa: F401
from rs_consistency.smoothing.votes import Votes
from rs_consistency.training import checkpoints, loop, runs, session, step
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
_QUICK = [f"--n={_VOTES}", "--batch_size=25"]
# Not mode attack: the same writer writes its files, and its search takes seconds to compile.
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
        "report": Program(_theirs, _report),
        "report, again": Program(_reported, _report),
        "reproduce": Program(_nothing, _reproduce),
        "reproduce, again": Program(_reproduced, _reproduce),
    }
    return found


def careless() -> Program:
    """Return a program that does everything wrong that the suite looks for: its broken twin."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / "lines.tsv").write_text("idx\n0\n1\n")

    def call(folder: Path) -> None:
        mark = folder / ".lines.tsv.tmp"
        if mark.exists():
            raise SystemExit(2)
        mark.touch()
        (folder / "record.json").write_text('{"lines": 3}')
        (folder / "lines.tsv").write_text("idx\n0\n1\n2\n")
        mark.unlink()

    return Program(prepare, call)


def stand_still() -> None:
    """Fix times and code version, which differ between two runs, and leave out networks, which no file depends on.

    A plan runs the programs of `tests.fakes`.
    """
    columns.format_time = lambda seconds: "0:00:00.250000"
    version.git_commit = lambda folder: None
    version.source_digest = lambda folder: "0"
    question.count_votes = _votes
    loop.compile_steps = lambda config, inputs: step.Steps(_train, lambda variables, start, *feed, **parts: (9, 20), 2)
    session.Session.initial_state = _zeros
    machine.this_machine = lambda jobs: plans.MACHINE
    runner.Runner.__init__.__kwdefaults__["modules"] = plans.FAKES
    runner.subprocess, runner._POLL_SECONDS = plans.AtOnce, 0.02


def _votes(apply_fn, variables, images, indices, *, settings, plan=None, **about):
    """Yield votes for classes that depend on the number of the image, an image at a time."""
    for index in indices:
        counts0 = np.zeros((1, 10), np.int64)
        counts0[0, index % 10] = settings.n0
        votes = settings.n if plan is None else int(plan(counts0.max(axis=1))[0])
        counts = np.zeros((1, 10), np.int64)
        counts[0, index % 10], counts[0, (index + 1) % 10] = votes - index % 4, index % 4
        yield Votes(counts0, counts)


def _zeros(opened):
    target = step.restore_target(opened.config, opened.devices, len(opened.train))
    return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), target)


def _train(state, number, *feed, **parts):
    """Count the steps in every array of the state."""
    later = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf) + leaf.dtype.type(number), leaf.sharding), state)
    return later, {"loss": np.ones(2, np.float32), "param_norm": np.ones(2, np.float32)}


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
    analyze.main([f"{folder}/theirs.tsv", f"--output={folder}/report"])


def _reproduce(folder: Path) -> None:
    options = ["--methods=gaussian,consistency", "--sigmas=0.5", "--images=4", "--epochs=2", "--n=1000", "--jobs=1"]
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


def _theirs(folder: Path, radius: float = 0.5) -> None:
    """A file of another program, whose report has few figures."""
    folder.mkdir(exist_ok=True)
    text = f"idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t{radius}\t1\t2.5\n1\t3\t-1\t0.0\t0\t2.5\n"
    (folder / "theirs.tsv").write_text(text)


def _shards(folder: Path, trained: Path) -> None:
    _copy(folder, trained)
    for index in (1, 2):
        _done(_certify([*_MODES["certify"], f"--shard={index}/2"]), folder)


def _reported(folder: Path) -> None:
    """A report with other radii is there already."""
    _theirs(folder, 0.25)
    _done(_report, folder)
    _theirs(folder)


def _reproduced(folder: Path) -> None:
    """All cells are certified, and nothing of the second is kept yet."""
    folder.mkdir()
    _done(_reproduce, folder)
    shutil.rmtree(max((folder / "results/mnist").glob("*/run.json")).parent)

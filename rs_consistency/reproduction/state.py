"""The state of a cell, read from its workdir: cheap enough for every second, and right after any interruption."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rs_consistency.certificates.read import read_table
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json, write_json
from rs_consistency.common.version import code_version
from rs_consistency.reproduction.plan import PUBLISHED_VOTES, Cell
from rs_consistency.training.config import differing_keys
from rs_consistency.training.metrics import METRICS_FILE, read_lines
from rs_consistency.training.runs import CONFIG_FILE

CERTIFICATES = "certificates.tsv"


class State(NamedTuple):
    """The finished part of a cell.

    It is `trained` when the last checkpoint exists, and `certified` when all images are. `epoch_seconds` is the time of
    the last epoch, None where it is not known, and `step` the step of the training's last record.
    """

    epochs: int = 0
    trained: bool = False
    images: int = 0
    certified: bool = False
    epoch_seconds: float | None = None
    step: int = 0


def glance(cell: Cell, workdir: Path) -> State:
    """Return the state by counting lines; raise a `UserError` when the training's records are damaged."""
    record = (read_lines(workdir / METRICS_FILE) or [{"epoch": 0, "step": 0}])[-1]
    config, seconds = cell.config(), None
    try:
        epochs, step = record["epoch"], record["step"]
        if record.get("noisy_images_per_second"):
            seconds = step / epochs * config.batch_size / record["noisy_images_per_second"]
    except (KeyError, ZeroDivisionError):
        raise UserError(f"{workdir / METRICS_FILE}: its last line is damaged; delete that line") from None
    trained = epochs >= config.num_epochs and (workdir / "checkpoints" / str(step)).is_dir()
    path = workdir / CERTIFICATES
    images = max(0, path.read_bytes().count(b"\n") - 1) if trained and path.exists() else 0
    return State(epochs, trained, images, images >= cell.selection.size, seconds, step)


def is_trained(cell: Cell, workdir: Path) -> bool:
    """Return whether the cell's training is finished; a `UserError` for another configuration, or a damaged workdir."""
    _check_config(cell, workdir)
    return glance(cell, workdir).trained


def inspect(cell: Cell, workdir: Path) -> State:
    """Return the state by reading the files, checked against the cell's settings.

    A `UserError` is raised when the workdir holds a run, or certificates, with other settings, or is damaged.
    """
    _check_config(cell, workdir)
    state = glance(cell, workdir)
    if not state.images:
        return state
    table = read_table(workdir / CERTIFICATES)
    wanted = {
        **PUBLISHED_VOTES,
        "n": cell.n,
        "seed": cell.seed,
        "sigma": cell.sigma,
        "skip": cell.selection.skip,
        "dtype": cell.config().dtype,
        "checkpoint_step": state.step,
        "split": "test",
        "split_size": cell.selection.split_size,
    }
    differing = table.record.differences(wanted)
    if differing:
        raise UserError(
            f"{workdir / CERTIFICATES} was made with other settings ({'; '.join(differing)}); move it away, or choose"
            " another --workdir"
        )
    missing = [index for index in cell.selection.images if index not in table.rows]
    if table.changed and not missing:  # certify.py makes missing last lines again
        raise UserError(f"{workdir / CERTIFICATES} was changed after it was finished; move it away, or restore it")
    finished = not missing and table.record.finished is not None
    return state._replace(images=cell.selection.size - len(missing), certified=finished)


def _check_config(cell: Cell, workdir: Path) -> None:
    path = workdir / CONFIG_FILE
    if path.exists():
        differing = differing_keys(json.loads(cell.config().to_json()), read_json(path))
        if differing:
            raise UserError(
                f"workdir={workdir} holds a run with another config ({'; '.join(differing)}); choose another --workdir"
            )


def calls_of(workdir: Path) -> list[dict[str, Any]]:
    """Return the calls that made a cell's workdir; none for a workdir that was made by hand.

    Each has `program`, `started`, the code's version, and `device`, `processor` and `where` (`Machine.where`). Calls of
    earlier versions lack the last three.
    """
    path = _calls_path(workdir)
    calls = read_json(path).get("calls", []) if path.exists() else []
    texts = ("program", "where")  # `where` is not in the calls of earlier versions
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and "program" in call and all(isinstance(call.get(name, ""), str) for name in texts)
        for call in calls
    )
    if not good:
        raise UserError(f"{path} is damaged; move it away: where the run was made is then not known")
    return calls


def record_call(workdir: Path, program: str, *, device: str, processor: str, where: str) -> None:
    """Record a call: program, code version, machine, and time of the start.

    Earlier calls are forgotten where their work was removed since, be it the whole workdir or its certificates.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    place = {"device": device, "processor": processor, "where": where}
    entry = {"program": program, "started": started, **place, **code_version()}
    made = {"train": CONFIG_FILE, "certify": CERTIFICATES}
    before = [call for call in calls_of(workdir) if (workdir / made.get(call.get("program"), "")).exists()]
    write_json(_calls_path(workdir), {"calls": [*before, entry]})


def _calls_path(workdir: Path) -> Path:
    return workdir.parent / f".{workdir.name}.calls.json"

"""How far a cell is, read from its workdir: cheap enough to ask every second, and true after any interruption."""

import json
from pathlib import Path
from typing import NamedTuple

from rs_consistency.config import differing_keys
from rs_consistency.errors import UserError
from rs_consistency.files import read_json
from rs_consistency.metrics import METRICS_FILE, read_lines
from rs_consistency.reproduction.plan import Cell
from rs_consistency.tables import read_table
from rs_consistency.workdir import CONFIG_FILE

CERTIFICATES = "certificates.tsv"


class State(NamedTuple):
    """What of a cell is done.

    Attributes:
      epochs: trained, 0..num_epochs.
      trained: whether the last checkpoint is there.
      images: certified.
      certified: whether all of its images are.
      epoch_seconds: how long the last epoch took; None where it is not known.
    """

    epochs: int = 0
    trained: bool = False
    images: int = 0
    certified: bool = False
    epoch_seconds: float | None = None


def glance(cell: Cell, workdir: Path) -> State:
    """The state by counting lines; `certified` where there are enough of them."""
    record = (read_lines(workdir / METRICS_FILE) or [{}])[-1]
    epochs = int(record.get("epoch", 0))
    seconds = None
    if record.get("noisy_images_per_second"):
        config = cell.config()
        seconds = record["step"] / epochs * config.batch_size / record["noisy_images_per_second"]
    last = record.get("step", 0) if epochs >= cell.config().num_epochs else None
    trained = last is not None and (workdir / "checkpoints" / str(last)).is_dir()
    path = workdir / CERTIFICATES
    images = max(0, path.read_bytes().count(b"\n") - 1) if trained and path.exists() else 0
    return State(epochs, trained, images, images >= cell.selection.size, seconds)


def inspect(cell: Cell, workdir: Path) -> State:
    """The state by reading the files, checked against what the cell asks for.

    Raises:
      UserError: when the workdir holds a run, or certificates, with other settings.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        differing = differing_keys(json.loads(cell.config().to_json()), read_json(path))
        if differing:
            raise UserError(
                f"workdir={workdir} holds a run with another config ({'; '.join(differing)}); choose another --workdir"
            )
    state = glance(cell, workdir)
    if not state.images:
        return state
    table = read_table(workdir / CERTIFICATES)
    wanted = {"n": cell.n, "seed": cell.seed, "sigma": cell.sigma, "skip": cell.selection.skip}
    for name, value in wanted.items():
        if table.record.get(name) != value:
            raise UserError(
                f"{workdir / CERTIFICATES} was made with {name}={table.record.get(name)}, not {value}; move it away, or"
                " choose another --workdir"
            )
    missing = [index for index in cell.selection.indices().tolist() if index not in table.rows]
    return state._replace(images=cell.selection.size - len(missing), certified=not missing)

"""The records of a training run: for every epoch a line of `metrics.jsonl` and TensorBoard scalars."""

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rs_consistency.common.errors import UserError
from rs_consistency.common.files import naming, parse_json, read_bytes, write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_LARGEST = 2**28  # bytes of the records: a million epochs


class MetricsWriter:
    """Appends one record for every epoch; records after the resumed epoch are dropped first.

    Loss and loss terms of a record are means over the epoch's steps. After an interruption within an epoch they are
    means over its steps since the checkpoint, the steps that this process made.
    """

    def __init__(self, workdir: Path, *, finished_steps: int, steps_per_epoch: int) -> None:
        """Opens the files of a run. Records after `finished_steps` will be written anew."""
        finished_epochs = finished_steps // steps_per_epoch
        self._path = workdir / METRICS_FILE
        kept = [line for line in read_lines(self._path) if line["epoch"] <= finished_epochs]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._folder = workdir / TENSORBOARD_FOLDER
        self._folder.mkdir(exist_ok=True)
        # The plain writer, not SummaryWriter: its thread and exit hook print tracebacks when the disk is full.
        self._tensorboard = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        # TensorBoard drops the scalars of an earlier part of the run from this step on.
        self._write_event(finished_steps + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; `step` and `epoch` are part of it."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        scalars = [(name, value) for name, value in record.items() if name not in ("step", "epoch")]
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._write_event(record["step"], summary=Summary(value=values))

    def _write_event(self, step: int, **content: Any) -> None:
        with naming(self._folder):
            self._tensorboard.write_event(Event(step=step, wall_time=time.time(), **content))
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        self._tensorboard.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, from names to numbers, without a last line that was cut.

    Raises:
      UserError: names the first line that is damaged.
    """
    if not path.exists():
        return []
    content, records = read_bytes(path, at_most=_LARGEST), []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            records.append(_record(parse_json(line)))
        except ValueError:
            shown = line[:40].decode("utf-8", errors="replace").strip()
            raise UserError(f"{path}, line {number} is damaged ({shown!r}); delete that line") from None
    return records


def _record(value: Any) -> dict[str, Any]:
    """Return the value of a line; raise a `ValueError` where it is no record."""
    of_numbers = isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
    if not of_numbers or type(value.get("epoch")) is not int or type(value.get("step", 0)) is not int:
        raise ValueError("no record")
    return value

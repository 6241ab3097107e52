"""The records of a training run: a line of `metrics.jsonl` and TensorBoard scalars for every epoch."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rs_consistency.common.errors import UserError, note
from rs_consistency.common.files import naming, read_json, replace_atomically, write_json

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Sums:
    """Sums of the metrics of some steps, added one after the other: an interruption does not change them."""

    def __init__(self, count: int = 0, totals: dict[str, float] | None = None) -> None:
        self.count = count
        self.totals = totals or {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of a step."""
        self.count += 1
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)

    def means(self) -> dict[str, float]:
        """The mean over the steps."""
        return {name: total / self.count for name, total in self.totals.items()}


class MetricsWriter:
    """Appends one record for every epoch; records after the resumed epoch are dropped first."""

    def __init__(self, workdir: Path, *, finished_steps: int, steps_per_epoch: int) -> None:
        """Opens the files of a run.

        Args:
          workdir: the run's folder.
          finished_steps: steps that the restored checkpoint contains; later records will be written anew.
          steps_per_epoch: a record is made after so many.
        """
        finished_epochs = finished_steps // steps_per_epoch
        self._path = workdir / METRICS_FILE
        self._part_path = workdir / "metrics_of_unfinished_epoch.json"
        self._steps_per_epoch = steps_per_epoch
        kept = [line for line in read_lines(self._path) if line["epoch"] <= finished_epochs]
        with replace_atomically(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._folder = workdir / TENSORBOARD_FOLDER
        self._folder.mkdir(exist_ok=True)
        # The plain writer, not SummaryWriter: its thread and exit hook print tracebacks when the disk is full.
        self._tensorboard = EventsWriter(str(self._folder / "events"), filename_suffix=f".{time.time_ns()}")
        # TensorBoard drops the scalars of an earlier part of the run from this step on.
        self._write_event(finished_steps + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; `step` and `epoch` are part of it."""
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        scalars = [(name, value) for name, value in record.items() if name not in ("step", "epoch")]
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars]
        self._write_event(record["step"], summary=Summary(value=values))

    def keep_part(self, step: int, sums: Sums) -> None:
        """Keeps the sums of an epoch's steps up to `step`, where a checkpoint is made within the epoch."""
        epoch = step // self._steps_per_epoch
        parts = {key: part for key, part in self._parts().items() if int(key) // self._steps_per_epoch == epoch}
        write_json(self._part_path, {**parts, str(step): {"count": sums.count, "totals": sums.totals}})

    def sums_of_part(self, step: int) -> Sums:
        """The sums that were kept at `step`. Where they were not, those of later steps alone make up the record."""
        if step % self._steps_per_epoch == 0:
            return Sums()
        part = self._parts().get(str(step))
        if part is not None:
            return Sums(part["count"], part["totals"])
        note(f"{self._part_path} does not hold the sums at step {step}; the epoch's record is of its later steps alone")
        return Sums()

    def _parts(self) -> dict[str, Any]:
        """Step -> the sums of its epoch up to there."""
        return read_json(self._part_path) if self._part_path.exists() else {}

    def _write_event(self, step: int, **content: Any) -> None:
        with naming(self._folder):
            self._tensorboard.write_event(Event(step=step, wall_time=time.time(), **content))
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._tensorboard.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off is left out, a damaged one a `UserError`."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1].splitlines()
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            record["epoch"] = int(record["epoch"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number} is damaged ({line[:40].strip()!r}); delete that line") from None
    return records

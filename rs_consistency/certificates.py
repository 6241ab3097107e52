"""The files of a certification: one line per image, and a record of how they were made.

`NAME.tsv` begins with the six columns that every tool of the field reads, then the counts:

| column | meaning |
|---|---|
| idx | number of the image in its split |
| label | true class |
| predict | certified class; -1: abstained |
| radius | certified l2 radius, rounded down; 0 when it abstained |
| correct | 1 when predict is label |
| time | h:mm:ss.ffffff spent on the image: the mean of those certified together, compilation included |
| count0 | votes for the selected class among the n0 that selected it |
| count | votes for it among the n further ones |
| count_runner_up | most votes of any other class among those n |
| selected | the selected class, also when it abstained |

`NAME.json` holds the settings, what was certified, and with what.
"""

import math
import os
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rs_consistency.certification import ABSTAIN, Certification
from rs_consistency.errors import UserError
from rs_consistency.files import lock, naming, read_json, write_json

FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
COUNT_COLUMNS = ("count0", "count", "count_runner_up", "selected")
HEADER = "\t".join((*FIELD_COLUMNS, *COUNT_COLUMNS)) + "\n"
_RADIUS_UNIT = Decimal("0.000001")


class Progress(NamedTuple):
    """What a certificate file holds already.

    Attributes:
      images: whole lines.
      radius_sum: sum of the written radius times correct over them.
      correct: lines with correct = 1.
      abstained: lines with predict = -1.
    """

    images: int
    radius_sum: float
    correct: int
    abstained: int

    @property
    def acr(self) -> float:
        """Average certified radius."""
        return self.radius_sum / self.images


class CertificateFile:
    """A `.tsv` that grows line by line, and its `.json`.

    What is in it survives a kill: whole lines are kept, a torn last one is cut off, and the next call with the same
    identity goes on behind them.
    """

    def __init__(self, path: Path, *, identity: dict[str, Any], about: dict[str, Any], indices: list[int]) -> None:
        """Opens or creates the files, and locks the `.tsv` until the process ends.

        Args:
          path: of the `.tsv`.
          identity: what the lines depend on; a file made with anything else is refused.
          about: what else to record, such as versions and device.
          indices: the image numbers, in the order of the lines.

        Raises:
          UserError: for a file with another identity (the differing keys are named), of another origin, or in use.
        """
        self.path, record_path = path, record_of(path)
        if not path.parent.is_dir():
            raise UserError(f"output={path}: its folder does not exist; create it, or choose another --output")
        if path.exists() and not path.is_file():
            raise UserError(f"output={path} is not a regular file; give the name of a .tsv file")
        self._file: BinaryIO = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        try:
            lock(self._file.fileno(), f"output={path}")
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            header = HEADER.encode()
            if header.startswith(content) or whole == header:  # new, or killed before the first image was done
                _check_replaceable(record_path)
                self._file.truncate(0)
                self._file.seek(0)
                write_json(record_path, {**identity, **about})
                self._write(HEADER)
                self.progress = Progress(0, 0.0, 0, 0)
            elif whole:
                self._check_record(record_path, identity, about)
                self.progress = _check_lines(path, whole.decode("utf-8", "replace"), indices)
                self._file.truncate(len(whole))
                self._file.seek(len(whole))
            else:
                raise UserError(f"{path} is not a certificate file; choose another --output")
        except BaseException:
            self._file.close()
            raise

    def append(self, indices: np.ndarray, labels: np.ndarray, result: Certification, seconds: float) -> None:
        """Adds a line for each image of a group, in one write.

        Args:
          indices: `[G]` image numbers.
          labels: `[G]` true classes.
          result: of those images.
          seconds: spent on each image, on average.
        """
        selected = result.counts0.argmax(axis=1)
        others = result.counts.copy()
        np.put_along_axis(others, selected[:, None], -1, axis=1)
        correct = result.prediction == labels
        radii = [format_radius(radius) for radius in result.radius]
        lines = []
        for i, index in enumerate(indices):
            columns = (
                index, labels[i], result.prediction[i], radii[i], int(correct[i]),
                format_time(seconds), result.counts0[i, selected[i]], result.counts[i, selected[i]],
                max(others[i].max(), 0), selected[i],
            )  # fmt: skip
            lines.append("\t".join(map(str, columns)) + "\n")
        self._write("".join(lines))
        before = self.progress
        self.progress = Progress(
            before.images + len(lines),
            before.radius_sum + sum(float(radius) for radius, right in zip(radii, correct, strict=True) if right),
            before.correct + int(correct.sum()),
            before.abstained + int((result.prediction == ABSTAIN).sum()),
        )

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        self._file.close()

    def _write(self, text: str) -> None:
        """Writes all or, as far as the disk allows, nothing: half a line is taken back."""
        start = self._file.tell()
        rest = memoryview(text.encode())
        try:
            with naming(self.path):
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise

    def _check_record(self, record_path: Path, identity: dict[str, Any], about: dict[str, Any]) -> None:
        if not record_path.is_file():
            raise UserError(f"{self.path} has no {record_path.name} that says how it was made; choose another --output")
        recorded = read_json(record_path)
        differing = [
            f"{key}: {recorded.get(key)!r} -> {value!r}"
            for key, value in identity.items()
            if recorded.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{self.path} was made with other settings ({'; '.join(differing)}); choose another --output,"
                " or delete it"
            )
        continued = recorded.setdefault("continued_with", [])
        here = {key: about[key] for key in ("device", "versions")}
        if here not in [{key: made.get(key) for key in here} for made in (recorded, *continued)]:
            write_json(record_path, {**recorded, "continued_with": [*continued, here]})


def record_of(path: Path) -> Path:
    """The `.json` beside a `.tsv`; a `UserError` for a file of another name, whose record others might share."""
    if path.suffix != ".tsv":
        raise UserError(f"output={path}: the name must end in .tsv; the record beside it ends in .json")
    return path.with_suffix(".json")


def _check_replaceable(record_path: Path) -> None:
    """A record of a certification without images may be replaced, a file of anything else not."""
    if record_path.exists() and "parameter_digest" not in read_json(record_path):
        raise UserError(f"{record_path} is there already and is no record of a certification; choose another --output")


def format_radius(radius: float) -> str:
    """Six decimals, rounded down: a printed radius never exceeds the certified one."""
    return str(Decimal(float(radius)).quantize(_RADIUS_UNIT, rounding=ROUND_FLOOR))


def format_time(seconds: float) -> str:
    """h:mm:ss.ffffff."""
    whole, micro = divmod(timedelta(seconds=seconds) // timedelta(microseconds=1), 1_000_000)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{micro:06d}"


def _check_lines(path: Path, text: str, indices: list[int]) -> Progress:
    """The progress in whole lines; a `UserError` when they are not those that this call would write."""
    header, *lines = text.splitlines()
    if header + "\n" != HEADER:
        raise UserError(f"{path} has the columns {header!r}, not those of this program; choose another --output")
    progress = Progress(0, 0.0, 0, 0)
    for number, line in enumerate(lines):
        columns = line.split("\t")
        try:
            index, predict, radius, correct = (
                int(columns[0]),
                int(columns[2]),
                float(columns[3]),
                int(columns[4]),
            )
            damaged = len(columns) != len(HEADER.split("\t")) or not 0 <= radius < math.inf or correct not in (0, 1)
        except (ValueError, IndexError):
            damaged = True
        if damaged or (number < len(indices) and index != indices[number]):
            raise UserError(
                f"{path}, line {number + 2}, is not what this program wrote ({line[:60]!r}); choose another --output,"
                " or delete the file from that line on"
            )
        progress = Progress(
            progress.images + 1,
            progress.radius_sum + radius * correct,
            progress.correct + correct,
            progress.abstained + (predict == ABSTAIN),
        )
    return progress

"""The one reader of certificate files: rows by image number, or columns as arrays."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rs_consistency.certificates.columns import CERTIFY, FIELD_COLUMNS, SCHEMAS, Row, Schema, seconds_of
from rs_consistency.certificates.record import Record, record_path
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import ABSTAIN

_NEEDED = {"idx": int, "label": int, "predict": int, "radius": float, "correct": int}
_WORDS = {int: "whole number", float: "number"}


class Table(NamedTuple):
    """A file of this program, with its record.

    Attributes:
      path: of the `.tsv`.
      record: content of the `.json`.
      rows: image number -> row, in the order of the lines; see `Schema.parse`.
      changed: whether the `.tsv` was changed after it was finished.
    """

    path: Path
    record: Record
    rows: dict[int, Row]
    changed: bool

    @property
    def missing(self) -> list[int]:
        """The images that it is to hold and does not."""
        return [index for index in self.record.selection.indices().tolist() if index not in self.rows]


class Certificates(NamedTuple):
    """The columns of any program's file, `[N]` each, N > 0; see `certificates.columns`.

    Attributes:
      idx: numbers of the images.
      label: true classes.
      predict: certified or predicted classes; -1 for abstention.
      radius: certified l2 radii, finite, float64.
      correct: 1 where predict is label, else 0.
      seconds: spent on each image, float64; NaN where the file has no time that can be read.
      mode: certify, decide or predict. A file of another program is one of certificates if it has radii.
    """

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    mode: str


def read_table(path: Path) -> Table:
    """Read a file of this program, and its record, without a lock. A torn last line is left out.

    Raises:
      UserError: when a file is missing or damaged, or this program does not write a line with that record.
    """
    beside = record_path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a certificate file")
    if not beside.is_file():
        raise UserError(f"{path} has no {beside.name} that says how it was made; give a file of certify.py")
    record, content = Record.read(beside), path.read_bytes()
    rows = parse_own(path, content[: content.rfind(b"\n") + 1], record.schema, record.selection)
    return Table(path, record, rows, record.is_changed(content))


def read_certificates(path: Path) -> Certificates:
    """Read the columns of any program's file, or of a workdir's; errors as for `read_rows` and `to_columns`."""
    path = certificate_path(path)
    return to_columns(path, *read_rows(path))


def read_rows(path: Path) -> tuple[Schema | None, dict[int, Row]]:
    """Read the rows of any program's file; also of a file that gzip packed.

    A file with the counts of a schema is one of this program's, and is read strictly. Other files need the columns of
    the field, `time` where there is one; their rows hold these alone.

    Returns:
      The schema, None for a file of another program, and image number -> row, at least one.

    Raises:
      UserError: naming the file and the line: a column is missing, a value is no number, a line is cut off or not one
        that this program writes, an image appears twice, or there is no line at all.
    """
    content = _read_bytes(path)
    text = content.decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise UserError(f"{path} is empty; certify some images, or leave it out")
    header, *lines = text.splitlines()
    names = header.split("\t")
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; the first line must be {list(FIELD_COLUMNS)}")
    if not any(lines):
        raise UserError(f"{path} has no images yet; certify some, or leave it out")
    schema = next((schema for schema in SCHEMAS.values() if set(schema.columns) <= set(names)), None)
    if schema is None:
        return None, _parse_field(path, names, lines)
    if not text.endswith("\n"):
        raise UserError(f"{path}: the last line is cut off; run certify.py again to complete it")
    return schema, parse_own(path, content, schema)


def parse_own(
    path: Path, content: bytes, schema: Schema, selection: Selection | None = None, *, ordered: bool = False
) -> dict[int, Row]:
    """Return the rows of whole lines of this program, by image number; the path is for messages.

    Only images of the selection, whatever its limit, may be there, and if `ordered`, only the first ones, in its order.

    Raises:
      UserError: naming the first line that this program did not write.
    """
    header, *lines = content.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if header + "\n" != schema.header:
        raise UserError(f"{path} has the columns {header!r}, not those of this program; use another file")
    order = selection.admitted().tolist() if selection else []
    admitted, rows = set(order), dict[int, Row]()
    for number, line in enumerate(lines):
        try:
            row = schema.parse(line)
            index = row["idx"]
            if index in rows:
                raise ValueError(f"image {index} for the second time")
            if selection and index not in admitted:
                raise ValueError(f"image {index} is none of those asked for")
            if ordered and index != order[number]:
                raise ValueError(f"image {order[number]} is missing")
        except ValueError as error:
            raise UserError(
                f"{path}, line {number + 2}, is not what this program wrote ({line[:60]!r}: {error}); delete the"
                " file from that line on and certify again, or use another"
            ) from None
        rows[index] = row
    return rows


def to_columns(path: Path, schema: Schema | None, rows: dict[int, Row]) -> Certificates:
    """Return the columns of the rows of a schema; a `UserError` with the path for the first value that cannot be."""
    columns = {name: np.asarray([row[name] for row in rows.values()]) for name in _NEEDED}
    columns["radius"] = columns["radius"].astype(np.float64)
    seconds = np.asarray([_seconds(row.get("time", "")) for row in rows.values()])
    table = Certificates(**columns, seconds=seconds, mode=schema.name if schema else CERTIFY.name)
    for column, bad, expected in (
        ("radius", ~np.isfinite(table.radius) | (table.radius < 0), "a finite number of at least 0"),
        ("predict", table.predict < ABSTAIN, "a class, or -1 for abstention"),
        ("correct", table.correct != (table.predict == table.label), "1 where predict is label, else 0"),
    ):
        if bad.any():
            image, value = table.idx[bad][0], getattr(table, column)[bad][0]
            raise UserError(f"{path}, image {image}: {column}={value}; expected {expected}")
    return table


def certificate_path(path: Path) -> Path:
    """Return the file of a workdir, or the path itself; a `UserError` when there is none."""
    if path.is_dir():
        inside = path / "certificates.tsv"
        if not inside.is_file():
            raise UserError(f"{path} has no certificates.tsv; make it: python certify.py --workdir={path}")
        return inside
    if not path.exists():
        raise UserError(f"{path} does not exist; give a workdir or a certificate file")
    return path


def _parse_field(path: Path, names: Sequence[str], lines: Sequence[str]) -> dict[int, Row]:
    """Return the rows of another program's file, by image number; empty lines are left out."""
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        cells, row = line.split("\t"), {}
        if len(cells) != len(names):
            raise UserError(f"{path}, line {number}: {len(cells)} columns instead of {len(names)}; is it cut off?")
        for name, kind in _NEEDED.items():
            text = cells[names.index(name)]
            try:
                row[name] = kind(text)
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: {name}={text!r} is not a {_WORDS[kind]}; repair the line"
                ) from None
        if "time" in names:
            row["time"] = cells[names.index("time")]
        if row["idx"] in rows:
            raise UserError(f"{path}, image {row['idx']}: idx={row['idx']}; expected every image once")
        rows[row["idx"]] = row
    return rows


def _seconds(time: str) -> float:
    """Return the seconds of a cell, h:mm:ss.ffffff or a number; NaN where it is neither."""
    try:
        seconds = seconds_of(time) if ":" in time else float(time)
    except ValueError:
        return math.nan
    return seconds if 0 <= seconds < math.inf else math.nan


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; restore it from a copy") from None

"""The one reader of certificate files: rows by image number, or columns as arrays.

Files of other programs are read as they are found: cells divided by tabs, commas or semicolons, spaces around cells,
`correct` as 1 or True, whole numbers as 7 or 7.0, further columns, and logs of predictions, which have no radii. Any
file may be packed with gzip (`.gz`). A packed file of this program has the same record and checks as the plain one.
"""

import codecs
import gzip
import io
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rs_consistency.certificates.columns import CERTIFY, FIELD_COLUMNS, PREDICT, SCHEMAS, Row, Schema, seconds_of
from rs_consistency.certificates.record import Record, json_beside, record_path, unpacked_path
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.checks import MAX_INDEX
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import ABSTAIN

_SEPARATORS = ("\t", ",", ";")
_PREDICT_LOG = {*FIELD_COLUMNS, "basePredict", ""} - {"radius"}  # all columns of the field's files of predictions
_TRUTH = {"true": "1", "false": "0"}
_MOST_BYTES = 2**27  # of a file, unpacked: ImageNet's 1.3 million training images have 100 million
_CHUNK = 2**20
_TRIES = 10  # of reading a file whose record changes
_HEADER = 4096  # bytes that hold the first line of every certificate file


class Table(NamedTuple):
    """A file of this program, with its record, whose images it holds.

    Attributes:
      path: of the `.tsv`.
      record: content of the `.json`.
      rows: image number -> row, in the order of the lines; see `Schema.parse`.
      changed: how the `.tsv` contradicts the record since it was finished, "" if it does not.
    """

    path: Path
    record: Record
    rows: dict[int, Row]
    changed: str

    @property
    def missing(self) -> int:
        """The number of images that it is to hold and does not."""
        return len(self.record.selection.images) - len(self.rows)


class Certificates(NamedTuple):
    """The columns of any program's file, `[N]` each, N > 0; see `certificates.columns`.

    Attributes:
      idx: numbers of the images.
      label: true classes.
      predict: certified or predicted classes; -1 for abstention.
      radius: certified l2 radii, finite, float64.
      correct: 1 where predict is label, else 0.
      seconds: spent on each image, float64; NaN where the file has no time that can be read.
      mode: certify, decide, predict or attack. A file of another program is one of certificates if it has radii.
    """

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    seconds: np.ndarray
    mode: str


def read_table(path: Path) -> Table:
    """Read a file of this program, packed or not, and its record, without a lock. A torn last line is left out.

    Raises:
      UserError: when a file is missing or damaged, or this program does not write a line with that record.
    """
    beside = record_path(unpacked_path(path))
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a certificate file")
    if not beside.is_file():
        raise UserError(f"{path} has no {beside.name} that says how it was made; give a file of certify.py")
    content, record = _read_with_record(path, beside)
    return _table(path, content, content[: content.rfind(b"\n") + 1], record)


def read_rows(path: Path) -> tuple[Schema | None, dict[int, Row], Table | None]:
    """Read the rows of any program's file; also of a file that gzip packed.

    A file with the counts of a schema is one of this program's, and is read strictly, by its record where there is one.
    Other files need the columns of the field; their rows hold these alone, without `time` and `radius` where the file
    has none.

    Returns:
      The schema, None for a file of another program; image number -> row, at least one; and the rows with their record,
      None where there is none.

    Raises:
      UserError: naming the file and the line: a column is missing, a value is no number, a line is cut off or not one
        that this program writes, an image appears twice, or there is no line at all. Or the record is damaged, or is
        the record of other images or of other columns.
    """
    content = _read_bytes(path)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path} is empty; certify some images, or leave it out")
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="replace")  # line by line, to save memory
    separator, names = _names(next(lines).rstrip("\n"))
    missing = _missing(names)
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; the first line must be {list(FIELD_COLUMNS)}")
    if not re.search(rb"[\r\n]", content.strip(b" \t\r\n,;")):
        raise UserError(f"{path} has no images yet; certify some, or leave it out")
    schemas = [schema for schema in SCHEMAS.values() if set(schema.older.columns) <= set(names)]
    schema = max(schemas, key=lambda schema: len(schema.older.columns), default=None)
    beside = unpacked_path(path).with_suffix(".json")
    if schema is None:
        if _recorded(path):
            raise UserError(f"{path} lacks the counts that its record {beside.name} is about; restore it from a copy")
        return None, _parse_field(path, separator, names, lines), None
    has_record = beside.is_file() and beside != path
    content, record = _read_with_record(path, beside) if has_record else (content, None)
    if not content.endswith(b"\n"):
        raise UserError(f"{path}: the last line is cut off; run certify.py again to complete it")
    if record is None:
        return schema, parse_own(path, content, schema), None
    if record.schema is not schema:
        raise UserError(
            f"{path} has the columns of mode={schema.name!r}, and {beside.name} is the record of"
            f" mode={record.schema.name!r}; restore them from a copy"
        )
    table = _table(path, content, content, record)
    return schema, table.rows, table


def _read_with_record(path: Path, beside: Path) -> tuple[bytes, Record]:
    """Return a file and its record, read until the record stays as it is: another process may finish the file."""
    record = Record.read(beside)
    for _ in range(_TRIES):
        content, before = _read_bytes(path), record
        record = Record.read(beside)
        if record.content == before.content:
            break
    return content, record


def _table(path: Path, content: bytes, lines: bytes, record: Record) -> Table:
    return Table(path, record, parse_own(path, lines, record.schema, record.selection), record.change(content))


def parse_own(
    path: Path, content: bytes, schema: Schema, selection: Selection | None = None, *, ordered: bool = False
) -> dict[int, Row]:
    """Return the rows of whole lines of this program, by image number; the path is for messages.

    Only images of the selection may be there, and if `ordered`, only the first ones, in its order.

    Raises:
      UserError: naming the first line that this program did not write.
    """
    lines = (line.decode("utf-8", "replace").removesuffix("\n") for line in io.BytesIO(content))
    header = next(lines, "")
    written = schema.of_header(header + "\n")
    if written is None:
        raise UserError(f"{path} has the columns {header!r}, not those of this program; use another file")
    asked, rows = selection.images if selection else range(MAX_INDEX + 1), dict[int, Row]()
    for number, line in enumerate(lines):
        try:
            row = written.parse(line)
            index = row["idx"]
            if index in rows:
                raise ValueError(f"image {index} for the second time, first in line {list(rows).index(index) + 2}")
            if index not in asked:
                raise ValueError(f"image {index} is none of those asked for")
            if ordered and index != asked[number]:
                raise ValueError(f"image {asked[number]} is missing")
        except ValueError as error:
            raise UserError(
                f"{path}, line {number + 2}, is not what this program wrote ({line[:60]!r}: {error}); delete the"
                " file from that line on and certify again, or use another"
            ) from None
        rows[index] = row
    return rows


def to_columns(path: Path, schema: Schema | None, rows: dict[int, Row]) -> Certificates:
    """Return the columns of the rows of a schema; a `UserError` with the path for the first value that cannot be."""
    whole = {name: np.asarray([row[name] for row in rows.values()]) for name in ("idx", "label", "predict", "correct")}
    table = Certificates(
        **whole,
        radius=np.asarray([float(row.get("radius", 0)) for row in rows.values()]),
        seconds=np.asarray([_seconds(row.get("time", "")) for row in rows.values()]),
        mode=(schema or (CERTIFY if all("radius" in row for row in rows.values()) else PREDICT)).name,
    )
    right = (table.predict == table.label) & (table.predict != ABSTAIN)
    for column, bad, expected in (
        ("radius", ~np.isfinite(table.radius) | (table.radius < 0), "a finite number of at least 0"),
        ("predict", table.predict < ABSTAIN, "a class, or -1 for abstention"),
        ("correct", table.correct != right, "1 where predict is label, else 0"),
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


def certificate_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or all certificate files of a folder that is no workdir.

    Certificate files are known by their first line. They are in the order of their names. Folders inside are left out,
    and a packed file beside the same file unpacked.

    Raises:
      UserError: for a folder without any.
    """
    if not path.is_dir() or (path / "certificates.tsv").is_file():
        return [path]
    files = [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".json" and _has_header(file)
    ]
    files = [file for file in files if file == unpacked_path(file) or unpacked_path(file) not in files]
    if not files:
        raise UserError(
            f"{path} has no certificates.tsv, nor any other file of certificates; make it:"
            f" python certify.py --workdir={path}"
        )
    return files


def standing(path: Path) -> tuple[bool | None, str]:
    """Return whether a file of this program, which `proof.load` read, is finished, and a sentence about it, or "".

    Of a packed file the unpacked content counts. The answer is None for a file of another program, and where there is
    no record.
    """
    file = certificate_path(path)
    try:
        content = json_beside(file)
        record = Record.from_json(unpacked_path(file).with_suffix(".json"), content) if content else None
    except UserError as error:
        return None, f"{path} is read without the file beside it: {error}"
    if record:
        if record.finished is not None:
            return True, ""
        done, wanted = _read_bytes(file).count(b"\n") - 1, len(record.selection.images)
        fault = f"is not finished: {done} of {wanted} images; certify.py with the same settings completes it"
        return False, f"{path} {fault}"
    names = _names(_first_line(file))[1]
    if any(set(schema.older.columns) <= set(names) for schema in SCHEMAS.values()):
        beside = unpacked_path(file).with_suffix(".json").name
        return None, f"{path} has no {beside} beside it: nothing shows that its lines follow from its counts"
    return None, ""


def _recorded(path: Path) -> bool:
    """Return whether the file beside a file is a record, damaged or not, as far as it can be read as JSON."""
    try:
        return bool(json_beside(path))
    except UserError:
        return False  # any other program's file may have any file beside it; `standing` names it


def _has_header(path: Path) -> bool:
    """Return whether a file begins as a file of certificates does; a file that cannot be unpacked does not."""
    try:
        return not _missing(_names(_first_line(path))[1])
    except UserError:
        return False


def _first_line(path: Path) -> str:
    return next(iter(_read_bytes(path, _HEADER).decode("utf-8-sig", errors="replace").splitlines()), "")


def _names(header: str) -> tuple[str, list[str]]:
    """Return what divides the cells of a first line, and the names in it."""
    found = [(separator, [cell.strip() for cell in header.split(separator)]) for separator in _SEPARATORS]
    return max(found, key=lambda each: -len(_missing(each[1])))


def _missing(names: Sequence[str]) -> list[str]:
    """Return the columns that a file with these names lacks. A log of predictions needs no radius."""
    optional = {"time", "radius"} if set(names) <= _PREDICT_LOG else {"time"}
    return [name for name in FIELD_COLUMNS if name not in names and name not in optional]


def _parse_field(path: Path, separator: str, names: Sequence[str], lines: Iterable[str]) -> dict[int, Row]:
    """Return the rows of the lines behind the first of another program's file, by image number, without empty lines."""
    places = {name: names.index(name) for name in FIELD_COLUMNS if name in names}
    rows, lines_of = dict[int, Row](), dict[int, int]()
    for number, line in enumerate(lines, start=2):
        cells = line.rstrip("\n").split(separator) if line.strip() else ()
        if not any(map(str.strip, cells)):
            continue
        if len(cells) != len(names):
            raise UserError(f"{path}, line {number}: {len(cells)} columns instead of {len(names)}; is it cut off?")
        row = {name: cells[place].strip() for name, place in places.items()}
        for name, text in row.items():
            try:
                row[name] = text if name == "time" else float(text) if name == "radius" else _whole(name, text)
            except ValueError:
                kind = "number" if name == "radius" else "whole number"
                raise UserError(f"{path}, line {number}: {name}={text!r} is not a {kind}; repair the line") from None
        index = row["idx"]
        if row["predict"] == ABSTAIN and row["correct"]:
            raise UserError(
                f"{path}, line {number}: correct={row['correct']}, but predict=-1 is never correct; write 0"
            )
        if index in rows:
            raise UserError(
                f"{path}, line {number}: image {index} for the second time, first in line {lines_of[index]}"
            )
        rows[index], lines_of[index] = row, number
    return rows


def _whole(name: str, text: str) -> int:
    """Return the whole number of a cell; a ValueError where it has none."""
    number = float(_TRUTH.get(text.lower(), text) if name == "correct" else text)
    if "_" in text or not number.is_integer() or abs(number) > MAX_INDEX:
        raise ValueError(text)
    return int(number)


def _seconds(time: str) -> float:
    """Return the seconds of a cell, h:mm:ss.ffffff or a number; NaN where it is neither."""
    try:
        seconds = seconds_of(time) if ":" in time else float(time)
    except ValueError:
        return math.nan
    return seconds if 0 <= seconds < math.inf else math.nan


def _read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file, which may be a pipe, unpacked; or its first bytes.

    Raises:
      UserError: for a file that cannot be unpacked, or has more bytes than certificates have.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            if most is not None:
                return file.read(most)
            chunks = iter(partial(file.read, _CHUNK), b"")
            content = b"".join(itertools.islice(chunks, _MOST_BYTES // _CHUNK + 1))
    except (OSError, EOFError, zlib.error) as error:
        if not packed:
            raise
        raise UserError(f"{path} cannot be unpacked: {error}; restore it from a copy") from None
    if len(content) > _MOST_BYTES:
        raise UserError(
            f"{path} {'unpacks to' if packed else 'has'} more than {_MOST_BYTES:,} bytes, too many for certificates;"
            " give a part of it"
        )
    return content

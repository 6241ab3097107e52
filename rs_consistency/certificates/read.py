"""The files of a certification, read: a line per image. `certificates.columns` says what is in a line."""

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.columns import CERTIFY, FIELD_COLUMNS, SCHEMAS, Row, Schema
from rs_consistency.certificates.record import check_record, is_as_finished, record_of
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.statistics.bounds import ABSTAIN


class Progress(NamedTuple):
    """What a certificate file holds already.

    Attributes:
      images: whole lines.
      radius_sum: sum of the written radius times correct over them.
      correct: lines with correct = 1.
      abstained: lines with predict = -1.
    """

    images: int = 0
    radius_sum: float = 0.0
    correct: int = 0
    abstained: int = 0

    @property
    def acr(self) -> float:
        """Average certified radius."""
        return self.radius_sum / self.images

    def plus(self, rows: Iterable[Row]) -> "Progress":
        """With more lines."""
        images, radius_sum, correct, abstained = self
        for row in rows:
            images += 1
            radius_sum += float(row["radius"]) * row["correct"]
            correct += row["correct"]
            abstained += row["predict"] == ABSTAIN
        return Progress(images, radius_sum, correct, abstained)


class Table(NamedTuple):
    """A certificate file that was read, with its record.

    Attributes:
      path: of the `.tsv`.
      record: the content of its `.json`.
      schema: what the lines are.
      selection: the images that it is to hold; None for one made before records said so.
      rows: image number -> row, in the order of the lines; see `Schema.parse`.
      changed: whether the `.tsv` was changed after it was finished.
    """

    path: Path
    record: dict[str, Any]
    schema: Schema
    selection: Selection | None
    rows: dict[int, Row]
    changed: bool

    @property
    def missing(self) -> list[int]:
        """The images that it is to hold and does not."""
        wanted = [] if self.selection is None else self.selection.indices().tolist()
        return [index for index in wanted if index not in self.rows]


def read_table(path: Path) -> Table:
    """Reads a certificate file of this program, and its record, without locking it; a torn last line is left out.

    Raises:
      UserError: when one is not there or damaged, or a line is not one that this program writes with that record.
    """
    record_path = record_of(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a certificate file")
    if not record_path.is_file():
        raise UserError(f"{path} has no {record_path.name} that says how it was made; give a file of certify.py")
    record = read_json(record_path)
    if "parameter_digest" in record and "mode" not in record:  # of the first version
        record = {"mode": "certify", "bound": "clopper_pearson", **record}
    if not isinstance(record.get("mode"), str) or record["mode"] not in SCHEMAS:
        raise UserError(f"{record_path} is no record of a certification that this version knows; give another file")
    check_record(record_path, record)
    schema = SCHEMAS[record["mode"]]
    try:
        selection = Selection.of_record(record) if "split_size" in record else None
    except (UserError, KeyError) as error:
        raise UserError(f"{record_path} is damaged: {error}; restore it from a copy") from None
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = read_lines(path, whole, schema, None if selection is None else selection.admitted(), finished=False)
    changed = "finished" in record and not is_as_finished(path, record, content)
    return Table(path, record, schema, selection, rows, changed)


def read_lines(
    path: Path, content: bytes, schema: Schema, admitted: np.ndarray | None, *, finished: bool
) -> dict[int, Row]:
    """The rows in whole lines, by image number.

    Args:
      path: where they are from, for messages.
      content: header and lines.
      schema: what the lines must be.
      admitted: the image numbers that may be there, ascending; None for any.
      finished: whether the lines must be the first of `admitted`, in order.

    Raises:
      UserError: naming the first line that cannot be.
    """
    header, *lines = content.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if header + "\n" != schema.header:
        raise UserError(f"{path} has the columns {header!r}, not those of this program; use another file")
    order = None if admitted is None else admitted.tolist()
    allowed = None if order is None else set(order)
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines):
        reason = ""
        try:
            row = schema.parse(line)
        except ValueError:
            reason = "damaged"
        else:
            index = row["idx"]
            if index in rows:
                reason = f"image {index} for the second time"
            elif allowed is not None and index not in allowed:
                reason = f"image {index} is none of those asked for"
            elif finished and order is not None and index != order[number]:
                reason = f"image {order[number]} is missing"
        if reason:
            raise UserError(
                f"{path}, line {number + 2}, is not what this program wrote ({line[:60]!r}: {reason}); delete the"
                " file from that line on and certify again, or use another"
            )
        rows[index] = row
    return rows


def in_order(content: bytes) -> bytes:
    """A table, of whole lines, with its lines in the order of idx."""
    header, *lines = content.removesuffix(b"\n").split(b"\n")
    return b"\n".join([header, *sorted(lines, key=lambda line: int(line.split(b"\t", 1)[0]))]) + b"\n"


_NEEDED = {"idx": int, "label": int, "predict": int, "radius": float, "correct": int}
_WORDS = {int: "whole number", float: "number"}


class Counts(NamedTuple):
    """The columns that certify.py adds; `[N]` each.

    Attributes:
      count0: votes for the selected class among the n0 that selected it.
      count: votes for it among the n further ones.
      count_runner_up: most votes of any other class among those n.
      selected: the selected class, also when it abstained.
    """

    count0: np.ndarray
    count: np.ndarray
    count_runner_up: np.ndarray
    selected: np.ndarray


class Certificates(NamedTuple):
    """The columns of a certificate file; `[N]` each, N > 0.

    Attributes:
      idx: image numbers.
      label: true classes.
      predict: certified classes, -1 for abstention.
      radius: certified radii, finite and at least 0.
      correct: whether the prediction is the label.
      counts: the votes behind them; None for a file without these columns.
    """

    idx: np.ndarray
    label: np.ndarray
    predict: np.ndarray
    radius: np.ndarray
    correct: np.ndarray
    counts: Counts | None = None


def certificate_path(path: Path) -> Path:
    """The file of a workdir, or the path itself; a `UserError` when there is none."""
    if path.is_dir():
        inside = path / "certificates.tsv"
        if not inside.is_file():
            raise UserError(f"{path} has no certificates.tsv; make it: python certify.py --workdir={path}")
        return inside
    if not path.exists():
        raise UserError(f"{path} does not exist; give a workdir or a certificate file")
    return path


def read_certificates(path: Path) -> Certificates:
    """Reads a certificate file, or that of a workdir; also one that gzip packed.

    Raises:
      UserError: naming the file and the line: a column is missing, a value is no number, a radius is NaN, infinite or
        negative, `correct` contradicts the prediction, an image appears twice, or there is no line at all.
    """
    path = certificate_path(path)
    text = _read_bytes(path).decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise UserError(f"{path} is empty; certify some images, or leave it out")
    header, *lines = text.splitlines()
    names = header.split("\t")
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; the first line must be {list(FIELD_COLUMNS)}")
    if not any(lines):
        raise UserError(f"{path} has no images yet; certify some, or leave it out")
    counted = set(CERTIFY.columns) <= set(names)
    if any(set(schema.columns) <= set(names) for schema in SCHEMAS.values()) and not text.endswith("\n"):
        raise UserError(f"{path}: the last line is cut off; run certify.py again to complete it")

    kinds = _NEEDED | dict.fromkeys(CERTIFY.columns if counted else (), int)
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    places = {name: names.index(name) for name in kinds}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        values = line.split("\t")
        if len(values) != len(names):
            raise UserError(f"{path}, line {number}: {len(values)} columns instead of {len(names)}; is it cut off?")
        for name, kind in kinds.items():
            text_value = values[places[name]]
            try:
                columns[name].append(kind(text_value))
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: {name}={text_value!r} is not a {_WORDS[kind]}; repair the line"
                ) from None
    table = Certificates(
        **{name: np.asarray(columns[name]) for name in _NEEDED},
        counts=Counts(*(np.asarray(columns[name]) for name in CERTIFY.columns)) if counted else None,
    )
    _check(path, table)
    return table


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; restore it from a copy") from None


def _check(path: Path, table: Certificates) -> None:
    def refuse(bad: np.ndarray, column: str, expected: str) -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            value = getattr(table, column)[first]
            raise UserError(f"{path}, image {table.idx[first]}: {column}={value}; expected {expected}")

    refuse(~np.isfinite(table.radius) | (table.radius < 0), "radius", "a finite number of at least 0")
    refuse(table.predict < ABSTAIN, "predict", "a class, or -1 for abstention")
    refuse((table.correct != (table.predict == table.label)), "correct", "1 where predict is label, else 0")
    _, first = np.unique(table.idx, return_index=True)
    repeated = np.ones(len(table.idx), bool)
    repeated[first] = False
    refuse(repeated, "idx", "every image once")

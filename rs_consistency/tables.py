"""The files of a certification, read: one line per image, and a record of how they were made.

`NAME.tsv` holds a line per image; `rs_consistency.rows` says what is in it. `NAME.json`, the record, holds

| key | meaning |
|---|---|
| mode | certify, decide or predict: which columns the `.tsv` has |
| the settings, data_digest, parameter_digest, ... | what the lines depend on: the identity |
| skip, split_size, shard | which images of the split: of every skip-th, the share of shard "2/5"; null: all |
| identity | the names of the keys above |
| max | how many images the file, or all shards together, are to hold |
| device, versions, code_version, code_digest, git_commit, ... | what else was recorded when the first line was made |
| continued_with | the same of calls that went on with another device, other versions or other code |
| finished | once every image is there: when, how many, and the SHA-256 of the `.tsv` |
| shards | of a merged file: what the shards' records say beside the identity |
"""

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.rows import SCHEMAS, Row, Schema
from rs_consistency.shards import Selection
from rs_consistency.statistics.bounds import ABSTAIN

# Of a record: what may differ between the calls that write one file, and is then listed under `continued_with`.
PROVENANCE = ("device", "versions", "code_version", "code_digest", "git_commit")
_CHANGES_VOTES = ("device", "code_digest")  # beside the versions


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


def check_record(path: Path, record: dict[str, Any]) -> None:
    """Raises a `UserError` for a record whose parts are not of the kind that this program writes."""

    def are(kind: type, values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(value, kind) for value in values)

    places = [record, *record["shards"]] if are(dict, record.get("shards")) else [record]
    good = {
        "identity": are(str, record.get("identity", [])),
        "shards": are(dict, record.get("shards", [])),
        "continued_with": all(are(dict, place.get("continued_with", [])) for place in places),
        "versions": all(isinstance(place.get("versions", {}), dict) for place in places),
        "finished": isinstance(record.get("finished", {}), dict),
    }
    if "finished" in record and good["finished"]:
        good["finished"] = isinstance(record["finished"].get("images"), int)
    damaged = [name for name, fine in good.items() if not fine]
    if damaged:
        raise UserError(f"{path} is damaged: {', '.join(damaged)} cannot be; restore it from a copy")


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


def record_of(path: Path) -> Path:
    """The `.json` beside a `.tsv`; a `UserError` for a file of another name, whose record others might share."""
    if path.suffix != ".tsv":
        raise UserError(f"output={path}: the name must end in .tsv; the record beside it ends in .json")
    return path.with_suffix(".json")


def provenances(record: dict[str, Any]) -> list[dict[str, Any]]:
    """With what a file was made, by its record: every device, with versions and code; of a merged file, all shards'."""
    made = [record] if "device" in record else []
    for part in record.get("shards", []):
        made += provenances(part)
    return [{key: place.get(key) for key in PROVENANCE} for place in [*made, *record.get("continued_with", [])]]


def differing_places(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What differs between two provenances and can change a vote: "device", "code_digest", "jax" and so on."""
    names = [key for key in _CHANGES_VOTES if here.get(key) != there.get(key)]
    mine, theirs = (place.get("versions") or {} for place in (here, there))
    return names + [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]


def in_order(content: bytes) -> bytes:
    """A table, of whole lines, with its lines in the order of idx."""
    header, *lines = content.removesuffix(b"\n").split(b"\n")
    return b"\n".join([header, *sorted(lines, key=lambda line: int(line.split(b"\t", 1)[0]))]) + b"\n"


def finished_entry(content: bytes) -> dict[str, Any]:
    """What the record of a finished table says of it."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": at, "images": content.count(b"\n") - 1, "sha256": _sha256(content)}


def check_replaceable(record_path: Path) -> None:
    """A record of a certification without images may be replaced, a file of anything else not."""
    if record_path.exists() and "parameter_digest" not in read_json(record_path):
        raise UserError(f"{record_path} is there already and is no record of a certification; choose another --output")


def is_as_finished(path: Path, record: dict[str, Any], content: bytes) -> bool:
    """Whether a table is the one of which the record says that it is finished."""
    entry = record["finished"]
    if not isinstance(entry, dict) or not {"images", "sha256"} <= entry.keys():
        raise UserError(f"{record_of(path)} is damaged: finished={entry!r}; restore it from a copy")
    return entry["sha256"] == _sha256(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

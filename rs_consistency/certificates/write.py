"""The files of a certification, written; `rs_consistency.certificates.record` says what is in them."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rs_consistency.certificates.columns import SCHEMAS, Row, Schema
from rs_consistency.certificates.read import Progress, in_order, read_lines
from rs_consistency.certificates.record import (
    PROVENANCE,
    check_record,
    check_replaceable,
    differing_places,
    finished_entry,
    is_as_finished,
    provenances,
    record_of,
)
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import lock, naming, read_json, replace_atomically, write_json


class CertificateFile:
    """A `.tsv` that grows line by line, in any order, and its `.json`.

    What is in it survives a kill: whole lines are kept, a torn last one is cut off, and the next call with the same
    identity goes on with the images that are missing.

    Attributes:
      path: of the `.tsv`.
      schema: what its lines are.
      progress: what it holds.
      done: the image numbers that it holds.
    """

    def __init__(
        self,
        path: Path,
        *,
        schema: Schema,
        identity: dict[str, Any],
        about: dict[str, Any],
        selection: Selection,
    ) -> None:
        """Opens or creates the files, and locks the `.tsv` until it is closed, or the process ends.

        Args:
          path: of the `.tsv`.
          schema: what its lines are.
          identity: what the lines depend on beside mode and selection, in values that JSON keeps; a file made with
            anything else is refused.
          about: what else to record: `PROVENANCE`, and more. A `command` is that of the last call that added lines.
          selection: the images that it is to hold. It may hold more, from a call with a greater `most`.

        Raises:
          UserError: for a file with another identity (the differing keys are named), of another origin, or in use; for
            lines of other images, or twice of one; for a finished file that was changed.
        """
        self.path, self._record_path, self.schema = path, record_of(path), schema
        self._wanted = set(selection.indices().tolist())
        identity = _identity(schema, identity, selection)
        self._record = {**identity, "identity": list(identity), "max": selection.size, **about}
        _check_place(path)
        new, content = not path.exists(), b""
        self._file = _open_locked(path)
        try:
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            rows: dict[int, Row] = {}
            if _is_empty(content):
                # New, or killed before the first image was done.
                check_replaceable(self._record_path)
                self._file.truncate(0)
                self._file.seek(0)
                write_json(self._record_path, self._record)
                self._write(schema.header)
            elif whole:
                recorded, rows = _answers(path, whole, schema, identity, selection)
                self._go_on(recorded, about, selection, rows.keys())
                self._file.truncate(len(whole))
                self._file.seek(len(whole))
            else:
                raise _not_a_table(path)
            self.done = set(rows)
            self.progress = Progress().plus(rows.values())
        except BaseException:
            if new and not content:  # nothing is left of a file that could not be begun
                path.unlink(missing_ok=True)
            self._file.close()
            raise

    @property
    def remaining(self) -> np.ndarray:
        """`[B]` the images of the selection that it does not hold yet, int64, ascending."""
        return np.asarray(sorted(self._wanted - self.done), np.int64)

    def append(self, rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> None:
        """Adds a line for each row, in one write; see `Schema.line`.

        Raises:
          ValueError: for an image that it holds already or is not to hold, or a value that its column cannot hold.
        """
        lines = [self.schema.line(row) for row in rows]
        parsed = [self.schema.parse(line[:-1]) for line in lines]
        new = [row["idx"] for row in parsed]
        if len(set(new)) < len(new) or not self._wanted.issuperset(new) or not self.done.isdisjoint(new):
            raise ValueError(f"images {new}: not each one that the file lacks, once")
        self._write("".join(lines))
        self.done.update(new)
        self.progress = self.progress.plus(parsed)

    def finish(self) -> None:
        """Puts the lines in the order of idx and, when every image is there, records that and the table's digest.

        A kill leaves the old table or the new one; the next call finishes again.
        """
        self._file.seek(0)
        content = self._file.read()
        ordered = in_order(content)
        if ordered != content:
            self._replace(ordered)
        whole = self.done == set(Selection.of_record(self._record).indices().tolist())
        if whole and "finished" not in self._record:
            self._record["finished"] = finished_entry(ordered)
            write_json(self._record_path, self._record)

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        self._file.close()

    def _write(self, text: str) -> None:
        """Writes all or, as far as the disk allows, nothing: half a line is taken back."""
        start = self._file.tell()
        try:
            with naming(self.path):
                _write_all(self._file, text.encode())
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def _replace(self, content: bytes) -> None:
        """Replaces the table by a new file, which is locked before it has the name: nobody comes in between."""
        target = Path(os.path.realpath(self.path))  # of a link, what it points to
        new = None
        try:
            with replace_atomically(target) as temporary:
                new = _open(temporary, os.O_TRUNC)
                lock(new.fileno(), f"output={temporary}")
                os.fchmod(new.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
                _write_all(new, content)
        except BaseException:
            if new is not None:
                new.close()
            raise
        self._file.close()
        self._file = new

    def _go_on(
        self, recorded: dict[str, Any], about: dict[str, Any], selection: Selection, done: Iterable[int]
    ) -> None:
        """Brings the record up to date before lines are added."""
        self._record = record = dict(recorded)
        done = set(done)
        if done <= self._wanted:  # else the file is to hold more than this call asks for
            record["max"] = selection.size
        if not done >= set(Selection.of_record(record).indices().tolist()):
            record.pop("finished", None)
        if not done >= self._wanted:
            here = {key: about[key] for key in PROVENANCE if key in about}
            if all(differing_places(here, place) for place in provenances(record)):
                record["continued_with"] = [*record.get("continued_with", []), here]
            if "command" in about:
                record["command"] = about["command"]
        if record != recorded:
            write_json(self._record_path, record)


def check_answers(path: Path, *, schema: Schema, identity: dict[str, Any], selection: Selection) -> set[int]:
    """The image numbers that a file holds, if a `CertificateFile` could be opened there; writes nothing.

    Args:
      path: of the `.tsv`; it need not be there.
      schema: as of `CertificateFile`; so are the others.
      identity: of the answers.
      selection: the images that it is to hold.

    Raises:
      UserError: as `CertificateFile`, except for a file in use.
    """
    record_path = record_of(path)
    _check_place(path)
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if _is_empty(content):
        check_replaceable(record_path)
        return set()
    if not whole:
        raise _not_a_table(path)
    return set(_answers(path, whole, schema, _identity(schema, identity, selection), selection)[1])


def _identity(schema: Schema, identity: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """All that the lines depend on."""
    return {"mode": schema.name, **identity, **selection.identity()}


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"output={path}: its folder does not exist; create it, or choose another --output")
    if path.exists() and not path.is_file():
        raise UserError(f"output={path} is not a regular file; give the name of a .tsv file")


def _is_empty(content: bytes) -> bool:
    """Whether a file is new, or was left by a kill before the first image was done."""
    headers = [kind.header.encode() for kind in SCHEMAS.values()]
    return content[: content.rfind(b"\n") + 1] in headers or any(header.startswith(content) for header in headers)


def _not_a_table(path: Path) -> UserError:
    return UserError(f"{path} is not a certificate file; choose another --output")


def _answers(
    path: Path, whole: bytes, schema: Schema, identity: dict[str, Any], selection: Selection
) -> tuple[dict[str, Any], dict[int, Row]]:
    """The record of a table with lines, and the lines; a `UserError` where they are not of this identity."""
    recorded = _read_record(path, identity)
    rows = read_lines(path, whole, schema, selection.admitted(), finished="finished" in recorded)
    _check_unchanged(path, recorded, whole, len(rows))
    return recorded, rows


def _read_record(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The record beside a table; a `UserError` when it is not one of this identity."""
    record_path = record_of(path)
    if not record_path.is_file():
        raise UserError(f"{path} has no {record_path.name} that says how it was made; choose another --output")
    recorded = read_json(record_path)
    check_record(record_path, recorded)
    missing = [key for key in (*identity, "max") if key not in recorded]
    if missing:
        raise UserError(
            f"{path} was made by another version of this program ({record_path.name} lacks"
            f" {', '.join(missing)}); choose another --output, or delete it"
        )
    differing = [f"{key}: {recorded[key]!r} -> {value!r}" for key, value in identity.items() if recorded[key] != value]
    if differing:
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing)}); choose another --output, or delete it"
        )
    return recorded


def _check_unchanged(path: Path, record: dict[str, Any], content: bytes, images: int) -> None:
    """A finished table may have lost its last lines, which are made again; anything else is a change."""
    if "finished" in record and not is_as_finished(path, record, content) and images >= record["finished"]["images"]:
        raise UserError(
            f"{path} was changed after it was finished (its SHA-256 is not the one in {record_of(path).name});"
            " restore it from a copy, or delete it"
        )


def _open_locked(path: Path) -> BinaryIO:
    """Opens or creates a file and locks it; what was replaced between the two is opened again."""
    while True:
        file = _open(path)
        try:
            lock(file.fileno(), f"output={path}")
            if _has_name(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _open(path: Path, flags: int = 0) -> BinaryIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666), "r+b", buffering=0)


def _has_name(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is what the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write_all(file: BinaryIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())

"""The writer of certificate files: line by line, through kills, alone in a file; see `certificates.record`."""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rs_consistency.certificates.columns import SCHEMAS, Row, Schema
from rs_consistency.certificates.read import parse_own
from rs_consistency.certificates.record import OF_NOISE, PROVENANCE, Record, differing_provenance, record_path
from rs_consistency.certificates.selection import Selection
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import check_output, lock, naming, read_json, replace_atomically, write_json
from rs_consistency.statistics.bounds import ABSTAIN


class Progress(NamedTuple):
    """Sums over the lines of a certificate file; `radius_sum` is the sum of the written radius times correct."""

    images: int = 0
    radius_sum: float = 0.0
    correct: int = 0
    abstained: int = 0

    @property
    def acr(self) -> float:
        """Average certified radius."""
        return self.radius_sum / self.images

    def plus(self, rows: Iterable[Row]) -> "Progress":
        """Return the sums with these rows added."""
        added = [(1, float(row["radius"]) * row["correct"], row["correct"], row["predict"] == ABSTAIN) for row in rows]
        return Progress(*map(sum, zip(self, *added, strict=True)))


class CertificateFile:
    """A `.tsv` that grows line by line, in any order, and its `.json`.

    Whole lines survive a kill. The next call with the same identity cuts off a torn line, and goes on.

    Attributes:
      path: of the `.tsv`.
      schema: the kind of its lines, with the columns that the file began with.
      progress: sums over its lines.
      done: the image numbers that it holds.
    """

    def __init__(
        self, path: Path, *, schema: Schema, identity: dict[str, Any], about: dict[str, Any], selection: Selection
    ) -> None:
        """Open or create the files, and lock the `.tsv` until it is closed or the process ends.

        The identity is whatever the lines depend on beside mode and selection, in values that JSON keeps. `about` holds
        the further entries of the record: `PROVENANCE`, and more. Each call that adds lines replaces its `command`. The
        file may hold more than the selection, from a call with a greater `most`.

        Raises:
          UserError: for a file with another identity (the differing keys are named), of another origin, or in use; for
            lines of other images, or twice of one; for a finished file that was changed.
        """
        self.path, self.schema = path, schema
        self._record = _new_record(path, schema, identity, selection, **about)
        self._wanted = set(selection.images)
        new, content = not path.exists(), b""
        self._file = _open_locked(path)
        try:
            content = self._file.read()
            held = _held(path, content, self._record)
            rows = held[1] if held else {}
            self.done, self.progress = set(rows), Progress().plus(rows.values())
            if held:
                whole = content[: content.rfind(b"\n") + 1]
                self.schema = schema.of_header(whole[: whole.index(b"\n") + 1].decode())
                self._go_on(held[0], whole)
                self._file.truncate(len(whole))
                self._file.seek(0, os.SEEK_END)
            else:
                self._file.truncate(0)
                self._file.seek(0)
                self._write_record()
                self._write(schema.header)
        except BaseException:
            if new and not content:  # nothing is left of a file that could not be begun
                path.unlink(missing_ok=True)
            self._file.close()
            raise

    @property
    def remaining(self) -> np.ndarray:
        """`[B]`, the images of the selection that it lacks, int64, ascending."""
        return np.asarray(sorted(self._wanted - self.done), np.int64)

    def append(self, rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> None:
        """Add a line for each row, in one write; see `Schema.line`.

        Raises:
          ValueError: for an image that it holds already or is not to hold, or a value that a column cannot hold.
          UserError: when another process removed or replaced the file.
        """
        self._check_place()
        lines = [self.schema.line(row) for row in rows]
        parsed = [self.schema.parse(line[:-1]) for line in lines]
        new = [row["idx"] for row in parsed]
        if len(set(new)) < len(new) or not self._wanted.issuperset(new) or not self.done.isdisjoint(new):
            raise ValueError(f"images {new}: not each one that the file lacks, once")
        self._write("".join(lines))
        self.done.update(new)
        self.progress = self.progress.plus(parsed)

    def finish(self) -> None:
        """Put the lines in the order of idx. When every image is there, record that with the digest of the table.

        A kill leaves the old table or the new one; the next call finishes again.

        Raises:
          UserError: when another process removed or replaced the file or its record.
        """
        self._check_place()
        self._file.seek(0)
        content = self._file.read()
        ordered = self.schema.text(parse_own(self.path, content, self.schema).values()).encode()
        if ordered != content:
            self._replace(ordered)
        self._check_record()
        if self._record.finished is None and self.done == set(self._record.selection.images):
            self._record = self._record.finish(ordered)
            self._write_record()
        self._check_place()

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._file.close()

    def _check_place(self) -> None:
        """Raise a `UserError` when the path names another file than the open one: lines would go nowhere."""
        if not (self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())):
            raise UserError(
                f"output={self.path} was removed or replaced by another process while it was written; run the same"
                " command again for the images that are lost"
            )

    def _check_record(self) -> None:
        """Write the record anew where it was removed; raise a `UserError` where another process replaced it."""
        path, content = self._record.path, json.loads(json.dumps(self._record.to_json()))
        if not path.exists():
            self._write_record()
        elif Record.read(path).to_json() != content:
            raise UserError(
                f"{path} was replaced by another process while {self.path.name} was written; move both away, and run"
                " the same command again"
            )

    def _go_on(self, recorded: Record, table: bytes) -> None:
        """Bring the record of a table up to date before lines are added."""
        mine, content, selection = self._record, recorded.to_json(), recorded.selection
        if self.done <= self._wanted:  # else the file is to hold more than this call asks for
            selection = mine.selection
            content["max"] = selection.most
        if recorded.change(table) or not self.done.issuperset(selection.images):
            content.pop("finished", None)
        if not self.done >= self._wanted:
            here = {key: mine.content[key] for key in PROVENANCE if key in mine.content}
            if all(differing_provenance(here, entry) for entry in recorded.provenances()):
                content["continued_with"] = [*content.get("continued_with", []), here]
            if "command" in mine.content:
                content["command"] = mine.content["command"]
        self._record = Record.from_json(recorded.path, content)
        if content != recorded.content:
            self._write_record()

    def _write_record(self) -> None:
        write_json(self._record.path, self._record.to_json())

    def _write(self, text: str) -> None:
        """Write all or, as far as the disk allows, nothing: half a line is taken back."""
        start = self._file.tell()
        try:
            with naming(self.path):
                _write_all(self._file, text.encode())
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def _replace(self, content: bytes) -> None:
        """Replace the table by a new file, which is locked before it gets the name, so that nobody comes in between."""
        target = Path(os.path.realpath(self.path))  # a link stays, and its target is replaced
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


def check_answers(path: Path, *, schema: Schema, identity: dict[str, Any], selection: Selection) -> set[int]:
    """Return the image numbers that a file holds, if a `CertificateFile` could be opened there; write nothing.

    Arguments and errors as for `CertificateFile`, but a file may be in use.
    """
    record = _new_record(path, schema, identity, selection)
    held = _held(path, path.read_bytes() if path.exists() else b"", record)
    return set(held[1]) if held else set()


def check_replaceable(path: Path) -> None:
    """Raise a `UserError` for a `.json` that is there and is no record, of whatever version of this program."""
    if path.exists() and "parameter_digest" not in read_json(path):
        raise UserError(f"{path} is there already and is no record of a certification; choose another --output")


def _new_record(path: Path, schema: Schema, identity: dict[str, Any], selection: Selection, **about: Any) -> Record:
    beside, bound = record_path(path), {"mode": schema.name, **identity, **selection.identity()}
    check_output(path)
    return Record.from_json(beside, {**bound, "identity": list(bound), "max": selection.size, **about})


def _held(path: Path, content: bytes, wanted: Record) -> tuple[Record, dict[int, Row]] | None:
    """Return the record and the rows of a file that the wanted lines may go into; None for a file without images."""
    whole, beside = content[: content.rfind(b"\n") + 1], wanted.path
    headers = [each.header.encode() for schema in SCHEMAS.values() for each in (schema, schema.older)]
    if whole in headers or any(header.startswith(content) for header in headers):
        check_replaceable(beside)
        return None  # new, or left by a kill before the first image was done
    if not whole:
        raise UserError(f"{path} is not a certificate file; choose another --output")
    if not beside.is_file():
        raise UserError(f"{path} has no {beside.name} that says how it was made; choose another --output")
    record = Record.read(beside)
    differing = record.differences(wanted.identity)
    if differing:
        remedy, keys, made = "delete it", {text.partition(":")[0] for text in differing}, record.settings
        if keys <= {*OF_NOISE, "alpha_share"}:  # an earlier version had no choice
            noise = f" --sampler={made.sampler} --precision={made.precision}" if keys & {*OF_NOISE} else ""
            share = f" --alpha_share={made.alpha_share}" if "alpha_share" in keys else ""
            remedy = f"continue it with{noise}{share}"
        raise UserError(
            f"{path} was made with other settings ({'; '.join(differing)}); choose another --output, or {remedy}"
        )
    rows = parse_own(path, whole, record.schema, record.selection, ordered=record.finished is not None)
    # A finished table may have lost its last lines, which are made again.
    change = record.change(whole)
    if change and len(rows) >= record.content["finished"]["images"]:
        raise UserError(f"{path} was changed after it was finished ({change}); restore it from a copy, or delete it")
    return record, rows


def _open_locked(path: Path) -> BinaryIO:
    """Open or create a file and lock it; a file that was replaced between the two is opened again."""
    while True:
        file = _open(path)
        try:
            lock(file.fileno(), f"output={path}")
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


def _open(path: Path, flags: int = 0) -> BinaryIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666), "r+b", buffering=0)


def _write_all(file: BinaryIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())

"""What a certificate file says: ACR, accuracies, abstention.

Reads the field's format: tab-separated, with at least the columns idx, label, predict, radius and correct, whoever
wrote it. Source of the measures: Cohen, Rosenfeld, Kolter (ICML 2019); Zhai et al. (ICLR 2020) for ACR.
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.common.errors import UserError
from rs_consistency.rows import CERTIFY, FIELD_COLUMNS, SCHEMAS
from rs_consistency.statistics.bounds import ABSTAIN

DEFAULT_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
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


def acr(table: Certificates) -> float:
    """Average certified radius: the mean of radius times correct; abstentions and errors count 0."""
    return float(np.mean(table.radius * table.correct))


def certified_accuracy(table: Certificates, radius: float) -> float:
    """The share of images predicted correctly with a certified radius of at least `radius`."""
    return float(np.mean((table.radius >= radius) & (table.correct == 1)))


def summarize(path: Path, table: Certificates, radii: Sequence[float] = DEFAULT_RADII) -> dict[str, Any]:
    """The measures of one file, as `analyze.py --format=json` prints them.

    Args:
      path: where the table comes from, as the user named it.
      table: from `read_certificates`.
      radii: at which to give the certified accuracy.

    Returns:
      `path`, `n_images`, `acr`, `accuracy` (correct, at any radius), `abstention` (share), and `certified_accuracy`, a
      map from radius (as text, such as "0.25") to share.
    """
    return {
        "path": str(path),
        "n_images": len(table.idx),
        "acr": acr(table),
        "accuracy": certified_accuracy(table, 0.0),
        "abstention": float(np.mean(table.predict == ABSTAIN)),
        "certified_accuracy": {f"{radius:.10g}": certified_accuracy(table, radius) for radius in radii},
    }

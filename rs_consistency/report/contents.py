"""The contents of a report: certificate files with the records beside them, and comparisons of two files."""

import itertools
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rs_consistency.certificates.alarms import alarms, beside, differences
from rs_consistency.certificates.columns import ATTACK, CERTIFY, Row, format_radius
from rs_consistency.certificates.proof import Evidence
from rs_consistency.certificates.read import Certificates, certificate_path
from rs_consistency.certificates.record import Record, content_beside, record_path, unpacked_path
from rs_consistency.common.errors import UserError
from rs_consistency.common.files import read_json
from rs_consistency.common.progress import progress_bar
from rs_consistency.statistics.bounds import ABSTAIN
from rs_consistency.statistics.intervals import Interval, PairedDifference, bootstrap_interval, paired_difference

_NAMED = 5  # images that gained most, and as many that lost most


class Subject(NamedTuple):
    """A file of certificates.

    Attributes:
      label: short name in tables and figures.
      path: as the user named it.
      certificates: its lines.
      evidence: the votes behind the lines; None for a file of another program.
      record: of certify.py; empty for a file of another program.
      config: of the training; empty where it is not known.
      metrics: a dictionary for each epoch; empty outside a run's folder.
      workdir: folder of the run around the file; None where there is none.
      attacks: image number -> row of the `attacks.tsv` beside it, if that is about the same smoothed classifier.
      interval: 95 % bootstrap interval of the ACR over images; None for a single image, and without an ACR.
      notes: errors of the files that could not be read, and whether the certificates are unfinished or changed since, a
        line each.
    """

    label: str
    path: Path
    certificates: Certificates
    evidence: Evidence | None
    record: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    workdir: Path | None
    attacks: dict[int, Row]
    interval: Interval | None
    notes: list[str]

    def setting(self, key: str) -> Any:
        """Return the value of the config at a dotted key, None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def attacked(self) -> list[tuple[float, float, str]]:
        """Return certified radius, distance of the attack, and alarm or "", for each attacked image with a certificate.

        The distance is infinite where no attack was proven.
        """
        table = self.certificates
        certified = {
            int(index): {"predict": int(predict), "radius": Decimal(format_radius(radius))}
            for index, predict, radius in zip(table.idx, table.predict, table.radius, strict=True)
            if predict != ABSTAIN and index in self.attacks
        }
        found = {index: f"image {index}: {text}" for index, text in alarms(certified, self.attacks).items()}
        return [
            (float(row["radius"]), float(self.attacks[index]["distance"]), found.get(index, ""))
            for index, row in certified.items()
        ]


class Comparison(NamedTuple):
    """Two subjects on the M images that both have.

    Attributes:
      first: label.
      second: label.
      difference: of radius times correct, `first` minus `second`.
      images: `[M]`, numbers of the images.
      labels: `[M]`, true classes.
      radii: `[2, M]`, radius times correct of `first` and `second`.
    """

    first: str
    second: str
    difference: PairedDifference
    images: np.ndarray
    labels: np.ndarray
    radii: np.ndarray

    def order(self) -> np.ndarray:
        """Return the positions `[M]` of the images, the largest gain first."""
        return np.argsort(self.radii[1] - self.radii[0], kind="stable")

    def gained(self) -> list[int]:
        """Return the positions of at most five images that gained most, the largest gain first."""
        return [int(place) for place in self.order()[:_NAMED] if self.radii[0, place] > self.radii[1, place]]

    def lost(self) -> list[int]:
        """Return the positions of at most five images that lost most, the largest loss first."""
        return [int(place) for place in self.order()[::-1][:_NAMED] if self.radii[0, place] < self.radii[1, place]]


def subject(label: str, path: Path, certificates: Certificates, evidence: Evidence | None, fault: str = "") -> Subject:
    """Read the files beside a certificate file. A file that is missing or damaged leaves its field empty.

    Only a record of certify.py counts as a record: another program's file may have any file beside it. The fault of the
    file itself is from `read.standing`.
    """
    file, notes, metrics = certificate_path(path), [fault] if fault else [], []
    record = _read(file, [], content_beside)  # the fault names a damaged record
    config = _read(file.parent / "config.json", notes)
    workdir = file.parent if config else None
    if workdir:
        from rs_consistency.training.metrics import METRICS_FILE, read_lines  # TensorBoard's writer, slow to import

        metrics = _read(workdir / METRICS_FILE, notes, read_lines) or []
    elif isinstance(record.get("config"), dict):
        config = record["config"]
    radii = certificates.radius * certificates.correct
    interval = bootstrap_interval(radii) if len(radii) > 1 and certificates.mode == CERTIFY.name else None
    attacks = _read(file, notes, _attacks) if record and certificates.mode == CERTIFY.name else {}
    return Subject(label, path, certificates, evidence, record, config, metrics, workdir, attacks, interval, notes)


def compare(subjects: Sequence[Subject]) -> tuple[list[Comparison], list[str]]:
    """Return the comparison of every two subjects on their common images, and a line for each two without one.

    Only certificates are compared. A line names each subject of another mode.
    """
    found, apart, certified = [], [], []
    for one in subjects:
        mode = one.certificates.mode
        if mode == CERTIFY.name:
            certified.append(one)
        else:
            apart.append(f"{one.label} has no ACR, no curves and no images: its mode is {mode}, not {CERTIFY.name}")
    pairs = list(itertools.combinations(certified, 2))
    for one, other in progress_bar("comparing", len(pairs), unit="pair", brief=True, iterable=pairs):
        common, mine, theirs = np.intersect1d(one.certificates.idx, other.certificates.idx, return_indices=True)
        labels = one.certificates.label[mine]
        data = {str(each.record["data_digest"]) for each in (one, other) if "data_digest" in each.record}
        if len(data) > 1 or not np.array_equal(labels, other.certificates.label[theirs]):
            apart.append(f"{one.label} and {other.label} are not compared: their images are not the same")
        elif len(common) < 2:
            apart.append(f"{one.label} and {other.label} are not compared: {len(common)} common images, 2 are needed")
        else:
            tables = ((one.certificates, mine), (other.certificates, theirs))
            radii = np.stack([table.radius[places] * table.correct[places] for table, places in tables])
            found.append(Comparison(one.label, other.label, paired_difference(*radii), common, labels, radii))
    return found, apart


def _attacks(path: Path) -> dict[int, Row]:
    """Return the rows of the attacks beside a certificate file, by image number."""
    attacks = beside(path, ATTACK)
    if attacks is None or differences(Record.read(record_path(unpacked_path(path))), attacks.record):
        return {}
    return attacks.rows


def _read(path: Path, notes: list[str], read: Callable[[Path], Any] = read_json) -> Any:
    """Return the content of a file; {} where there is no file, or, with a note, where it is damaged."""
    try:
        return read(path) if path.is_file() else {}
    except UserError as error:
        notes.append(str(error))
        return {}

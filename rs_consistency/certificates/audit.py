"""The audit of a certificate file: some lines drawn again, and all lines computed again, and proven, from their counts.

The votes of an image are a function of seed, image number, sigma and the parameters, so an honest line comes out the
same, count for count. Rounding in the model can decide near-ties differently on another device or with other versions.
The report says when that may be so, and never calls such a line reproduced.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.certificates.columns import Row
from rs_consistency.certificates.exact_lines import unproven
from rs_consistency.certificates.proof import contradictions
from rs_consistency.certificates.read import Table
from rs_consistency.certificates.record import differing_provenance
from rs_consistency.common.checks import decimal_value, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import upper_confidence_bound

_COUNTS = ("count0", "count", "count_runner_up", "count_label", "votes")
_ERROR = 0.05  # error probability of the statement about the lines that were not drawn


class Report(NamedTuple):
    """The result of an audit.

    Attributes:
      drawn: number of lines drawn again.
      reproduced: number of these that came out the same, and follow from their counts.
      proven: number of lines of the file whose counts prove them, see `exact_lines`.
      total: number of lines of the file.
      problems: image number -> the faults of its line; also of lines that were not drawn.
      file_problems: faults of the file as a whole.
      notes: possible reasons of a difference, and images that are missing.
      largest_difference: of any count of a drawn line, in votes.
    """

    drawn: int
    reproduced: int
    proven: int
    total: int
    problems: dict[int, str]
    file_problems: list[str]
    notes: list[str]
    largest_difference: int

    @property
    def ok(self) -> bool:
        """Return whether the audit found no fault."""
        return not self.problems and not self.file_problems and self.reproduced == self.drawn

    def text(self) -> str:
        """Return a line for each problem and note, then a summary line."""
        lines = [f"image {index}: {problem}" for index, problem in sorted(self.problems.items())]
        lines += [*self.file_problems, *(f"note: {each}" for each in self.notes)]
        summary = f"{self.reproduced} of {self.drawn} lines reproduce"
        if self.largest_difference:
            summary += f", largest difference {self.largest_difference} votes"
        if self.ok and self.drawn < self.total:
            share = math.ceil(1000 * upper_confidence_bound(0, self.drawn, _ERROR)) / 1000
            summary += f"; of all {self.total}, at most {share:.1%} do not, with {1 - _ERROR:.0%} confidence"
        of_all = f"all {self.total}" if self.proven == self.total else f"{self.proven} of {self.total}"
        return "\n".join([*lines, f"{summary}; {of_all} are proven in whole numbers"])


def choose_lines(table: Table, k: int, seed: int | None = None) -> np.ndarray:
    """Return the image numbers of k lines of a file, drawn at random: `[min(k, N)]`, int64, ascending.

    Guarantee: if a share q of the lines does not reproduce, then all k chosen lines do with probability at most
    (1 - q) ** k, provided that the file was made without knowing the seed. For None, nobody knew it before.

    Raises:
      UserError: for a k or seed outside its range, or a file without lines.
    """
    k = whole_number("verify", k, at_least=1)
    seed = secrets.randbits(64) if seed is None else whole_number("verify_seed", seed, at_least=0)
    if not table.rows:
        raise UserError(f"{table.path} has no images yet; certify some first")
    chosen = np.random.default_rng(seed).choice(list(table.rows), min(k, len(table.rows)), replace=False)
    return np.sort(chosen).astype(np.int64)


def check_binding(table: Table, given: Mapping[str, Any]) -> None:
    """Raise a `UserError` when model or data are not those of the record: then nothing can be drawn again.

    `given` are keys of the record, such as `parameter_digest`, with their values here. The message names those that the
    record lacks, or that differ.
    """
    record = table.record
    missing = [key for key in given if key not in record.identity]
    if missing:
        raise UserError(f"{record.path} lacks {', '.join(missing)}: what it was made from is not known; certify again")
    differing = record.differences(given)
    if differing:
        raise UserError(
            f"{record.path} was made from something else ({'; '.join(differing)}); give the workdir and data that it"
            " names"
        )


def compare(
    table: Table,
    redrawn: Sequence[Row],
    here: Mapping[str, Any],
    *,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
) -> Report:
    """Compare lines with those drawn again, and every line of the file with its own counts, which must prove it, too.

    Args:
      table: the file; `check_binding` accepts model and data.
      redrawn: fresh rows of some of its images, from `question.answer`; their time is ignored.
      here: the `PROVENANCE` of the fresh rows.
      labels: `[N]`, true classes of the images in the order of the lines; None where they are not known.
      num_classes: number of classes; None where it is not known.
    """
    record, largest = table.record, 0
    settings, problems = record.settings, contradictions(table)
    faults = unproven(record.schema, settings, table.rows.values(), alpha=decimal_value(settings.alpha))
    for index, text in faults.items():
        if problems.get(index) != text:  # counts that cannot be
            problems[index] = f"{problems[index]}; {text}" if index in problems else text
    drawn = {fresh["idx"] for fresh in redrawn}
    for row, label in zip(table.rows.values(), _listed(labels, len(table.rows)), strict=True):
        index, classes = row["idx"], {name: row[name] for name in ("predict", "selected", "adversarial") if name in row}
        texts = [f"{name} {value} is no class" for name, value in classes.items() if value >= (num_classes or math.inf)]
        if label not in (None, row["label"]) and index not in drawn:
            texts.append(f"label {row['label']}, in the dataset {label}")
        if texts:
            problems[index] = "; ".join([*filter(None, [problems.get(index)]), *texts])
    for fresh in redrawn:
        index, old = fresh["idx"], table.rows[fresh["idx"]]
        names = [name for name in old if name != "time" and old[name] != fresh[name]]
        if names:
            text = ", ".join(f"{name} {old[name]}, drawn again {fresh[name]}" for name in names)
            problems[index] = f"{problems[index]}; {text}" if index in problems else text
        largest = max([largest, *(abs(old[name] - fresh[name]) for name in names if name in _COUNTS)])
    changed = f"{table.path} was changed after it was finished: {table.changed}"
    return Report(
        drawn=len(redrawn),
        reproduced=sum(fresh["idx"] not in problems for fresh in redrawn),
        proven=len(table.rows) - len(faults),
        total=len(table.rows),
        problems=problems,
        file_problems=[changed] if table.changed else [],
        notes=_notes(table, here),
        largest_difference=largest,
    )


def _listed(labels: ArrayLike | None, size: int) -> list[int | None]:
    return [None] * size if labels is None else np.asarray(labels).tolist()


def _notes(table: Table, here: Mapping[str, Any]) -> list[str]:
    notes = []
    others = [entry for entry in table.record.provenances() if differing_provenance(here, entry)]
    if others:
        names = sorted({name for entry in others for name in differing_provenance(here, entry)})
        notes.append(
            f"made with another {', '.join(names)} ({_described(others[0])}) than drawn again now ({_described(here)}):"
            " rounding can decide near-ties between classes differently, or change the last digit of a radius"
        )
    if table.missing:
        size = table.missing + len(table.rows)
        notes.append(f"the file is not finished: it holds {len(table.rows)} of {size} images")
    return notes


def _described(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('device')}, jax {(entry.get('versions') or {}).get('jax')}"

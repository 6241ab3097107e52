"""Whether a certificate file says what its model does: some lines drawn again, all lines computed again.

The votes of an image are a function of seed, image number, sigma and the parameters, so a line that was made honestly
comes out the same, count for count. Rounding in the model can decide near-ties differently on another device or
with other versions; the report says when that may be so, and never calls such a line reproduced.
"""

import math
import secrets
from typing import Any, NamedTuple

import numpy as np

from rs_consistency import noise
from rs_consistency.certificates.columns import (
    CERTIFIED,
    CERTIFY,
    DECIDE,
    PREDICT,
    WORDS,
    Row,
    decided_radius,
    format_radius,
)
from rs_consistency.certificates.read import Table
from rs_consistency.certificates.record import differing_places, provenances, record_of
from rs_consistency.common.checks import number_from, probability, whole_number
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.certify import ABSTAIN
from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import certify_votes, drawn_sigma, p_value_of, upper_confidence_bound

_COUNTS = ("count0", "count", "count_runner_up", "votes")
_ERROR = 0.05  # error probability of the statement about the lines that were not drawn


class Report(NamedTuple):
    """What an audit found.

    Attributes:
      drawn: lines drawn again.
      reproduced: those of them that came out the same, and follow from their counts.
      total: lines of the file.
      problems: image number -> what is wrong with its line; also of lines that were not drawn.
      file_problems: what is wrong with the file as a whole.
      notes: what to know when reading it.
      largest_difference: of any count of a drawn line, in votes.
    """

    drawn: int
    reproduced: int
    total: int
    problems: dict[int, str]
    file_problems: list[str]
    notes: list[str]
    largest_difference: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: for the exit status."""
        return not self.problems and not self.file_problems and self.reproduced == self.drawn

    def text(self) -> str:
        """A line for each problem and note, then a summary line."""
        lines = [f"image {index}: {problem}" for index, problem in sorted(self.problems.items())]
        lines += [*self.file_problems, *(f"note: {each}" for each in self.notes)]
        summary = f"{self.reproduced} of {self.drawn} lines reproduce"
        if self.largest_difference:
            summary += f", largest difference {self.largest_difference} votes"
        if self.ok and self.drawn < self.total:
            share = math.ceil(1000 * upper_confidence_bound(0, self.drawn, _ERROR)) / 1000
            summary += f"; of all {self.total}, at most {share:.1%} do not, with {1 - _ERROR:.0%} confidence"
        return "\n".join([*lines, summary])


def choose_lines(table: Table, k: int, seed: int | None = None) -> np.ndarray:
    """Draws k lines of a file at random; all, when it has no more.

    Guarantee: if a share q of the lines does not reproduce, then all k chosen ones do with probability at most
    (1 - q) ** k, provided that the file was made without knowing the seed.

    Args:
      table: from `read_table`.
      k: how many, at least 1.
      seed: of the choice; None for one that nobody knew before.

    Returns:
      `[min(k, N)]` image numbers, int64, ascending.

    Raises:
      UserError: for a k or seed outside its range, or a file without lines.
    """
    k = whole_number("verify", k, at_least=1)
    seed = secrets.randbits(64) if seed is None else whole_number("verify_seed", seed, at_least=0)
    if not table.rows:
        raise UserError(f"{table.path} has no images yet; certify some first")
    chosen = np.random.default_rng(seed).choice(list(table.rows), min(k, len(table.rows)), replace=False)
    return np.sort(chosen).astype(np.int64)


def check_binding(table: Table, given: dict[str, Any]) -> None:
    """Whether model and data are those that the record names; without them nothing can be drawn again.

    Args:
      table: from `read_table`.
      given: keys of the record, such as `parameter_digest` and `data_digest`, and what was found for them.

    Raises:
      UserError: naming the keys that the record lacks, or that differ.
    """
    record = record_of(table.path)
    missing = [key for key in given if key not in table.record]
    if missing:
        raise UserError(f"{record} lacks {', '.join(missing)}: what it was made from is not known; certify again")
    differing = [
        f"{key}: {table.record[key]!r} -> {value!r}" for key, value in given.items() if table.record[key] != value
    ]
    if differing:
        raise UserError(
            f"{record} was made from something else ({'; '.join(differing)}); give the workdir and data that it names"
        )


def compare(table: Table, redrawn: list[Row], here: dict[str, Any]) -> Report:
    """Compares lines with those drawn again, and every line of the file with its own counts.

    Args:
      table: from `read_table`; model and data as `check_binding` wants them.
      redrawn: fresh rows of some of its images, from `question.answer`; their time is not looked at.
      here: device, versions and code that they were drawn with: `PROVENANCE`.

    Returns:
      The report.

    Raises:
      UserError: when the record lacks a setting, or one is outside its range.
    """
    found: dict[int, list[str]] = {index: [] for index in table.rows}
    for index, problem in _contradictions(table):
        found[index].append(problem)
    largest, drawn = 0, [row["idx"] for row in redrawn]
    for fresh in redrawn:
        # As it would be written, so that radii and p-values are compared as they stand in the file.
        fresh, old = table.schema.parse(table.schema.line(fresh)[:-1]), table.rows[fresh["idx"]]
        names = [name for name in old if name != "time" and old[name] != fresh[name]]
        if names:
            found[fresh["idx"]].append(", ".join(f"{name} {old[name]}, drawn again {fresh[name]}" for name in names))
        largest = max([largest, *(abs(old[name] - fresh[name]) for name in names if name in _COUNTS)])
    problems = {index: "; ".join(texts) for index, texts in found.items() if texts}
    file_problems = []
    if table.changed:
        record_name = record_of(table.path).name
        file_problems.append(
            f"{table.path} was changed after it was finished: its SHA-256 is not the one in {record_name}"
        )
    return Report(
        drawn=len(drawn),
        reproduced=sum(index not in problems for index in drawn),
        total=len(table.rows),
        problems=problems,
        file_problems=file_problems,
        notes=_notes(table, here),
        largest_difference=largest,
    )


def _notes(table: Table, here: dict[str, Any]) -> list[str]:
    """What may explain a difference, and what the file does not hold."""
    notes = []
    places = [place for place in provenances(table.record) if differing_places(here, place)]
    if places:
        names = sorted({name for place in places for name in differing_places(here, place)})
        notes.append(
            f"made with another {', '.join(names)} ({_place(places[0])}) than drawn again now ({_place(here)}):"
            " rounding can decide near-ties between classes differently, or change the last digit of a radius"
        )
    if table.missing:
        size = len(table.missing) + len(table.rows)
        notes.append(f"the file is not finished: it holds {len(table.rows)} of {size} images")
    return notes


def _place(place: dict[str, Any]) -> str:
    return f"{place.get('device')}, jax {(place.get('versions') or {}).get('jax')}"


def _contradictions(table: Table) -> list[tuple[int, str]]:
    """The lines, of all of them, that do not follow from their own counts: image number and what is wrong."""
    rows, check = list(table.rows.values()), _CHECKS[table.schema.name]
    found = [(row["idx"], "correct is not whether predict is label") for row in rows if _wrongly_correct(row)]
    return found + (check(table.record, rows) if rows else [])


def _wrongly_correct(row: Row) -> bool:
    return row["correct"] != (row["predict"] == row["label"])


def _check_certified(record: dict[str, Any], rows: list[Row]) -> list[tuple[int, str]]:
    """Predictions and radii must be what the recorded bound gives."""
    n0, n = _numbers_of_votes(record)
    fields = ("idx", "count0", "count", "count_runner_up", "selected")
    index, count0, count, runner_up, selected = (np.asarray([row[name] for row in rows]) for name in fields)
    possible = (count0 <= n0) & (count + runner_up <= n)
    count, runner_up = np.where(possible, count, 0), np.where(possible, runner_up, 0)
    proven, radius = _conclusions(record, index, count, runner_up)
    prediction = np.where(proven, selected, ABSTAIN)
    found = []
    for row, can_be, predict, exact in zip(rows, possible, prediction.tolist(), radius.tolist(), strict=True):
        if not can_be:
            found.append((row["idx"], f"its counts cannot be with n0={n0} and n={n}"))
        elif row["predict"] != predict:
            found.append((row["idx"], f"predict {row['predict']}, its counts give {predict}"))
        elif str(row["radius"]) != format_radius(exact):
            found.append((row["idx"], f"radius {row['radius']}, its counts give {format_radius(exact)}"))
    return found


def _numbers_of_votes(record: dict[str, Any]) -> tuple[int, int]:
    """n0 and n."""
    n0, n = (whole_number(name, _recorded(record, name), at_least=1) for name in ("n0", "n"))
    return n0, n


def _check_decided(record: dict[str, Any], rows: list[Row]) -> list[tuple[int, str]]:
    """Decisions must be those of the test at the recorded votes; where certified, the selected class at the radius."""
    radius = number_from("radius", _recorded(record, "radius"), at_least=0)
    at, (n0, n) = format_radius(decided_radius(radius)), _numbers_of_votes(record)
    sigma, alpha = drawn_sigma(_recorded(record, "sigma")), _recorded(record, "alpha")
    look_every = whole_number("look_every", _recorded(record, "look_every"), at_least=1)
    found = []
    for row in rows:
        expected = (row["selected"], at) if row["decision"] == CERTIFIED else (ABSTAIN, format_radius(0.0))
        looked = row["votes"] == n or (0 < row["votes"] < n and row["votes"] % look_every == 0)
        if not (looked and row["count"] <= row["votes"] and row["count0"] <= n0):
            found.append((row["idx"], f"its counts cannot be with n0={n0} and n={n}"))
            continue
        decided = sequential.decide(row["count"], row["votes"], radius=radius, sigma=sigma, alpha=alpha)
        if WORDS[int(decided)] != row["decision"] or (decided == sequential.UNDECIDED and row["votes"] < n):
            found.append((row["idx"], f"decision {row['decision']} does not follow from its votes"))
        elif (row["predict"], str(row["radius"])) != expected:
            found.append((row["idx"], f"predict or radius is not that of a decision {row['decision']} at {at}"))
    return found


def _check_predicted(record: dict[str, Any], rows: list[Row]) -> list[tuple[int, str]]:
    """A prediction where the test rejects, and never a radius."""
    alpha = probability("alpha", _recorded(record, "alpha"))
    n = whole_number("n", _recorded(record, "n"), at_least=1)
    found = []
    for row in rows:
        if not (row["count_runner_up"] <= row["count"] and 1 <= row["count"] + row["count_runner_up"] <= n):
            found.append((row["idx"], f"its counts cannot be with n={n}"))
            continue
        exact = float(p_value_of(row["count"], row["count_runner_up"]))
        if not math.isclose(row["p_value"], exact, rel_tol=1e-9, abs_tol=1e-300):
            found.append((row["idx"], f"p_value {row['p_value']}, its counts give {exact}"))
            continue
        if (row["predict"] == ABSTAIN) != (row["p_value"] > alpha):
            found.append((row["idx"], f"predict {row['predict']} does not follow from its p_value at alpha={alpha}"))
        elif row["radius"]:
            found.append((row["idx"], "a prediction has no radius"))
    return found


_CHECKS = {CERTIFY.name: _check_certified, DECIDE.name: _check_decided, PREDICT.name: _check_predicted}


def _conclusions(
    record: dict[str, Any], indices: np.ndarray, count: np.ndarray, runner_up: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether something is certified, and the radius, `[G]` each, at the recorded settings."""
    n, alpha, sigma, bound = (_recorded(record, name) for name in ("n", "alpha", "sigma", "bound"))
    uniform = noise.bound_uniform(_recorded(record, "seed"), indices) if bound == "randomized" else None
    found = certify_votes(count, runner_up, n, alpha=alpha, sigma=sigma, bound=bound, uniform=uniform)
    return found.certified, found.radius


def _recorded(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise UserError(f"the record lacks {name}: how the file was made is not known; certify again")
    return record[name]

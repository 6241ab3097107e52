"""The lines of certificate files: the columns of each kind of file, how a line is written, and read back strictly.

Every file begins with the six columns that every tool of the field reads:

| column | meaning |
|---|---|
| idx | number of the image in its split |
| label | true class |
| predict | certified or predicted class; -1: abstained |
| radius | certified l2 radius, rounded down; 0 when it abstained |
| correct | 1 when predict is label |
| time | h:mm:ss.ffffff spent on the image: the mean of those done together, compilation included |

Behind them stand the counts, by what was done:

| mode | column | meaning |
|---|---|---|
| certify, decide | count0 | votes for the selected class among the n0 that selected it |
| certify, decide | count | votes for it among the further ones |
| certify | count_runner_up | most votes of any other class among those n |
| decide | votes | the further votes, as many as it took |
| certify, decide | selected | the selected class, also when it abstained |
| decide | decision | certified, not_certified or undecided at the radius in question |
| predict | count, count_runner_up | the two largest counts among n votes |
| predict | p_value | of the two-sided binomial test of the one against the other |
"""

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.statistics import sequential
from rs_consistency.statistics.bounds import ABSTAIN, most_of_others

if TYPE_CHECKING:
    from rs_consistency.smoothing.certify import (
        Certification,  # JAX, slow to import, which reading files has no use for
    )

FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
CERTIFIED, NOT_CERTIFIED, UNDECIDED = DECISIONS = ("certified", "not_certified", "undecided")
WORDS = {
    sequential.CERTIFIED: CERTIFIED,
    sequential.NOT_CERTIFIED: NOT_CERTIFIED,
    sequential.UNDECIDED: UNDECIDED,
}  # of a decision, as it is written
_RADIUS_UNIT = Decimal("0.000001")
_TIME = re.compile(r"[0-9]{1,9}:[0-5][0-9]:[0-5][0-9]\.[0-9]{6}")

Row = dict[str, Any]  # column -> value; radius in units of the images, time in seconds


def seconds_of(time: str) -> float:
    """Of a `time` column's value, h:mm:ss.ffffff."""
    hours, minutes, seconds = time.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


class Schema(NamedTuple):
    """A kind of certificate file.

    Attributes:
      name: its mode.
      columns: the names behind `FIELD_COLUMNS`.
    """

    name: str
    columns: tuple[str, ...]

    @property
    def header(self) -> str:
        """The first line, newline included."""
        return "\t".join((*FIELD_COLUMNS, *self.columns)) + "\n"

    def line(self, row: Mapping[str, Any] | Sequence[Any]) -> str:
        """A row as a line, newline included.

        Args:
          row: a mapping that holds every column, or the values in the order of the columns.
        """
        names = (*FIELD_COLUMNS, *self.columns)
        values = [row[name] for name in names] if isinstance(row, Mapping) else row
        return "\t".join(_to_text(name, value) for name, value in zip(names, values, strict=True)) + "\n"

    def parse(self, line: str) -> Row:
        """Reads a line without its newline: `radius` as a Decimal, `time` as text, so that `line` gives it back.

        Raises:
          ValueError: for anything that `line` does not write.
        """
        names = (*FIELD_COLUMNS, *self.columns)
        row = {name: _from_text(name, text) for name, text in zip(names, line.split("\t"), strict=True)}
        if self.line(row) != line + "\n":
            raise ValueError("not how this program writes it")
        return row


CERTIFY = Schema("certify", ("count0", "count", "count_runner_up", "selected"))
DECIDE = Schema("decide", ("count0", "count", "votes", "selected", "decision"))
PREDICT = Schema("predict", ("count", "count_runner_up", "p_value"))
SCHEMAS = {schema.name: schema for schema in (CERTIFY, DECIDE, PREDICT)}


def certify_rows(indices: np.ndarray, labels: np.ndarray, result: "Certification", seconds: ArrayLike) -> list[Row]:
    """The rows of G images of mode `certify`.

    Args:
      indices: `[G]` image numbers.
      labels: `[G]` true classes.
      result: of those images.
      seconds: spent on each image, or on each on average.
    """
    selected = result.counts0.argmax(axis=1)
    return _rows(
        idx=indices,
        label=labels,
        predict=result.prediction,
        radius=result.radius,
        time=seconds,
        count0=result.counts0.max(axis=1),
        count=np.take_along_axis(result.counts, selected[:, None], axis=1)[:, 0],
        count_runner_up=most_of_others(result.counts, selected),
        selected=selected,
    )


def decide_rows(
    indices: ArrayLike,
    labels: ArrayLike,
    *,
    count0: ArrayLike,
    count: ArrayLike,
    votes: ArrayLike,
    selected: ArrayLike,
    decision: Sequence[str],
    radius: float,
    seconds: ArrayLike,
) -> list[Row]:
    """The rows of G images of mode `decide`: where certified, the selected class at the radius; else abstention.

    Args:
      indices: `[G]` image numbers.
      labels: `[G]` true classes.
      count0: `[G]` votes for the selected class in the selection.
      count: `[G]` votes for it in the estimation.
      votes: `[G]` votes of the estimation.
      selected: `[G]` classes.
      decision: `[G]`, each of `DECISIONS`.
      radius: at which the decision was asked for.
      seconds: spent on each image, `[G]` or one number.
    """
    certified = np.asarray(decision) == CERTIFIED
    return _rows(
        idx=indices,
        label=labels,
        predict=np.where(certified, selected, ABSTAIN),
        radius=np.where(certified, decided_radius(radius), Decimal(0)),
        time=seconds,
        count0=count0,
        count=count,
        votes=votes,
        selected=selected,
        decision=decision,
    )


def predict_rows(
    indices: ArrayLike,
    labels: ArrayLike,
    prediction: ArrayLike,
    *,
    count: ArrayLike,
    count_runner_up: ArrayLike,
    p_value: ArrayLike,
    seconds: ArrayLike,
) -> list[Row]:
    """The rows of G images of mode `predict`; they certify no radius.

    Args:
      indices: `[G]` image numbers.
      labels: `[G]` true classes.
      prediction: `[G]` classes, -1 for abstention.
      count: `[G]` largest counts.
      count_runner_up: `[G]` second largest counts.
      p_value: `[G]` of the test between them.
      seconds: spent on each image, `[G]` or one number.
    """
    return _rows(
        idx=indices,
        label=labels,
        predict=prediction,
        radius=0.0,
        time=seconds,
        count=count,
        count_runner_up=count_runner_up,
        p_value=p_value,
    )


def _rows(**columns: ArrayLike) -> list[Row]:
    """Columns, each `[G]` or one value, as rows, with `correct`."""
    size = len(np.asarray(columns["idx"]))
    spread = {name: np.broadcast_to(np.asarray(values), (size,)).tolist() for name, values in columns.items()}
    rows = [dict(zip(spread, values, strict=True)) for values in zip(*spread.values(), strict=True)]
    return [{**row, "correct": int(row["predict"] == row["label"])} for row in rows]


def decided_radius(radius: float) -> Decimal:
    """The radius of a decision as the user wrote it: 0.3, not the float64 beside it, which is a little less."""
    return Decimal(repr(float(radius)))


def format_radius(radius: float | Decimal) -> str:
    """Six decimals, rounded down: a printed radius never exceeds the certified one."""
    exact = radius if isinstance(radius, Decimal) else Decimal(float(radius))
    return str(exact.quantize(_RADIUS_UNIT, rounding=ROUND_FLOOR))


def format_time(seconds: float) -> str:
    """h:mm:ss.ffffff."""
    whole, micro = divmod(timedelta(seconds=seconds) // timedelta(microseconds=1), 1_000_000)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{micro:06d}"


def _to_text(name: str, value: Any) -> str:
    if name == "radius":
        return format_radius(value)
    if name == "time":
        return value if isinstance(value, str) else format_time(float(value))
    if name == "p_value":
        return repr(float(value))
    return str(value) if name == "decision" else str(int(value))


def _from_text(name: str, text: str) -> Any:
    """The value of a cell; a ValueError for one that cannot be."""
    if name == "radius":
        try:
            value = Decimal(text)
            good = value.is_finite() and not value.is_signed() and format_radius(value) == text
        except ArithmeticError:
            good = False
    elif name == "time":
        value, good = text, _TIME.fullmatch(text)
    elif name == "p_value":
        value = float(text)
        good = 0 <= value <= 1
    elif name == "decision":
        value, good = text, text in DECISIONS
    else:
        value = int(text)
        good = value in (0, 1) if name == "correct" else value >= (ABSTAIN if name == "predict" else 0)
    if not good:
        raise ValueError(f"{name}={text}")
    return value

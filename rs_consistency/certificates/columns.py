"""The columns of certificate files, and their lines: written from rows, and read back strictly.

Every file begins with the six columns of the field:

| column | meaning |
|---|---|
| idx | number of the image in its split |
| label | true class |
| predict | certified or predicted class; -1: abstained |
| radius | certified l2 radius, rounded down; 0 when it abstained |
| correct | 1 when predict is label |
| time | h:mm:ss.ffffff spent on the image: the mean over images done together, compilation included |

The counts stand behind them:

| mode | column | meaning |
|---|---|---|
| certify, decide | count0 | votes for the selected class among the n0 that selected it |
| certify, decide | count | votes for it among the further ones |
| certify | count_runner_up | most votes of any other class among those n |
| decide | votes | the further votes, as many as it took |
| certify, decide | selected | the selected class, also when it abstained |
| certify | count_label | votes for the true class among those n |
| certify | votes | n, or with a tolerance the fewer votes that the selection asked for |
| decide | decision | certified, not_certified or undecided at the radius in question |
| predict | count, count_runner_up | the two largest counts among n votes |
| predict | p_value | of the two-sided binomial test of the one against the other |
| predict | count_label | votes for the true class |
| attack | adversarial | class of the smoothed classifier at the adversarial image; -1: none was proven |
| attack | distance | l2 distance of that image, rounded up; inf where none was proven |
| attack | count, count_runner_up | the two largest counts among the n votes on it |
| attack | p_value | of their two-sided binomial test |

In mode attack, `predict` is the class at the image itself, proven by votes, and the radius is 0.

Files of earlier versions lack the last columns of certify, `count_label` and `votes`, or of predict, `count_label`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.common.checks import MAX_INDEX
from rs_consistency.statistics import sequential

FIELD_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
WORDS = {  # a decision -> its word in a file
    sequential.CERTIFIED: "certified",
    sequential.NOT_CERTIFIED: "not_certified",
    sequential.UNDECIDED: "undecided",
}
_RADIUS_UNIT = Decimal("0.000001")
_WHOLE = "0|[1-9][0-9]{0,17}"  # fits into int64
# Column -> texts of its cells, and the type of its values.
_READERS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "predict": (re.compile(f"-1|{_WHOLE}"), int),
    "radius": (re.compile(rf"({_WHOLE})\.[0-9]{{6}}"), Decimal),
    "adversarial": (re.compile(f"-1|{_WHOLE}"), int),
    "distance": (re.compile(rf"({_WHOLE})\.[0-9]{{6}}|inf"), Decimal),
    "correct": (re.compile("[01]"), int),
    "time": (re.compile(r"[0-9]{1,9}:[0-5][0-9]:[0-5][0-9]\.[0-9]{6}"), str),
    "decision": (re.compile("|".join(WORDS.values())), str),
    "p_value": (re.compile(r"[01]\.[0-9]+|[1-9](\.[0-9]+)?e-[0-9]+"), float),
}
_WHOLE_NUMBER = re.compile(_WHOLE), int  # of all other columns

Row = dict[str, Any]  # column -> value: time in seconds or as text; see `Schema.parse`


def seconds_of(time: str) -> float:
    """Return the seconds of a `time` cell, h:mm:ss.ffffff."""
    hours, minutes, seconds = time.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


class Schema(NamedTuple):
    """A kind of certificate file.

    Attributes:
      name: the mode of certify.py.
      columns: names of the columns behind `FIELD_COLUMNS`.
      added: number of the last columns that files of earlier versions lack.
    """

    name: str
    columns: tuple[str, ...]
    added: int = 0

    @property
    def older(self) -> Self:
        """The schema of files of earlier versions, which may be the same."""
        return self._replace(columns=self.columns[: len(self.columns) - self.added], added=0)

    def of_header(self, header: str) -> Self | None:
        """Return the schema with this first line, newline included: itself, the older one, or None."""
        return next((schema for schema in (self, self.older) if schema.header == header), None)

    @property
    def header(self) -> str:
        """The first line, newline included."""
        return "\t".join((*FIELD_COLUMNS, *self.columns)) + "\n"

    def line(self, row: Mapping[str, Any] | Sequence[Any]) -> str:
        """Return a row, a mapping of every column or the values in their order, as a line with its newline."""
        names = (*FIELD_COLUMNS, *self.columns)
        values = [row[name] for name in names] if isinstance(row, Mapping) else row
        return "\t".join(_to_text(name, value) for name, value in zip(names, values, strict=True)) + "\n"

    def text(self, rows: Iterable[Row]) -> str:
        """Return a whole file: the header and a line for each row, in the order of idx.

        If a row lacks the columns that were added, it is a file of earlier versions.
        """
        rows = sorted(rows, key=lambda row: row["idx"])
        written = self if all(row.keys() >= set(self.columns) for row in rows) else self.older
        return written.header + "".join(map(written.line, rows))

    def parse(self, line: str) -> Row:
        """Read a line without its newline; a ValueError for anything that `line` does not write.

        `radius` becomes a Decimal and `time` stays text, so that `line` gives the line back.
        """
        names, cells = (*FIELD_COLUMNS, *self.columns), line.split("\t")
        row = {name: _from_text(name, text) for name, text in zip(names, cells, strict=False)}
        if len(cells) != len(names) or None in row.values():
            raise ValueError("damaged")
        return row


CERTIFY = Schema("certify", ("count0", "count", "count_runner_up", "selected", "count_label", "votes"), added=2)
DECIDE = Schema("decide", ("count0", "count", "votes", "selected", "decision"))
ATTACK = Schema("attack", ("adversarial", "distance", "count", "count_runner_up", "p_value"))
PREDICT = Schema("predict", ("count", "count_runner_up", "p_value", "count_label"), added=1)
SCHEMAS = {schema.name: schema for schema in (CERTIFY, DECIDE, PREDICT, ATTACK)}
FILES = {  # mode -> usual name of the file in a workdir, without the ending
    CERTIFY.name: "certificates",
    DECIDE.name: "decisions",
    PREDICT.name: "predictions",
    ATTACK.name: "attacks",
}


def make_rows(**columns: ArrayLike) -> list[Row]:
    """Return columns, `[G]` or one value each, as rows: with `correct`, and each radius rounded as it is written."""
    size = len(np.asarray(columns["idx"]))
    spread = {name: np.broadcast_to(np.asarray(values), (size,)).tolist() for name, values in columns.items()}
    spread["radius"] = [Decimal(format_radius(radius)) for radius in spread["radius"]]
    if "distance" in spread:
        spread["distance"] = [Decimal(format_distance(distance)) for distance in spread["distance"]]
    rows = [dict(zip(spread, values, strict=True)) for values in zip(*spread.values(), strict=True)]
    return [{**row, "correct": int(row["predict"] == row["label"])} for row in rows]


def format_radius(radius: float | Decimal) -> str:
    """Return six decimals, rounded down: a printed radius never exceeds the certified one."""
    exact = radius if isinstance(radius, Decimal) else Decimal(float(radius))
    return str(exact.quantize(_RADIUS_UNIT, rounding=ROUND_FLOOR))


def format_distance(distance: float | Decimal) -> str:
    """Return six decimals, rounded up: a printed distance is never below the adversarial image's; or inf."""
    exact = Decimal(distance)
    return str(exact.quantize(_RADIUS_UNIT, rounding=ROUND_CEILING)) if exact.is_finite() else "inf"


def format_time(seconds: float) -> str:
    """Return h:mm:ss.ffffff."""
    whole, micro = divmod(timedelta(seconds=seconds) // timedelta(microseconds=1), 1_000_000)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}.{micro:06d}"


def _to_text(name: str, value: Any) -> str:
    if name == "radius":
        return format_radius(value)
    if name == "distance":
        return format_distance(value)
    if name == "p_value":
        return repr(float(value))
    if isinstance(value, str):  # a decision, or a time that was read
        return value
    return format_time(float(value)) if name == "time" else str(int(value))


def _from_text(name: str, text: str) -> Any:
    """Return the value of a cell; None for a text that `_to_text` does not write."""
    pattern, kind = _READERS.get(name, _WHOLE_NUMBER)
    if not pattern.fullmatch(text):
        return None
    value = kind(text)
    good = value <= MAX_INDEX if name == "idx" else repr(value) == text and value <= 1 if kind is float else True
    return value if good else None

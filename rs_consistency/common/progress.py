"""The one progress bar, and durations and sizes as text."""

import sys
from datetime import timedelta
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30  # in a log file
_BRIEF_SECONDS = 2  # in a terminal


def progress_bar(
    desc: str, total: int, *, unit: str = "img", brief: bool = False, show: bool = True, **settings: Any
) -> tqdm:
    """Return a progress bar on stderr, with the time that is left: for a `with` block, or with `iterable` for a loop.

    A terminal sees it move. A log file gets a line every 30 seconds. If the work is mostly over in seconds (`brief`),
    the bar appears after 2 seconds in a terminal, after 30 in a log file, and leaves no line behind. Further settings
    are of `tqdm`.
    """
    in_terminal = sys.stderr.isatty()
    every = 0.1 if in_terminal else _SECONDS_BETWEEN_LINES
    delay = _BRIEF_SECONDS if in_terminal else _SECONDS_BETWEEN_LINES
    return tqdm(
        desc=desc,
        total=total,
        unit=unit,
        leave=not brief,
        disable=not show,
        mininterval=every,
        delay=delay if brief else 0,
        **settings,
    )


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))


def size(number: int | None) -> str:
    """Return a number of bytes as MiB; "not known here" for None."""
    return "not known here" if number is None else f"{number / 2**20:,.0f} MiB"

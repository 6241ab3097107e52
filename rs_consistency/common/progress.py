"""Durations and sizes as text."""

from datetime import timedelta


def duration(seconds: float) -> str:
    """As h:mm:ss, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))


def size(number: int | None) -> str:
    """Bytes, as MiB."""
    return "not known here" if number is None else f"{number / 2**20:,.0f} MiB"

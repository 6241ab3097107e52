"""Checks of settings, numbers and arrays. Each raises a `UserError` with the name, the value and the remedy."""

import difflib
import math
import numbers
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.common.errors import UserError

MOST = 10**9  # largest count: sums on the devices are int32
LARGEST = 1e6  # largest weight or distance: sums of their products stay finite in float32
MAX_SEED = 2**32 - 1  # for every random stream
MAX_INDEX = 2**31 - 1  # largest number of an image, which addresses its noise: int32 on the devices
PRECISIONS = ("highest", "default")  # of a network's products in float32: full float32, or as fast as the device can
SMALLEST_PROBABILITY = 1e-100  # below it the quantile functions lose their accuracy


def whole_number(name: str, value: Any, *, at_least: int, at_most: int = 2**63 - 1) -> int:
    """Return a whole number in a range as an int. `1e5` is a whole number; `True` and `"5"` are not."""
    value = _scalar(value)
    if _is_number(value) and math.isfinite(value) and int(value) == value and at_least <= value <= at_most:
        return int(value)
    upper = "" if at_most == 2**63 - 1 else f" and at most {at_most}"
    raise UserError(f"{name}={value!r}: use a whole number of at least {at_least}{upper}")


def number_above(name: str, value: Any, limit: float, *, at_most: float = math.inf) -> float:
    """Return a finite number greater than the limit as a float."""
    value = _scalar(value)
    if _is_number(value) and math.isfinite(value) and limit < value <= at_most:
        return float(value)
    raise UserError(f"{name}={value!r}: use a number greater than {limit}{_upper(at_most)}")


def number_from(name: str, value: Any, *, at_least: float, at_most: float = math.inf) -> float:
    """Return a finite number in a range, both ends included, as a float."""
    value = _scalar(value)
    if _is_number(value) and math.isfinite(value) and at_least <= value <= at_most:
        return float(value)
    raise UserError(f"{name}={value!r}: use a number of at least {at_least}{_upper(at_most)}")


def boolean(name: str, value: Any) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: use True or False")


def count(name: str, value: Any, *, at_least: int = 1, at_most: int = MOST) -> int:
    """Return a count as an int, small enough for int32 on the devices."""
    return whole_number(name, value, at_least=at_least, at_most=at_most)


def probability(name: str, value: Any) -> float:
    """Return a number in (0, 1), at least `SMALLEST_PROBABILITY`, as a float."""
    value = _scalar(value)
    if not (_is_number(value) and 0 < value < 1):
        raise UserError(f"{name}={value!r}: use a number in (0, 1), such as 0.001")
    return number_from(name, value, at_least=SMALLEST_PROBABILITY)


def decimal_value(number: float) -> Fraction:
    """Return the decimal number that a float is written as: 1/1000 for 0.001, whose float64 is a little more."""
    return Fraction(repr(float(number)))


def one_of(name: str, value: Any, names: Any) -> None:
    """Raise unless the value is a known name."""
    if value not in names:
        raise UserError(f"{name}={value!r} is unknown; use one of {', '.join(sorted(names))}")


def no_such_key(key: str, known: Collection[str]) -> UserError:
    """Return the error for a key of a configuration that is not among the known keys; it names the nearest ones."""
    key = key[:100]
    name = key.rpartition(".")[2]
    near = [each for each in known if each.rpartition(".")[2] == name] or difflib.get_close_matches(key, known)
    meant = f" (near: {', '.join(near)})" if near else ""
    return UserError(f"no such key: {key}{meant}; configs/default.py names every key")


def number_array(name: str, value: ArrayLike) -> np.ndarray:
    """Return an array of numbers, of any numeric type."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number):
        raise UserError(f"{name}={value!r}: use numbers")
    return array


def check_all(name: str, value: np.ndarray, good: np.ndarray, remedy: str) -> None:
    """Raise for the first entry of an array that is not good."""
    bad = np.broadcast_to(value, good.shape)[~good]
    if bad.size:
        raise UserError(f"{name}={bad.flat[0]}: {remedy}")


def _upper(at_most: float) -> str:
    return "" if at_most == math.inf else f" and at most {at_most:g}"


def _scalar(value: Any) -> Any:
    """Return the Python number in an array without axes, such as `jnp.float32(0.5)`. Other values stay as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

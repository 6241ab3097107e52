"""Checks of settings, numbers and arrays. Each raises a `UserError` with the name, the value and the remedy."""

import difflib
import math
import numbers
import sys
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rs_consistency.common.errors import UserError, first_line

MOST = 10**9  # largest count: sums on the devices are int32
LARGEST = 1e6  # largest weight or distance: sums of their products stay finite in float32
MAX_SEED = 2**32 - 1  # for every random stream
MAX_INDEX = 2**31 - 1  # largest number of an image, which addresses its noise: int32 on the devices
PRECISIONS = ("highest", "default")  # of a network's products in float32: full float32, or as fast as the device can
SMALLEST_PROBABILITY = 1e-100  # below it the quantile functions lose their accuracy
MOST_EXACT = 2**53  # whole numbers up to it are exact in float64

_LONGEST = 100  # characters of a value in a message
_FEW = 8  # numbers of an array in a message


def shown(value: Any) -> str:
    """Return a value for a message: on one line, and short. A large array is shown by its type and shape."""
    try:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if isinstance(shape, tuple) and dtype is not None and math.prod(shape) > _FEW:
            return f"<{type(value).__name__} of {dtype}, shape {shape}>"
        text = " ".join(repr(value).split())
    except Exception:  # anything may be given, also an object that cannot be printed, or a number of 5000 digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def whole_number(name: str, value: Any, *, at_least: int, at_most: int = 2**63 - 1) -> int:
    """Return a whole number in a range as an int. `1e5` is a whole number; `True` and `"5"` are not."""
    number = finite_number(name, value)
    if number is not None and int(number) == number and at_least <= number <= at_most:
        return int(number)
    upper = "" if at_most == 2**63 - 1 else f" and at most {at_most}"
    raise UserError(f"{name}={_shown(number, value)}: use a whole number of at least {at_least}{upper}")


def number_above(name: str, value: Any, limit: float, *, at_most: float = math.inf) -> float:
    """Return a finite number greater than the limit as a float."""
    number = finite_number(name, value)
    if number is not None and limit < float(number) <= at_most:
        return float(number)
    raise UserError(f"{name}={_shown(number, value)}: use a number greater than {limit}{_upper(at_most)}")


def number_from(name: str, value: Any, *, at_least: float, at_most: float = math.inf) -> float:
    """Return a finite number in a range, both ends included, as a float."""
    number = finite_number(name, value)
    if number is not None and at_least <= float(number) <= at_most:
        return float(number)
    raise UserError(f"{name}={_shown(number, value)}: use a number of at least {at_least}{_upper(at_most)}")


def boolean(name: str, value: Any) -> bool:
    """Return True or False, also of NumPy, as Python's."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name}={shown(value)}: use True or False")
    return bool(value)


def function(name: str, value: Any, purpose: str) -> None:
    """Raise unless the value can be called; the purpose is for the message."""
    if not callable(value):
        raise UserError(f"{name}={shown(value)}: give a function {purpose}")


def count(name: str, value: Any, *, at_least: int = 1, at_most: int = MOST) -> int:
    """Return a count as an int, small enough for int32 on the devices."""
    return whole_number(name, value, at_least=at_least, at_most=at_most)


def probability(name: str, value: Any) -> float:
    """Return a number in (0, 1), at least `SMALLEST_PROBABILITY`, as a float."""
    number = finite_number(name, value)
    if number is None or not 0 < float(number) < 1:
        raise UserError(f"{name}={_shown(number, value)}: use a number in (0, 1), such as 0.001")
    return number_from(name, number, at_least=SMALLEST_PROBABILITY)


def decimal_value(number: float) -> Fraction:
    """Return the decimal number that a float is written as: 1/1000 for 0.001, whose float64 is a little more."""
    return Fraction(repr(float(number)))


def one_of(name: str, value: Any, names: Any) -> None:
    """Raise unless the value is a known name."""
    if not isinstance(value, str) or value not in names:
        raise UserError(f"{name}={shown(value)} is unknown; use one of {', '.join(sorted(names))}")


def no_such_key(key: str, known: Collection[str]) -> UserError:
    """Return the error for a key of a configuration that is not among the known keys; it names the nearest ones."""
    key = key[:100]
    name = key.rpartition(".")[2]
    near = [each for each in known if each.rpartition(".")[2] == name] or difflib.get_close_matches(key, known)
    meant = f" (near: {', '.join(near)})" if near else ""
    return UserError(f"no such key: {key}{meant}; configs/default.py names every key")


def number_array(name: str, value: ArrayLike, *, kinds: str = "iuf") -> np.ndarray:
    """Return a NumPy array of real numbers, of their own type; of 16 bits and fewer, as float32.

    The `kinds` are NumPy's letters: booleans are numbers only with "b". Anything else is a `UserError`: complex
    numbers, rows of different lengths, masked values, times, objects, and arrays that JAX traces: they have no values.
    """
    _check_known(name, value)
    try:
        array = np.asarray(value)
    except Exception as error:  # arrays of other libraries raise many kinds
        raise UserError(f"{name}={shown(value)}: use numbers, in rows of equal length ({first_line(error)})") from None
    if is_extended(array.dtype) or array.dtype == np.float16:  # which compares with no number above 65504
        array = array.astype(np.float32)
    if not array.size and array.ndim == 1 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)  # an empty list
    check_kind(name, value, array.dtype, kinds)
    return array


def whole_array(name: str, value: ArrayLike, axes: str, *, at_least: int = 0, at_most: int = MAX_INDEX) -> np.ndarray:
    """Return an int64 array of whole numbers in a range, with these axes, as for `any_array`."""
    array = any_array(name, number_array(name, value), axes)
    good = (array >= at_least) & (array <= at_most) & (array.dtype.kind != "f")
    check_all(name, array, good, f"use whole numbers from {at_least} to {at_most}")
    return array.astype(np.int64)


def number_arrays(**values: ArrayLike) -> list[np.ndarray]:
    """Return the values as arrays of real numbers, each by its name, whose shapes broadcast together."""
    arrays = [number_array(name, value) for name, value in values.items()]
    try:
        np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(values, arrays, strict=True))
        raise UserError(f"the shapes do not broadcast: {shapes}; use equal ones, or single numbers") from None
    return arrays


def any_array(name: str, value: Any, axes: str = "", *, kinds: str = "iuf") -> Any:
    """Return an array of real numbers with these axes, such as "[M, B, K]: copies, examples, classes".

    An array of JAX stays as it is, traced or not, and none of its values is read. Others become NumPy's, as by
    `number_array`. A bfloat16 is real for JAX. Without axes any shape will do.
    """
    if not is_jax(value):
        value = number_array(name, value, kinds=kinds)
        value = value.astype(np.float64) if value.dtype.kind == "f" and value.dtype.itemsize > 8 else value
    check_kind(name, value, value.dtype, kinds)
    if axes and value.ndim != axes.partition("]")[0].count(",") + 1:
        raise UserError(f"{name} has shape {tuple(value.shape)}; it must be {axes}")
    return value


def is_extended(dtype: Any) -> bool:
    """Return whether a type is one that JAX adds to NumPy's, such as bfloat16. All of them are exact in float32."""
    return isinstance(dtype, np.dtype) and dtype.isbuiltin == 2


def is_jax(value: Any) -> bool:
    """Return whether a value is an array of JAX, traced or not. JAX is not imported for it."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def is_traced(value: Any) -> bool:
    """Return whether a value stands for an array that `jax.jit`, `vmap` or `grad` traces: it has no number yet."""
    return is_jax(value) and isinstance(value, sys.modules["jax"].core.Tracer)


def check_outside_jit(name: str) -> None:
    """Raise inside a function that `jax.jit` traces, where JAX computes no values; `name` is what needs them."""
    jax = sys.modules["jax"]
    if isinstance(jax.numpy.zeros(()), jax.core.Tracer):
        raise UserError(f"{name} cannot be traced by jax.jit, since it needs values; call it outside")


def check_all(name: str, value: np.ndarray, good: np.ndarray, remedy: str) -> None:
    """Raise for the first entry of an array that is not good."""
    bad = np.broadcast_to(value, good.shape)[~good]
    if bad.size:
        raise UserError(f"{name}={bad.flat[0]}: {remedy}")


def finite_number(name: str, value: Any) -> Any:
    """Return a finite real number as Python's or a fraction, also from an array without axes; None for anything else.

    Raises:
      UserError: for a value that JAX traces.
    """
    _check_known(name, value)
    try:
        if getattr(value, "ndim", None) == 0:
            array = np.asarray(value)
            array = array.astype(np.float32) if is_extended(array.dtype) else array
            value = array.item() if array.dtype.kind in "iufO" else None
        if isinstance(value, np.floating):  # of more than 64 bits
            value = Fraction(*value.as_integer_ratio())
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None
    except Exception:  # numbers beyond float64, and classes that only look like numbers
        return None


def check_kind(name: str, value: Any, dtype: Any, kinds: str) -> None:
    """Raise unless a type is of NumPy's `kinds`, or one that JAX adds to the floating-point numbers."""
    known = isinstance(dtype, np.dtype)  # a random key of JAX has another type
    if not known or not (dtype.kind in kinds or ("f" in kinds and is_extended(dtype))):
        wanted = {"f": "floating-point numbers", "iu": "whole numbers"}.get(kinds, "numbers")
        other = f", not {dtype}" if not known or dtype.kind in "biufcmM" else ""
        raise UserError(f"{name}={shown(value)}: use {wanted}{other}")


def _check_known(name: str, value: Any) -> None:
    """Raise for a value that JAX traces, and for an array with masked values: NumPy would unmask them."""
    if is_traced(value):
        raise UserError(
            f"{name}={shown(value)}: it cannot be traced by jax.jit, vmap or grad, since its value decides; call this"
            " function outside of them, with a number or an array"
        )
    if np.ma.is_masked(value):
        raise UserError(f"{name}={shown(value)} has masked values; fill them, or leave them out")


def _shown(number: Any, value: Any) -> str:
    return shown(value if number is None else number)


def _upper(at_most: float) -> str:
    return "" if at_most == math.inf else f" and at most {at_most:g}"

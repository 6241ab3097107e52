"""Files of `torch.save`, read without PyTorch. Nothing in a file is executed, and nothing larger than it is allocated.

A file is a pickle, which describes its tensors, and their raw numbers: together in a zip archive, or one after the
other (before PyTorch 1.6). PyTorch's own reader allocates as much as a file asks for, also with weights only. The
pickle is read here as a list of instructions: those for plain data and dense tensors are followed, others refused.
"""

import functools
import io
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how the files begin
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the files before PyTorch 1.6

# What a pickle may name: classes of storages, with the types of their numbers, and functions.
_STORAGES = {
    f"torch {name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": jnp.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
        "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
# Instructions that carry a number or a text.
_CONSTANTS = {
    code.name
    for code in pickletools.opcodes
    if code.arg and not code.stack_before and code.stack_after not in ([], [pickletools.anyobject])
}
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class StoredTensor(NamedTuple):
    """A tensor as its file describes it: a strided view of numbers, which were not read yet."""

    key: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, numbers: bytes) -> np.ndarray:
        """Return the view of the numbers of its storage; a `ValueError` if it reaches beyond them."""
        size = self.dtype.itemsize
        steps = [(length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True)]
        if 0 not in self.shape and (self.offset + sum(steps) + 1) * size > len(numbers):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {len(numbers)} bytes")
        strides = [stride * size for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, numbers, self.offset * size, strides)


class _Name(NamedTuple):
    """A class or function that a pickle names."""

    text: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


def read_torch_file(path: Path) -> tuple[Any, Callable[[StoredTensor], np.ndarray]]:
    """Return the content of a file of `torch.save`: plain data and tensors; and a function that reads a tensor.

    Arrays are views that cannot be written, of the types and the strides in the file.

    Raises:
      Exception: of many kinds, for a file that is damaged or holds more than data; `OSError` if it cannot be read.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith((_ZIP, _PICKLE)):
            raise ValueError("it is no file of torch.save")
        file.seek(0)
        data = file.read()
    content, numbers = _read_zip(data) if data.startswith(_ZIP) else _read_sequence(io.BytesIO(data))
    return content, lambda tensor: tensor.view(numbers(tensor.key))


def _read_zip(data: bytes) -> tuple[Any, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, which torch.save never does")
    if sum(member.file_size for member in members) > len(data):
        raise ValueError("its parts overlap")
    pickled = next((member.filename for member in members if member.filename.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError("it is an archive without data.pkl")
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    content = _unpickle(io.BytesIO(archive.read(pickled)), {})
    return content, functools.cache(lambda key: archive.read(f"{folder}data/{key}"))


def _read_sequence(stream: io.BytesIO) -> tuple[Any, Callable[[str], bytes]]:
    if (_unpickle(stream, {}), _unpickle(stream, {})) != (_MAGIC, _PROTOCOL):
        raise ValueError("it is no file of torch.save")
    if not _unpickle(stream, {}).get("little_endian"):
        raise ValueError("its numbers are big-endian")
    storages: dict[str, np.dtype] = {}
    content = _unpickle(stream, storages)
    numbers = {}
    for key in _unpickle(stream, {}):
        numel = int.from_bytes(_read_exactly(stream, 8), "little")
        numbers[key] = _read_exactly(stream, numel * storages[key].itemsize)
    return content, numbers.__getitem__


def _read_exactly(stream: io.BytesIO, size: int) -> bytes:
    if size > stream.getbuffer().nbytes - stream.tell():
        raise ValueError("it is cut short")
    return stream.read(size)


def _unpickle(stream: io.BytesIO, storages: dict[str, np.dtype]) -> Any:
    """Return the plain data and the tensors in a pickle, of which no class or function is ever looked up or called.

    `storages` receives the types of the storages that it names.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for code, argument, _ in pickletools.genops(stream):
        match code.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name if name in _CONSTANTS:
                stack.append(argument)
            case name if name in _SINGLE:
                stack.append(_SINGLE[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                marks.append(len(stack))
            case "LIST":
                stack.append(since_mark())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND" | "APPENDS" as name:
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                target = _expect(stack[-1], dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_expect(key, str, int, float, type(None))] = value
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL" as name:
                parts = [argument] if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
                stack.append(_known(" ".join(parts)))
            case "BINPERSID":
                storage = _storage(*stack.pop())
                storages[storage.key] = storage.dtype
                stack.append(storage)
            case "REDUCE":
                arguments = _expect(stack.pop(), tuple)
                stack.append(_built(_expect(stack.pop(), _Name).text, *arguments))
            case "BUILD":  # the attributes of an ordered dictionary: versions of modules
                stack.pop()
                _expect(stack[-1], dict)
            case name:
                raise ValueError(f"it has the instruction {name}")
    return stack.pop()


def _known(text: str) -> _Name:
    if text in _STORAGES or text in (_DICT, _TENSOR, *_PARAMETERS):
        return _Name(text)
    raise ValueError(f"it needs {text.replace(' ', '.')[:100]!r}, which is neither plain data nor a dense tensor")


def _storage(kind: str, name: _Name, key: str, location: str, numel: int, part: None = None) -> _Storage:
    """Return a storage; where it was (`location`) and its size do not matter: the numbers in the file count."""
    if kind != "storage" or part is not None:
        raise ValueError("it has storages inside of others")
    return _Storage(_expect(key, str), _STORAGES[_expect(name, _Name).text])


def _built(name: str, *arguments: Any) -> Any:
    """Return the dictionary or the tensor that a call in a pickle would make."""
    if name == _DICT and not arguments:
        return {}
    if name in _PARAMETERS:
        return _expect(arguments[0], StoredTensor)
    if name != _TENSOR:
        raise ValueError(f"it calls {name.replace(' ', '.')}")
    storage, offset, shape, strides, _, _, *flags = arguments
    if any(flags):
        raise ValueError("it has conjugated or negated views")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("it has a tensor of a negative size or stride")
    return StoredTensor(*_expect(storage, _Storage), offset, _expect(shape, tuple), _expect(strides, tuple))


def _expect(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"it has a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value

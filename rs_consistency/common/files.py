"""Files that survive: a reader sees the old or the new content, never a part of it."""

import errno
import fcntl
import glob
import json
import math
import os
import platform
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rs_consistency.common.errors import UserError, note

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # from file systems without locks
_DAY = 24 * 3600  # seconds
_DEEPEST = 50
_TOO_DEEP = f"more than {_DEEPEST} objects or lists in each other"
_LARGEST_JSON = 2**24  # bytes: the values of a file take many times its size
_PART = 2**16  # bytes; reading many at once takes memory for all of them, however few there are
_REMEDY = "restore it from a copy, or move it away"


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again."""
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "rs_consistency"


def local_path(text: str | Path, name: str) -> Path:
    """Return the path of a file or folder of this machine, with `~` for the home folder. Messages call it `name`.

    Raises:
      UserError: for an empty text, a user who does not exist, a place such as `gs://bucket`, and a NUL character.
    """
    text = str(text)
    if not text:
        raise UserError(f"{name} is empty; name a file or folder")
    if "://" in text:
        raise UserError(f"{name}={text} is no path of this machine; copy it here, or mount it as a folder")
    if "\0" in text:
        raise UserError(f"{name}={text!r} has a NUL character, which no path can have; leave it out")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        raise UserError(f"{name}={text}: the home folder is not known; write the path without ~") from None


def check_utf8(path: Path, name: str) -> None:
    """Raise a `UserError` for a path that is not UTF-8: TensorStore, which reads and writes checkpoints, has no other.

    Messages call the path `name`. In a locale with another encoding, Python and TensorStore would mean different paths.
    """
    whole = str(path.resolve())
    if os.fsencode(whole) != whole.encode(errors="replace"):
        raise UserError(
            f"{name}={whole!a} is not UTF-8 here, and no checkpoint can be there; rename it, or set PYTHONUTF8=1"
        )


def check_output(path: Path) -> None:
    """Raise a `UserError` unless a file can have the path: in a folder that exists, and neither folder nor device."""
    if not path.parent.is_dir():
        raise UserError(f"output={path}: its folder does not exist; create it, or choose another --output")
    if path.exists() and not path.is_file():
        raise UserError(f"output={path} is not a regular file; choose another --output")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path, as the user knows it, into an `OSError` of the block: a failed write does not name its file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. The file that the block writes there then replaces `path`.

    If the block raises, `path` stays as it was and the temporary file is removed. Temporary files of the same path that
    killed processes left are removed, too.
    """
    host = _host()
    temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}-{threading.get_native_id()}.tmp")
    _remove_left(path, host)
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _host() -> str:
    """Return a name of the machine, or container, within which a process number is of one process at most.

    Machines can have the same host name, but each start of a kernel has a number of its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


def _remove_left(path: Path, host: str) -> None:
    """Remove the temporary files that dead processes of this host left, and those of other hosts after a day."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        name = re.fullmatch(r"(.*)\.([0-9]+)-[0-9]+\.tmp", left.name.removeprefix(f".{path.name}."))
        if not name:
            continue  # of another program
        where, process = name.groups()
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > _DAY
            if not _is_running(int(process)) if where == host else old:
                left.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, atomically. Bytes of file names that are not text are written as escapes."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_bytes(path: Path, *, at_most: int) -> bytes:
    """Return the content of a file.

    Raises:
      UserError: for a folder, a pipe or a device, which may have no end, and for a file of more bytes than `at_most`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without waiting for the writer of a pipe
    try:
        # Of the open file, since the path may name another at any time; not its size, which is 0 in /proc.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path} is not a regular file; {_REMEDY}")
        content = bytearray()
        with open(descriptor, "rb", closefd=False) as file, naming(path):
            while len(content) <= at_most and (part := file.read(_PART)):
                content += part
    finally:
        os.close(descriptor)
    if len(content) > at_most:
        raise UserError(f"{path} is damaged: it has more than {at_most} bytes; {_REMEDY}")
    return bytes(content)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
      ValueError: for text that is not JSON in UTF-8, for NaN, infinity, a float or a whole number beyond 64 bits, for a
        name that an object has twice, and for more than 50 objects or lists in each other.
    """
    try:
        content = _JSON.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [content]
    for _ in range(_DEEPEST + 1):
        level = [part for value in level for part in _parts(value)]
        if not level:
            return content
    raise ValueError(_TOO_DEEP)


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _whole_number(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) >= 2**64:
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name[:40]!r} is there twice")
        content[name] = value
    return content


_JSON = json.JSONDecoder(
    parse_float=_number, parse_int=_whole_number, parse_constant=_number, object_pairs_hook=_object
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, at most 16 MiB.

    Raises:
      UserError: names the file, where it is damaged (see `parse_json`) or no regular file.
    """
    try:
        content = parse_json(read_bytes(path, at_most=_LARGEST_JSON))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {_REMEDY}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; {_REMEDY}")
    return content


def lock(descriptor: int, name: str, *, remedy: str = "") -> None:
    """Take an exclusive lock on an open file or folder. It ends when the descriptor is closed or the process dies.

    On a file system without locks nothing is locked, and a note says so, with the remedy.

    Raises:
      UserError: when another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{name} is in use by another process; wait for it, or choose another") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        note(f"{name} cannot be locked here ({error.strerror}): nothing else may use it meanwhile{remedy}")

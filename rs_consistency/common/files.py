"""Files that survive: a reader sees the old content or the new one, never half of it."""

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rs_consistency.common.errors import UserError, note

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # what their file systems say
_REMEDY = "restore it from a copy, or move it away"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path, as the user knows it, into an `OSError` of the block: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what was written there then replaces `path`.

    When the block raises, `path` is as it was and the temporary file is gone.
    """
    # With the host's name: processes of two machines, or containers, may share a folder and have the same number.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, atomically; bytes of file names that are no text are written as escapes."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a `UserError` says when the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {_REMEDY}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; {_REMEDY}")
    return content


def lock(descriptor: int, what: str, *, remedy: str = "") -> None:
    """Takes an exclusive lock on an open file or folder; it ends when the descriptor is closed, or the process dies.

    Where the file system has no locks, it is left without one, and a note says so, with the remedy.

    Raises:
      UserError: when another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{what} is in use by another process; wait for it, or choose another") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        note(f"{what} cannot be locked here ({error.strerror}): nothing else may use it meanwhile{remedy}")

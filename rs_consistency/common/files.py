"""Files that survive: a reader sees the old or the new content, never a part of it."""

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

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # from file systems without locks
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

    If the block raises, `path` stays as it was and the temporary file is removed.
    """
    # With the host's name: processes on two machines, or in two containers, may share a folder and a process number.
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
    """Write UTF-8, atomically. Bytes of file names that are not text are written as escapes."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise a `UserError` if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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

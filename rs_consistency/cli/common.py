"""What the command-line programs share: how they start, and how they fail."""

import errno
import logging
import sys
from collections.abc import Callable, Sequence

from absl import logging as absl_logging

from rs_consistency.errors import UserError

EXIT_USER_ERROR = 2
_DISK_ERRORS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
        errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.EIO,
    }
)  # fmt: skip


def run_main(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> None:
    """Runs a program; a user's mistake and a failing disk end it with one line and a non-zero status."""
    quiet_libraries()
    try:
        main(argv)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror}; free space or choose a writable folder. What was finished is on disk")
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", status=130)


def fail(message: str, *, status: int = EXIT_USER_ERROR) -> None:
    """Prints one line and exits."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def note(message: str) -> None:
    """A line for the user beside the program's output."""
    print(f"note: {message}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Silences what libraries log beside the programs' own lines.

    Orbax and TFDS log every step, and errors that the programs tell in one line; JAX warns of absent accelerators.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.unraisablehook is not _unraisable:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


_others: list[Callable[["sys.UnraisableHookArgs"], object]] = []


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Leaves out the tracebacks of TensorStore's threads when a save has failed; the failure itself is raised."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        _others[-1](unraisable)

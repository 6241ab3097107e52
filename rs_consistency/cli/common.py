"""The shared part of the command-line programs: arguments, start, and errors."""

import argparse
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging as absl_logging

from rs_consistency.common.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError


def entry_points(program: Callable[[Sequence[str]], None]) -> tuple[Callable[..., None], Callable[[], None]]:
    """Return `main` and `run` of a program that takes the words of a command line.

    `main(argv=None)` ends with one line and a non-zero status at a user's mistake or a failing disk. It takes the words
    that this process was started with for None. `run()` is `main()` as the only work of its process.
    """

    def main(argv: Sequence[str] | None = None) -> None:
        _run_main(program, sys.argv[1:] if argv is None else argv)

    def run() -> None:
        try:
            main()
        except SystemExit as stop:
            if stop.code == EXIT_INTERRUPTED:
                # At once: XLA's threads still compute, and while the interpreter ends that can be a segmentation fault.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_INTERRUPTED)
            raise

    return main, run


def _run_main(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    quiet_libraries()
    try:
        program(argv)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can fail to be flushed
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space and run the same command again" if full else "choose another path, or make this one usable"
        fail(f"{where}{error.strerror}; {remedy}")
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", status=EXIT_INTERRUPTED)
    except Exception as error:
        if not _memory_is_full(error):
            raise
        fail(
            "the device's memory is full; use a smaller batch (--batch_size of certify.py, --config.batch_size or"
            " --config.eval_batch_size of train.py)"
        )


def _memory_is_full(error: Exception) -> bool:
    """Return whether an error says that the memory of this machine, or of a device of JAX, is full."""
    jax = sys.modules.get("jax")  # slow to import, and not every program needs it
    of_device = jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
    full = re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)) is not None
    return isinstance(error, MemoryError) or (of_device and full)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Print one line with the remedy, and exit."""
        remedy = "give one of them" if "not allowed with argument" in message else f"{self.prog} --help tells more"
        fail(f"{message}; {remedy}")


def program_words(name: str) -> list[str]:
    """Return the words that start a program, as this one was started: `rs-NAME`, or `python NAME.py`."""
    installed = Path(sys.argv[0]).name.startswith("rs-")
    return [f"rs-{name}"] if installed else ["python", f"{name}.py"]


def whole(text: str) -> int:
    """Return the whole number in a text such as `100000` or `1e5`; for `type=` of an argument."""
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(text) if text.strip().lstrip("+-").isdigit() else int(number)


whole.__name__ = "whole number"  # argparse says "invalid whole number value"


def user_path(text: str) -> Path:
    """Return a path, with `~` for the home folder; for `type=` of an argument."""
    return Path(text).expanduser()


def fail(message: str, *, status: int = EXIT_USER_ERROR) -> NoReturn:
    """Print one line and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def quiet_libraries() -> None:
    """Silence the libraries, which log beside the programs' own lines.

    Orbax and TFDS log every step, and errors that the programs print in one line. JAX warns of absent accelerators.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.unraisablehook is not _unraisable:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


_others: list[Callable[["sys.UnraisableHookArgs"], object]] = []


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hide the errors of Orbax's unfinished reads and writes after one of them failed; the failure itself is raised."""
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    of_orbax = code is not None and "orbax" in code.co_filename
    if not of_orbax and "Event loop is closed" not in str(unraisable.exc_value):
        _others[-1](unraisable)

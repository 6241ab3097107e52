"""The shared part of the command-line programs: arguments, start, and errors."""

import argparse
import errno
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rs_consistency.common.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    INTERRUPTED,
    UserError,
    drop_output,
    note,
)
from rs_consistency.common.files import local_path
from rs_consistency.common.process import interrupted

Pairs = Iterable[tuple[str, str]]
Needs = Iterable[tuple[str, Collection[str], str]]


def entry_point(program: Callable[[Sequence[str]], None]) -> Callable[..., None]:
    """Return the `main` of a program that takes the words of a command line.

    `main(argv=None)` ends with one line and a non-zero status at a user's mistake or a failing disk. It takes the words
    that this process was started with for None. It may be called from a notebook: streams and signals are the
    process's, see `common.process.run`.
    """

    def main(argv: Sequence[str] | None = None) -> None:
        _run_main(program, sys.argv[1:] if argv is None else argv)

    return main


def _run_main(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    quiet_libraries()
    try:
        program(argv)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone, such as `| head`
        drop_output()
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space and run the same command again" if full else "choose another path, or make this one usable"
        fail(f"{where}{error.strerror}; {remedy}")
    except KeyboardInterrupt:
        fail(INTERRUPTED, status=EXIT_INTERRUPTED)
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


class _Store(argparse.Action):
    """Store the value of a flag, with a note where the flag had another value."""

    def __call__(self, parser: "Parser", namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        if self.dest in parser.given:
            _note_twice(flag, getattr(namespace, self.dest), values)
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.given: set[str] = set()  # the names of the flags on the command line
        for name in ("store", None):
            self.register("action", name, _Store)

    def parse_args(self, words: Sequence[str], *, needed: Needs = ()) -> argparse.Namespace:
        """Return the values of a command line, with the flags that others need: see `check_flags`."""
        self.given.clear()
        args = super().parse_args(words)
        self.given |= {name for name, value in vars(args).items() if value is True or (value and type(value) is list)}
        check_flags(self.given, needed=needed)
        return args

    def error(self, message: str) -> NoReturn:
        """Print one line with the remedy, and exit."""
        remedy = "give one of them" if "not allowed with argument" in message else f"{self.prog} --help tells more"
        fail(f"{message}; {remedy}")


def check_flags(given: Collection[str], *, exclusive: Pairs = (), needed: Needs = ()) -> None:
    """Raise a `UserError` for flags that leave each other nothing to do, or that need another one.

    Flags of a pair in `exclusive` exclude each other. A flag in `needed` comes with the flags of which it needs one,
    and the remedy.
    """
    for flag, other in exclusive:
        if flag in given and other in given:
            raise UserError(f"--{flag} and --{other} exclude each other; leave out one of them")
    for flag, others, remedy in needed:
        if flag in given and not set(others) & set(given):
            raise UserError(f"--{flag} needs another flag; add {remedy}")


def note_repeated(words: Iterable[str]) -> None:
    """Print a note for each of the words NAME=VALUE that gives a name another value than a word before it."""
    values: dict[str, str] = {}
    for name, _, value in (word.partition("=") for word in words):
        _note_twice(name, values.get(name, value), value)
        values[name] = value


def _note_twice(name: str, before: object, value: object) -> None:
    if str(before) != str(value):
        note(f"{name} is given twice, as {before} and as {value}: the last counts")


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
    """Return the path of a file or folder of this machine, with `~` for the home folder; for `type=` of an argument."""
    try:
        return local_path(text, "path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_place(text: str) -> str:
    """Return a `user_path` as text; for `type=` of an argument."""
    return str(user_path(text))


def fail(message: str, *, status: int = EXIT_USER_ERROR) -> NoReturn:
    """Print one line and exit. An error of an interrupted process is a consequence, and is not told."""
    if interrupted():
        message, status = INTERRUPTED, EXIT_INTERRUPTED
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def quiet_libraries() -> None:
    """Silence the libraries, which log beside the programs' own lines.

    Orbax and TFDS log every step, and errors that the programs print in one line. JAX warns of absent accelerators, and
    of compiled programs that it cannot keep or read, as on a full disk or after a kill: nothing is lost but time.
    """
    from absl import logging as absl_logging  # slow to import, before the start of a module that `python -m` runs

    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold("fatal")
    for name in ("jax", "orbax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if not _others:  # once: another tool may call this hook from its own
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


_others: list[Callable[["sys.UnraisableHookArgs"], object]] = []  # the hook before


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Hide the errors of Orbax's unfinished reads and writes after one of them failed; the failure itself is raised."""
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    of_orbax = code is not None and "orbax" in code.co_filename
    known = of_orbax or "Event loop is closed" in str(unraisable.exc_value)
    if not known or isinstance(unraisable.exc_value, KeyboardInterrupt):
        _others[0](unraisable)

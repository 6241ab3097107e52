"""The process of a program: its standard streams, its signals, its end. Light: it is there before any slow import."""

import atexit
import contextlib
import importlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from rs_consistency.common.errors import EXIT_INTERRUPTED, INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_SECONDS = 1.0  # timeout(1) and a plan send a signal twice, or two of them
_LIBRARY_SECONDS = 2  # until a library returns to this package
_PATIENCE_SECONDS = 60  # for the end of the work after that
_PACKAGE = str(Path(__file__).parents[1])


class _State:
    """The facts about this process that its signal handler needs."""

    working = False  # the program runs: there is something to close
    interrupted = 0  # the first signal
    since = 0.0  # its time
    status: int | None = None  # the exit status, once the work is over


def run(module: str, arguments: Sequence[str] | None = None) -> None:
    """Run `main(arguments)` of a module, by its name, as the only work of this process.

    - A closed standard stream is opened on /dev/null. No text is too foreign for stdout and stderr. Writing to stderr
      never fails.
    - Ctrl-C, SIGTERM and SIGHUP, unless they are ignored, end the process with one line and status 130, 143 or 129. A
      second signal, a second later, ends it at once.

    The module is imported here, after all of that. `main` ends with a `SystemExit` or returns.
    """
    _open_streams()
    atexit.register(_end)  # the first to be registered is the last to be called
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGALRM, _on_signal)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    status = 0
    try:
        main = importlib.import_module(module).main
        try:
            _State.working = True
            main(arguments)
        finally:
            _State.working = False
    except SystemExit as stop:
        status = stop.code or 0
        if _State.interrupted or status == EXIT_INTERRUPTED:
            # At once: XLA's threads still compute, and while the interpreter ends that can be a segmentation fault.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            _leave(told=status == EXIT_INTERRUPTED)
    except BaseException:
        if _State.interrupted:  # also in the guise of another error, from code that converts errors
            _leave()
        _State.status = 1
        raise
    if _State.interrupted:  # something swallowed it
        _leave()
    _State.status = status
    if status:
        _end()  # threads of a library may wait for work that failed, and the interpreter would wait for them
    raise SystemExit(status)


def interrupted() -> bool:
    """Return whether a signal has asked this process to end."""
    return _State.interrupted > 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Raise a `KeyboardInterrupt` at the first signal, so that the program closes all; later, end the process.

    It is raised in this package alone: a library's C++ code can abort at an exception of Python, and an import can hide
    it. During an import the process ends at once, and so it does when a library takes too long to return.
    """
    if _State.status is not None:
        os._exit(_State.status)  # the work is over, and so is its report
    if not _State.interrupted:
        _State.interrupted, _State.since = number, time.monotonic()
        stack: list[FrameType] = []  # from `run` on
        while frame and frame.f_code is not run.__code__:
            stack, frame = [frame, *stack], frame.f_back
        if not _State.working or any(each.f_code.co_filename.startswith("<frozen importlib") for each in stack):
            _leave()
        own = list(itertools.takewhile(_is_own, stack))
        if own == stack:
            _raise()
        signal.alarm(_LIBRARY_SECONDS)
        own[-1].f_trace = _raise  # at its next line
        sys.settrace(lambda *_: None)
        return
    if number == signal.SIGALRM or time.monotonic() - _State.since > _SAME_SECONDS:
        _leave()


def _is_own(frame: FrameType) -> bool:
    """Return whether a frame is of this package, of Python itself or of a user's file, and of no library."""
    file = frame.f_code.co_filename
    return file.startswith(_PACKAGE) or ("site-packages" not in file and "dist-packages" not in file)


def _raise(*_: object) -> NoReturn:
    signal.alarm(_PATIENCE_SECONDS)
    raise KeyboardInterrupt


def _leave(*, told: bool = False) -> None:
    """End the process at once as an interrupted one. Files are whole whenever a process ends."""
    if not told:
        with contextlib.suppress(OSError):
            line = f"error: {INTERRUPTED}\n"
            os.write(2, (f"\n{line}" if _State.working else line).encode())  # below a progress bar
    os._exit(128 + _State.interrupted if _State.interrupted else EXIT_INTERRUPTED)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """End the process where Python cannot pass on a `KeyboardInterrupt`, such as from a destructor."""
    if _State.interrupted and isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _end() -> None:
    """End the process before the interpreter takes itself apart: a signal would be a traceback there."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _State.status is not None:
        os._exit(_State.status)


class _Output(io.FileIO):
    """A standard stream. Its errors name it; on stderr, for progress and notes, there are none."""

    def write(self, data: bytes) -> int | None:
        """Write bytes; return their number."""
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 2:
                return len(data)
            error.filename = "stdout"
            raise


def _open_streams() -> None:
    """Open closed standard streams on /dev/null, and let stdout and stderr take any text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise a file of the program gets this number, and a library's log gets into the file.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
    sys.stdout, sys.stderr = _output(1, sys.stdout), _output(2, sys.stderr)


def _output(number: int, stream: TextIO | None) -> TextIO:
    """Return a standard stream in the place of the one that Python has opened, or not."""
    raw = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
    )

"""The process of a program: its standard streams, its signals, its end. Light: it is there before any slow import."""

import atexit
import contextlib
import importlib
import io
import itertools
import os
import select
import signal
import sys
import threading
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
    """The state of this process, for its signal handler and its watch."""

    working = False  # the program runs: there is something to close
    interrupted = 0  # the first signal
    until = 0.0  # the time, in `time.monotonic()`, at which an interrupted program must have closed all
    status: int | None = None  # the exit status, once the work is over


def run(module: str, arguments: Sequence[str] | None = None) -> None:
    """Run `main(arguments)` of a module, by its name, as the only work of this process.

    - A closed standard stream is opened on /dev/null. No text is too foreign for stdout and stderr. Writing to stderr
      never fails.
    - Ctrl-C, SIGTERM and SIGHUP, unless they are ignored, end the process with one line and status 130, 143 or 129. The
      program closes all before. A library that does not return is left after 2 seconds. A second signal, a second
      later, ends the process at once. C code that holds the interpreter's lock, as few calls do for long, delays this.

    The module is imported here, after all of that. `main` ends with a `SystemExit` or returns.
    """
    _open_streams()
    atexit.register(_end)  # the first to be registered is the last to be called
    sys.unraisablehook = _unraisable
    _start_watch()
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
        status = _status(stop)
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


def _status(stop: SystemExit) -> int:
    """Return the exit status that Python gives a `SystemExit`; print its text, if it has one."""
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def interrupted() -> bool:
    """Return whether a signal has asked this process to end."""
    return _State.interrupted > 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Raise a `KeyboardInterrupt` at the first signal, so that the program closes all.

    It is raised in this package, in the standard library or in a user's file. While an installed library runs, it is
    raised where that returns: C++ code can abort at an exception of Python. During an import, which can hide an
    exception, the process ends at once. `_watch` ends it later.
    """
    if _State.status is not None:
        _leave()
    if _State.interrupted:
        return
    _State.interrupted = number
    stack: list[FrameType] = []  # from `run` on
    while frame and frame.f_code is not run.__code__:
        stack, frame = [frame, *stack], frame.f_back
    if not _State.working or any(each.f_code.co_filename.startswith("<frozen importlib") for each in stack):
        _leave()
    own = list(itertools.takewhile(_is_own, stack))
    if own == stack:
        _raise()
    own[-1].f_trace = _raise  # at its next line
    sys.settrace(lambda *_: None)


def _start_watch() -> None:
    """Start a thread that hears of each signal from Python's C code."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of a child are not this process's
    threading.Thread(target=_watch, args=(source,), daemon=True).start()


def _watch(source: int) -> None:
    """End the process at a second signal, and when too little has come of the first.

    Python calls a handler in the main thread between two of its own instructions, and so not before a call of C code
    returns. This thread does not wait for that.
    """
    first, since = 0, 0.0
    while True:
        rest = max(_State.until, since + _LIBRARY_SECONDS) - time.monotonic() if first else None
        if rest is not None and rest <= 0:
            break
        if not select.select([source], [], [], rest)[0]:
            continue
        number, now = os.read(source, 1)[0], time.monotonic()
        if signal.getsignal(number) is not _on_signal:
            continue  # a program has taken it over
        if first and now - since > _SAME_SECONDS:
            break
        first, since = first or number, since or now
    _State.interrupted = _State.interrupted or first
    _leave()


def _is_own(frame: FrameType) -> bool:
    """Return whether a frame is of this package, of Python itself or of a user's file, and of no library."""
    file = frame.f_code.co_filename
    return file.startswith(_PACKAGE) or ("site-packages" not in file and "dist-packages" not in file)


def _raise(*_: object) -> NoReturn:
    _State.until = time.monotonic() + _PATIENCE_SECONDS
    raise KeyboardInterrupt


def _leave(*, told: bool = False) -> None:
    """End the process at once: as an interrupted one, unless its work is over. Files are whole whenever it ends."""
    if _State.status is not None:
        os._exit(_State.status)  # its report is over, too
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
    at_once = stream is not None and stream.write_through  # `python -u`
    return io.TextIOWrapper(
        raw if at_once else io.BufferedWriter(raw),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
        write_through=at_once,
    )

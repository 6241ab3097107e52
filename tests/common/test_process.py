"""The process of a program: broken standard streams, signals at every moment, and the end."""

import os
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest

from rs_consistency.cli import common
from rs_consistency.common.errors import EXIT_BROKEN_PIPE, INTERRUPTED
from tests.helpers import CTRL_C_WORKS, ROOT

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
LINE = f"error: {INTERRUPTED}\n"

RUN = "import sys; sys.path[:0] = sys.argv[1:]; from rs_consistency.common.process import run; run('job')"
PLAIN = "import sys; sys.path[:0] = sys.argv[1:]; import job; job.main(None)"  # the broken twin

WORK = """
import contextlib, os, sys
from rs_consistency.common.errors import note, say

def main(arguments):
    note("w\\udcf6rk")
    say("begun: \\xe9")
    with open("work", "w") as file:
        file.write(str(file.fileno()))
        file.flush()
        with contextlib.suppress(OSError):
            os.write(2, b"a library's log")
    print("a line without a line feed", end="", file=sys.stderr)
    say("done")
"""


def started(folder, job, *, how=RUN, redirected="", **settings):
    """Start `main` of a job in a process without the site's packages; a library of the job is in `site-packages`."""
    (folder / "job.py").write_text(textwrap.dedent(job))
    places = [str(folder), str(folder / "site-packages"), str(ROOT)]
    shell = f'"$@" {redirected}; exit ${{PIPESTATUS[0]}}' if redirected else 'exec "$@"'
    command = ["bash", "-c", shell, "bash", *CTRL_C_WORKS, sys.executable, "-S", "-c", how, *places]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=60, **TEXT, **settings)


REDIRECTIONS = {
    "no stdout": ">&-",
    "no stderr": "2>&-",
    "nothing": ">&- 2>&- <&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "both full": ">/dev/full 2>/dev/full",
    "no reader": "| true",
    "no reader of errors": "2> >(true)",
}


@pytest.mark.parametrize("redirected", REDIRECTIONS.values(), ids=REDIRECTIONS)
def test_work_is_done_whatever_the_streams_are(redirected, tmp_path):
    done = started(tmp_path, WORK, redirected=redirected)
    assert done.returncode == 0
    assert int((tmp_path / "work").read_text()) > 2  # no log of a library gets into the file
    assert done.stderr in ("", "note: w\\udcf6rk\na library's loga line without a line feed")
    assert done.stdout in ("", "begun: é\ndone\n")


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", ">/dev/full"])
def test_work_with_plain_streams_is_not_done(redirected, tmp_path):
    done = started(tmp_path, WORK.replace("say(", "print("), how=PLAIN, redirected=redirected)
    assert done.returncode != 0 or (tmp_path / "work").read_text().startswith("2")


@pytest.mark.parametrize("names", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_any_text_is_shown_in_any_locale(names, tmp_path):
    done = started(tmp_path, WORK, env={**os.environ, "PYTHONCOERCECLOCALE": "0", **names})
    assert (done.returncode, done.stdout) == (0, "begun: \\xe9\ndone\n")


def test_a_product_that_cannot_be_shown_is_an_error_that_names_stdout(tmp_path):
    job = """
        def main(arguments):
            try:
                print("x" * 100_000)
            except OSError as error:
                raise SystemExit(141 if isinstance(error, BrokenPipeError) else len(error.filename))
    """
    assert started(tmp_path, job, redirected=">/dev/full").returncode == len("stdout")
    assert started(tmp_path, job, redirected="| true").returncode == EXIT_BROKEN_PIPE
    assert started(tmp_path, job, redirected=">&-").returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_is_unbuffered_where_the_user_wants_it(unbuffered, tmp_path):
    job = "import os\ndef main(arguments): print('\xe9', end=''); os._exit(0)"
    done = started(tmp_path, job, env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (0, "\xe9" if unbuffered else "")


# A job that gets a signal at some moment: it sends the signal itself. It works on a file, with a library.
JOB = """
import atexit, contextlib, ctypes, os, signal, threading, time
from pathlib import Path
from rs_consistency.common import process
from rs_consistency.common.files import replace_atomically

def hit(number=None):
    os.kill(os.getpid(), number or signal.{name})

def hit_in_c(*seconds):
    for each in (*seconds, 20):
        threading.Timer(each, hit if each < 20 else lambda: os._exit(9)).start()
    lock, twice = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    twice(lock)
    twice(lock)  # does not return, and no signal ends it

class Destructor:
    def __del__(self):
        hit()

def main(arguments):
    with replace_atomically(Path("file")) as temporary:
        temporary.write_text("new")
{moment}
"""
LIBRARY = """
import time

def swallow(hit, seconds):
    hit()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
    print("returned", flush=True)
"""
MOMENTS = {
    "in the work": "hit()",
    "twice, as timeout(1) does": "hit(); hit(signal.SIGTERM)",
    "turned into another error": "try: hit()\nexcept BaseException: raise RuntimeError",
    "in a destructor": "Destructor()",
    "in a library": "import lib\nlib.swallow(hit, 0.1)\ntime.sleep(9)",
    "in a library that does not return": "import lib\nprocess._LIBRARY_SECONDS = 1\nlib.swallow(hit, 9)",
    "in C code that does not return": "process._LIBRARY_SECONDS = 0.2\nhit_in_c(0.1)",
    "twice in C code": "process._LIBRARY_SECONDS, process._SAME_SECONDS = 60, 0.1\nhit_in_c(0.1, 0.4)",
    "in an import": "import late",
    "again, as the user is impatient": (
        "process._SAME_SECONDS = 0.01\ntry: hit()\nexcept BaseException: time.sleep(0.02); hit(); time.sleep(9)"
    ),
}
CLOSED = ("in the work", "twice, as timeout(1) does", "turned into another error", "in a library")


def interrupted(folder, moment, name="SIGTERM", how=RUN):
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "lib.py").write_text(LIBRARY)
    (folder / "late.py").write_text("import job\njob.hit()\nraise ImportError\n")
    (folder / "file").write_text("old")
    return started(folder, JOB.format(name=name, moment=textwrap.indent(moment, " " * 8)), how=how)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_is_one_line_and_leaves_whole_files(moment, tmp_path):
    done = interrupted(tmp_path, MOMENTS[moment])
    assert (done.returncode, done.stderr.strip()) == (143, LINE.strip())
    assert (tmp_path / "file").read_text() == "old"
    assert done.stdout == ("returned\n" if moment == "in a library" else "")  # no exception came into it
    assert moment not in CLOSED or not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGHUP", 129)])
def test_other_signals_end_a_program_the_same_way(name, status, tmp_path):
    done = interrupted(tmp_path, MOMENTS["in the work"], name)
    assert (done.returncode, done.stderr) == (status, LINE)


@pytest.mark.parametrize("moment", ["in the work", "turned into another error", "in an import"])
def test_without_this_start_a_signal_leaves_more_than_a_line(moment, tmp_path):
    done = interrupted(tmp_path, MOMENTS[moment], "SIGINT", how=PLAIN)
    assert done.returncode not in (130, 143) and done.stderr != LINE


def test_a_swallowed_signal_is_told_at_the_end(tmp_path):
    done = interrupted(tmp_path, "with contextlib.suppress(BaseException): hit()")
    assert (done.returncode, done.stderr) == (143, LINE)
    assert (tmp_path / "file").read_text() == "new"


def test_a_signal_after_the_work_changes_nothing(tmp_path):
    done = interrupted(tmp_path, "atexit.register(hit)")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == "new"


def test_a_signal_for_a_child_is_not_the_parents(tmp_path):
    moment = """
        process._LIBRARY_SECONDS = 0
        begun = time.monotonic()
        child = os.fork()
        while not child:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(9)
            os._exit(7)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 7 << 8 and time.monotonic() - begun < 5
        time.sleep(0.2)
    """
    done = interrupted(tmp_path, textwrap.dedent(moment))
    assert (done.returncode, done.stderr) == (0, "")


def test_ignored_signals_stay_ignored(tmp_path):
    ignoring = RUN.replace("run('job')", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); run('job')")
    done = interrupted(tmp_path, "hit()", "SIGHUP", how=ignoring)  # as nohup does
    assert (done.returncode, done.stderr) == (0, "")


ENDINGS = {"7": (7, ""), "None": (0, ""), "-1": (255, ""), "'text'": (1, "text\n"), "1 / 0": (1, "ZeroDivisionError")}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_a_program_is_its_own(ending, tmp_path):
    done = interrupted(tmp_path, f"raise SystemExit({ending})")
    status, text = ENDINGS[ending]
    assert done.returncode == status and text in done.stderr
    assert text == "ZeroDivisionError" or done.stderr == text


def test_a_program_that_failed_waits_for_no_thread(tmp_path):
    # Orbax has a thread that waits for a save which a full disk ended.
    job = "import threading, time\ndef main(arguments):\n    threading.Thread(target=time.sleep, args=[120]).start()\n"
    assert started(tmp_path, job + "    raise SystemExit(2)\n").returncode == 2  # within a minute


def test_main_may_be_called_again_though_another_tool_wraps_its_hook(monkeypatch):
    seen = []
    monkeypatch.setattr(common, "_others", [])
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    common.quiet_libraries()
    ours = sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: ours(unraisable))
    common.quiet_libraries()
    errors = [ValueError("of somebody"), RuntimeError("Event loop is closed")]
    for error in errors:
        sys.unraisablehook(SimpleNamespace(object=None, exc_value=error))
    assert seen == errors[:1]


def test_what_jax_says_of_a_damaged_cache_is_silenced():
    text = "{} persistent compilation cache entry for 'jit_step': error: Error -5 while decompressing data"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        common.quiet_libraries()
        for how in ("Error reading", "Error writing", "No"):
            warnings.warn(text.format(how), stacklevel=1)
    assert [str(warning.message) for warning in shown] == [text.format("No")]

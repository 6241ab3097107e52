"""Files that survive a kill, and files of others that are read back."""

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rs_consistency import UserError
from rs_consistency.common import files
from rs_consistency.common.files import parse_json, read_json, write_json, write_text

KILLED = """
import os, sys
from pathlib import Path
from rs_consistency.common.files import replace_atomically
with replace_atomically(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_the_next_run_removes_what_a_killed_process_left(tmp_path):
    path = tmp_path / "a[1].json"
    path.write_text("whole")
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    (left,) = set(tmp_path.iterdir()) - {path}
    assert killed.returncode == -9 and left.read_text() == "half" and path.read_text() == "whole"
    write_text(tmp_path / "b.json", "{}")
    assert left.exists()  # of another file
    write_text(path, "new")
    assert not left.exists() and path.read_text() == "new"


def test_temporary_files_of_the_living_and_of_other_hosts_stay(tmp_path):
    path = tmp_path / "a.json"

    def beside(host, process, age):
        file = tmp_path / f".a.json.{host}.{process}-1.tmp"
        file.write_text("")
        os.utime(file, (file.stat().st_mtime - age,) * 2)
        return file

    dead = subprocess.Popen(["true"])
    dead.wait()
    here, day = files._host(), 24 * 3600
    gone = [beside(here, dead.pid, 0), beside(here, 10**30, 0), beside("far.org", 1, day + 60), beside("x", 1, 9 * day)]
    stay = [
        beside(here, os.getppid(), 9 * day),
        beside(here, 1, 9 * day),
        beside("far.org", dead.pid, day - 60),
        beside(f"{platform.node()}-{here.rpartition('-')[2]}", dead.pid, 0),  # another machine of this name
        beside(here.rpartition("-")[0] + "-1", dead.pid, 0),  # another container, whose numbers are not ours
        beside("mine", "old", 9 * day),
    ]
    write_json(path, {})
    assert not any(file.exists() for file in gone) and all(file.exists() for file in stay)


def test_two_threads_write_one_path(tmp_path):
    path, barrier = tmp_path / "a.json", threading.Barrier(2)

    def write(number):
        with files.replace_atomically(path) as temporary:
            barrier.wait(10)
            temporary.write_text(number)
            barrier.wait(10)
        return number

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(write, "12")) == ["1", "2"] and path.read_text() in ("1", "2")
    assert os.listdir(tmp_path) == ["a.json"]


BAD_JSON = {
    "empty": b"",
    "no object": b"[1]",
    "cut": b'{"a": 1',
    "nested": b'{"a": ' + b"[" * 100_000,
    "nested and closed": b"[" * 100_000 + b"]" * 100_000,
    "nested no deeper than Python takes": b'{"a": ' + b"[" * 51 + b"]" * 51 + b"}",
    "a float beyond 64 bits": b'{"a": 1e400}',
    "infinity": b'{"a": -Infinity}',
    "NaN": b'{"a": NaN}',
    "a whole number beyond 64 bits": b'{"a": 18446744073709551616}',
    "a million digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "a name twice": b'{"a": {"b": 1, "c": 2, "b": 1}}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a mark of byte order": b'\xef\xbb\xbf{"a": 1}',
    "zeros": bytes(1000),
    "too large": b'{"a": 1}' + b" " * 2**24,
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_damaged_json_is_one_line_with_the_name_of_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} ") and str(error.value).endswith(
        "; restore it from a copy, or move it away"
    )
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_json_is_read_as_it_was_written(tmp_path):
    deep = [[]]
    for _ in range(45):
        deep = [deep]
    content = {
        "deep": deep,
        "a": [1, -(2**63), 2**64 - 1, 0.1, 1e308, True, None, "\u2028\udcff", {"a": {}}],
        "": 5e-324,
    }
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert parse_json(b"1") == 1


def test_what_is_no_regular_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", files.Path("/dev/zero")):
        with pytest.raises(UserError, match=f"^{path} is not a regular file; restore it"):
            read_json(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="sparse is damaged: it has more than 16777216 bytes"):
        read_json(tmp_path / "sparse")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")


def test_a_file_is_read_whole_while_others_replace_it_and_where_no_size_is_known(tmp_path, monkeypatch):
    path, later = tmp_path / "a.json", {"b": [0] * 1000}
    write_json(path, {})
    of_open, of_path = os.fstat, os.stat

    def replaced(look, file, **how):
        status = look(file, **how)
        write_json(path, later)  # after the look, before the reading
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda file: replaced(of_open, file))
        assert read_json(path) == {}  # the file that was looked at
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda file, **how: replaced(of_path, file, **how) if file == path else of_path(file))
        assert read_json(path) == later
    assert files.read_bytes(files.Path("/proc/self/status"), at_most=2**20).startswith(b"Name:")

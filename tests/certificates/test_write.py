"""Certificate files: rows of every kind, any order, kills, foreign lines, what the record says."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rs_consistency.certificates import write
from rs_consistency.certificates.columns import CERTIFY, DECIDE, PREDICT, format_time
from rs_consistency.certificates.proof import rows_of_counts
from rs_consistency.certificates.question import columns_of_counts
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.record import Record, Settings
from rs_consistency.certificates.selection import Selection, parse_shard
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.pool import Decisions
from rs_consistency.smoothing.votes import Votes
from rs_consistency.statistics.bounds import p_value_of

SETTINGS = {"sigma": 0.5, "n0": 10, "n": 100, "alpha": 0.001, "seed": 0, "bound": "clopper_pearson"}
SETTINGS |= {"sampler": "float", "precision": "default"}
IDENTITY = {**SETTINGS, "parameter_digest": "ab"}
OF_A_DECISION = {"radius": 0.5, "look_every": 16}
ABOUT = {"device": "1 x cpu", "versions": {"jax": "1"}, "code_digest": "c0"}
ALL = Selection(split_size=20, skip=2)


def opened(path, *, schema=CERTIFY, selection=ALL, about=ABOUT, **changed):
    return CertificateFile(path, schema=schema, identity={**IDENTITY, **changed}, about=about, selection=selection)


def row(index):
    """A line that depends on the image alone."""
    return {
        "idx": index,
        "label": index % 3,
        "predict": index % 3 if index % 4 else -1,
        "radius": index / 7,
        "correct": int(index % 4 != 0),
        "time": 0.5 + index,
        "count0": 9,
        "count": 90,
        "count_runner_up": 7,
        "selected": index % 3,
        "count_label": 90,
        "votes": 100,
    }


def text(indices):
    return CERTIFY.header + "".join(CERTIFY.line(row(index)) for index in indices)


def complete(path, **options):
    file = opened(path, **options)
    file.append(row(index) for index in file.remaining)
    file.finish()
    file.close()
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.tsv"


def rows_of(schema, group, **settings):
    """The rows of images 4, 7 and 9, with the classes 1, 0 and 2, from their counts."""
    number = len(group[0])
    labels = np.array([1, 0, 2][:number])
    columns = columns_of_counts(schema, group, labels)
    about = {"idx": np.array([4, 7, 9][:number]), "label": labels, "time": 0.25}
    return rows_of_counts(schema, Settings(sigma=0.5, n=100, alpha=0.001, seed=0, **settings), about | columns)


def test_rows_of_a_certification_by_hand():
    votes = Votes(np.array([[0, 10, 0], [5, 5, 0]]), np.array([[5, 90, 5], [40, 30, 30]]))
    lines = [CERTIFY.line(each) for each in rows_of(CERTIFY, votes, n0=10, bound="clopper_pearson")]
    # 0.77533 is the Clopper-Pearson bound at 90 of 100 votes, and 0.5 * Phi^-1(0.77533) = 0.3782577.
    assert lines == [
        "4\t1\t1\t0.378257\t1\t0:00:00.250000\t10\t90\t5\t1\t90\t100\n",
        "7\t0\t-1\t0.000000\t0\t0:00:00.250000\t5\t40\t30\t0\t40\t100\n",
    ]


def test_rows_of_decisions_and_predictions_by_hand():
    counts0 = np.array([[0, 10, 0], [8, 1, 1], [2, 2, 6]])
    hits, votes, word = np.array([95, 20, 70]), np.array([96, 64, 100]), np.zeros(3, np.int8)
    decided = rows_of(
        DECIDE,
        Decisions(np.arange(3), np.array([4, 7, 9]), counts0.argmax(1), counts0, hits, votes, word),
        n0=10,
        radius=0.3,
        look_every=16,
    )
    assert [DECIDE.line(each) for each in decided] == [
        "4\t1\t1\t0.300000\t1\t0:00:00.250000\t10\t95\t96\t1\tcertified\n",
        "7\t0\t-1\t0.000000\t0\t0:00:00.250000\t8\t20\t64\t0\tnot_certified\n",
        "9\t2\t-1\t0.000000\t0\t0:00:00.250000\t6\t70\t100\t2\tundecided\n",
    ]
    none = np.zeros((2, 3), int)
    predicted = rows_of(PREDICT, Votes(none, np.array([[3, 90, 7], [51, 49, 0]])))
    assert [PREDICT.line(each) for each in predicted] == [
        f"4\t1\t1\t0.000000\t1\t0:00:00.250000\t90\t7\t{float(p_value_of(90, 7))!r}\t90\n",
        f"7\t0\t-1\t0.000000\t0\t0:00:00.250000\t51\t49\t{float(p_value_of(51, 49))!r}\t51\n",
    ]
    for schema, rows in {DECIDE: decided, PREDICT: predicted}.items():
        for each in rows:
            line = schema.line(each)
            assert schema.line(schema.parse(line[:-1])) == line
            assert schema.line(tuple(schema.parse(line[:-1]).values())) == line


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("idx", "04"),
        ("idx", "-1"),
        ("idx", "+4"),
        ("idx", "4_0"),
        ("idx", "x"),
        ("label", "-1"),
        ("predict", "-2"),
        ("radius", "nan"),
        ("radius", "NaN"),
        ("radius", "inf"),
        ("radius", "-0.100000"),
        ("radius", "-0.000000"),
        ("radius", "0.1"),
        ("radius", "1e1"),
        ("radius", "1e99"),
        ("correct", "2"),
        ("time", "1.5"),
        ("count", "9.0"),
        ("count", " 9"),
        ("selected", "1\r"),
        ("selected", ""),
        ("selected", "1\t1"),
    ],
)
def test_a_line_that_this_program_would_not_write_is_not_read(column, value):
    good = CERTIFY.parse(CERTIFY.line(row(5))[:-1])
    assert good["radius"] and CERTIFY.line(good) == CERTIFY.line(row(5))
    with pytest.raises(ValueError):
        CERTIFY.parse("\t".join(value if name == column else str(cell) for name, cell in good.items()))


@pytest.mark.parametrize(("column", "value"), [("p_value", "1.1"), ("p_value", "nan"), ("p_value", "5e-1")])
def test_a_p_value_that_cannot_be(column, value):
    with pytest.raises(ValueError):
        PREDICT.parse(f"4\t1\t1\t0.000000\t1\t{format_time(0)}\t90\t10\t{value}")


def test_lines_in_any_order_are_put_in_order_at_the_end(path):
    file = opened(path)
    assert file.remaining.tolist() == list(range(0, 20, 2))
    for index in [6, 0, 18, 2, 16, 4, 14, 8, 12]:
        file.append([row(index)])
    assert file.remaining.tolist() == [10]
    assert path.read_text() == text([6, 0, 18, 2, 16, 4, 14, 8, 12])
    file.append([tuple(row(10).values())])
    assert file.done == set(range(0, 20, 2)) and file.remaining.size == 0
    file.finish()
    assert path.read_text() == text(range(0, 20, 2))
    assert file.progress.images == 10 and file.progress.abstained == 5 and file.progress.correct == 5
    np.testing.assert_allclose(file.progress.acr, np.mean([i / 7 * (i % 4 != 0) for i in range(0, 20, 2)]), atol=1e-6)
    file.close()


def test_a_file_of_an_earlier_version_goes_on_with_its_columns(path):
    older = CERTIFY.older
    assert older.columns == ("count0", "count", "count_runner_up", "selected")
    opened(path).close()
    path.write_text(older.header + older.line(row(4)) + older.line(row(0)) + "6\t0")
    finished = complete(path)
    assert path.read_text() == older.header + "".join(older.line(row(index)) for index in range(0, 20, 2))
    assert finished["finished"]["images"] == 10
    table = read_table(path)
    assert not table.missing and not table.changed and "votes" not in table.rows[4]
    with pytest.raises(ValueError, match="damaged"):
        CERTIFY.parse(older.line(row(4))[:-1])


def test_the_record_binds_the_table_when_it_is_finished(path):
    file = opened(path)
    file.append([row(2), row(0)])
    file.finish()
    file.close()
    record = json.loads(path.with_suffix(".json").read_text())
    assert "finished" not in record  # in order, but not whole
    assert path.read_text() == text([0, 2])
    record = complete(path)
    assert record["finished"]["images"] == 10
    assert record["finished"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {key: record[key] for key in record["identity"]} == {
        "mode": "certify",
        **IDENTITY,
        "tolerance": None,
        "skip": 2,
        "split_size": 20,
        "shard": None,
    }
    assert record["max"] == 10 and record["device"] == "1 x cpu" and "continued_with" not in record
    assert complete(path) == record  # and nothing is left to do


def test_a_higher_limit_goes_on_and_a_lower_one_changes_nothing(path):
    assert complete(path, selection=ALL._replace(most=4))["max"] == 4
    file = opened(path, selection=ALL._replace(most=6))
    record = json.loads(path.with_suffix(".json").read_text())
    assert "finished" not in record and record["max"] == 6
    file.append([row(10)])
    file.close()
    record = complete(path, selection=ALL._replace(most=3))  # it is to hold 6
    assert "finished" not in record and record["max"] == 6 and path.read_text() == text([0, 2, 4, 6, 10])
    assert complete(path, selection=ALL._replace(most=6))["finished"]["images"] == 6
    before = path.read_bytes()
    assert complete(path, selection=ALL._replace(most=3))["finished"]["images"] == 6
    assert path.read_bytes() == before


def test_a_limit_can_be_lowered_to_what_is_there(path):
    file = opened(path, selection=ALL._replace(most=8))
    file.append([row(0)])
    file.close()
    assert complete(path, selection=ALL._replace(most=2))["finished"]["images"] == 2


@pytest.mark.parametrize("torn", ["", "1", "16\t1\t1\t0.7", "16\t" + 99 * "7", CERTIFY.line(row(16))[:-1]])
def test_an_unsorted_file_with_a_torn_line_is_resumed(path, torn):
    file = opened(path)
    file.append([row(8), row(2)])
    file.close()
    path.write_text(path.read_text() + torn)
    file = opened(path)
    assert file.done == {2, 8} and file.progress.images == 2
    file.append([row(0)])
    file.close()
    assert path.read_text() == text([8, 2, 0])
    complete(path)
    assert path.read_text() == text(range(0, 20, 2))


def test_a_kill_at_any_moment_can_be_resumed(tmp_path, monkeypatch):
    """A kill leaves the files as they are before a change of a file, or halfway through a write."""
    path, left = tmp_path / "run" / "c.tsv", []
    path.parent.mkdir()

    def leave():
        left.append(shutil.copytree(path.parent, tmp_path / str(len(left))))

    def after_leaving(function):
        return lambda *args, **options: (leave(), function(*args, **options))[1]

    def in_halves(file, content):
        file.write(content[: len(content) // 2])
        leave()
        write_all(file, content[len(content) // 2 :])

    write_all = write._write_all
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_all", in_halves)
        patch.setattr(os, "fsync", after_leaving(os.fsync))
        patch.setattr(Path, "replace", after_leaving(Path.replace))
        patch.setattr(Path, "write_text", after_leaving(Path.write_text))
        for most in (4, 10):
            file = opened(path, selection=ALL._replace(most=most))
            for index in file.remaining[::-1]:
                leave()
                file.append([row(index)])
            file.finish()
            file.close()
    assert len(left) > 40
    for folder in left:
        record = complete(folder / "c.tsv")
        assert (folder / "c.tsv").read_text() == text(range(0, 20, 2)), folder
        assert record["finished"]["images"] == record["max"] == 10


def write_lines(path, indices):
    complete(path)
    record = json.loads(path.with_suffix(".json").read_text())
    del record["finished"]
    path.with_suffix(".json").write_text(json.dumps(record))
    path.write_text(text(indices))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([4, 2, 3], "line 4, is not what this program wrote .* image 3 is none of those asked for"),
        ([4, 20], "line 3, is not what this program wrote .* image 20 is none"),
        ([4, 2, 4], "line 4, is not what this program wrote .* image 4 for the second time"),
    ],
)
def test_lines_of_other_images_are_refused(path, indices, message):
    write_lines(path, indices)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        opened(path)
    assert path.read_bytes() == before
    path.write_text(text(indices[:-1]))
    opened(path).close()


def test_a_finished_file_must_be_as_it_was(path):
    complete(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(UserError, match=r"line 2, is not what this program wrote .* image 0 is missing"):
        opened(path)
    path.write_text("".join(lines).replace("\t9\t90\t", "\t9\t91\t", 1))
    with pytest.raises(UserError, match=r"c.tsv was changed after it was finished .*; restore it from a copy"):
        opened(path)
    path.write_text("".join(lines[:5]))  # what the remedy for a damaged line asks for
    complete(path)
    assert path.read_text() == "".join(lines)


def test_a_finished_file_that_lost_lines_is_finished_anew_with_a_lower_limit(path):
    complete(path)
    path.write_text(text(range(0, 12, 2)))
    record = complete(path, selection=ALL._replace(most=6))
    assert record["max"] == record["finished"]["images"] == 6
    assert record["finished"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not read_table(path).changed


@pytest.mark.parametrize("indices", [[0, 0], [1], [22], [0, 2, 6, 0]])
def test_only_images_that_are_missing_can_be_added(path, indices):
    file = opened(path)
    file.append([row(4)])
    with pytest.raises(ValueError, match="not each one that the file lacks"):
        file.append(row(index) for index in indices)
    with pytest.raises(ValueError, match="not each one that the file lacks"):
        file.append([row(4)])
    assert path.read_text() == text([4])
    file.close()


def test_other_settings_modes_shards_and_versions_are_refused(path):
    complete(path)
    with pytest.raises(UserError, match=r"other settings \(sigma: 0.5 -> 1.0; n: 100 -> 7\)"):
        opened(path, sigma=1.0, n=7)
    with pytest.raises(UserError, match="mode: 'certify' -> 'predict'"):
        opened(path, schema=PREDICT)
    with pytest.raises(UserError, match="split_size: 20 -> 40; shard: None -> '2/3'"):
        opened(path, selection=Selection(40, 2, None, parse_shard("2/3")))
    record = json.loads(path.with_suffix(".json").read_text())
    old = {key: value for key, value in record.items() if key not in ("bound", "shard", "split_size", "max")}
    path.with_suffix(".json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"c.json is damaged: it lacks max, bound, split_size, shard; restore it"):
        opened(path)
    path.with_suffix(".json").write_text(json.dumps({**record, "mode": "vote"}))
    with pytest.raises(UserError, match=r"c.json is no record of a certification that this version knows"):
        opened(path)
    path.write_text(path.read_text().replace("time", "zeit"))
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not those of this program"):
        opened(path)


@pytest.mark.parametrize("content", ["", DECIDE.header[:55], DECIDE.header, PREDICT.header + "4\t"])
def test_a_file_of_another_mode_without_images_is_started_again(path, content):
    opened(path, schema=DECIDE, **OF_A_DECISION).close()
    path.write_text(content)
    complete(path)
    assert path.read_text() == text(range(0, 20, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": "0.5"}, "sigma='0.5': use a number greater than 0"),
        ({"n0": 0}, "n0=0: use a whole number of at least 1"),
        ({"n": True}, "n=True: use a whole number"),
        ({"alpha": 1}, "alpha=1: use a number in"),
        ({"seed": 2**32}, "seed=4294967296: use a whole number"),
        ({"bound": "wald"}, "bound='wald' is unknown"),
        ({"skip": 0}, "skip=0: use a whole number of at least 1"),
        ({"shard": "3/2"}, "shard='3/2': use I/K"),
        ({"identity": "sigma"}, "identity='sigma' is no list of texts"),
        ({"identity": ["mode", "sigma"]}, "it lacks n, alpha, seed, n0, bound, sampler, precision, skip, split_size"),
        ({"shards": [1]}, r"shards=\[1\] is no list of JSON objects"),
        ({"continued_with": {}}, "continued_with={} is no list of JSON objects"),
        ({"shards": [{"continued_with": [{"versions": "1"}]}]}, "versions='1' is no JSON object"),
        ({"finished": None}, "finished=None lacks images and sha256"),
        ({"finished": {"images": 10}}, "finished={'images': 10} lacks images and sha256"),
    ],
)
def test_a_damaged_record_is_one_message_everywhere(path, change, message):
    record = complete(path)
    path.with_suffix(".json").write_text(json.dumps({**record, **change}))
    for read in (opened, read_table, lambda path: Record.read(path.with_suffix(".json"))):
        with pytest.raises(UserError, match=rf"c.json is damaged: {message}.*; restore it from a copy$"):
            read(path)


def test_a_record_keeps_what_it_does_not_know(path):
    record = complete(path) | {"later": {"version": [1.0, None]}}
    path.with_suffix(".json").write_text(json.dumps(record))
    again = complete(path, selection=ALL._replace(most=None))
    assert again == record and list(again) == list(record)
    assert Record.read(path.with_suffix(".json")).to_json() == record


def test_going_on_elsewhere_is_recorded_once(path):
    for most, about in enumerate([ABOUT, {**ABOUT, "code_digest": "c1"}, {**ABOUT, "code_digest": "c1"}, ABOUT], 1):
        record = complete(path, selection=ALL._replace(most=most), about=about)
    assert [place["code_digest"] for place in record["continued_with"]] == ["c1"]
    provenances = Record.from_json(path.with_suffix(".json"), record).provenances()
    assert [entry["code_digest"] for entry in provenances] == ["c0", "c1"]
    record = complete(path, selection=ALL._replace(most=4), about={**ABOUT, "device": "other"})  # made nothing
    assert len(record["continued_with"]) == 1
    record = complete(path, about={**ABOUT, "versions": {"jax": "2"}, "command": "certify --max=10"})
    assert len(record["continued_with"]) == 2 and record["command"] == "certify --max=10"


def test_the_lock_goes_over_to_the_sorted_file(path):
    file = opened(path)
    file.append(row(index) for index in file.remaining[::-1])
    with pytest.raises(UserError, match=r"c.tsv is in use by another process"):
        opened(path)
    before = path.stat().st_ino
    file.finish()
    assert path.stat().st_ino != before
    with pytest.raises(UserError, match=r"c.tsv is in use by another process"):
        opened(path)
    file.close()
    opened(path).close()
    assert sorted(each.name for each in path.parent.iterdir()) == ["c.json", "c.tsv"]


def test_a_file_that_is_replaced_before_it_is_locked_is_opened_again(path, monkeypatch):
    complete(path)
    lines = path.read_bytes()
    real, opens = write.lock, []

    def replaced_meanwhile(descriptor, what):
        if not opens:
            (path.parent / "new").write_bytes(lines)
            (path.parent / "new").replace(path)
        opens.append(os.fstat(descriptor).st_ino)
        real(descriptor, what)

    monkeypatch.setattr(write, "lock", replaced_meanwhile)
    file = opened(path)
    assert len(opens) == 2 and opens[0] != opens[1] == path.stat().st_ino
    with path.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.close()


@pytest.mark.parametrize("moment", ["between", "at the end", "while sorting"])
@pytest.mark.parametrize("change", ["removed", "replaced", "truncated and replaced by a link"])
def test_a_file_that_another_process_takes_away_is_no_success(path, monkeypatch, change, moment):
    file, elsewhere = opened(path), path.with_name("elsewhere.tsv")

    def take_away():
        path.unlink()
        if change == "replaced":
            path.write_text(text([0, 2]))
        elif change != "removed":
            path.symlink_to(elsewhere)
            elsewhere.write_text("")

    file.append(row(index) for index in file.remaining[:0:-1])
    if moment != "at the end":
        with monkeypatch.context() as patch:
            if moment == "while sorting":
                replace = write.CertificateFile._replace
                patch.setattr(write.CertificateFile, "_replace", lambda *both: (replace(*both), take_away()))
            else:
                take_away()
            with pytest.raises(UserError, match=r"^output=.*c\.tsv was removed or replaced by another process while"):
                file.finish() if moment == "while sorting" else file.append([row(0)])
    else:
        take_away()
        with pytest.raises(UserError, match=r"^output=.*c\.tsv was removed or replaced by another process while"):
            file.finish()
    file.close()
    assert not path.exists() or path.read_text() in ("", text([0, 2]))  # the other process's file stays


def test_a_record_that_another_process_takes_away(path):
    record = path.with_suffix(".json")
    file = opened(path)
    file.append(row(index) for index in file.remaining)
    record.unlink()
    file.finish()  # it is known, and written anew
    file.close()
    assert not read_table(path).changed and json.loads(record.read_text())["finished"]["images"] == 10
    path.unlink()
    record.unlink()
    file = opened(path)
    file.append(row(index) for index in file.remaining)
    for content in (record.read_text().replace('"seed": 0', '"seed": 1'), '{"mine": 1}'):
        record.write_text(content)
        with pytest.raises(UserError, match=r"c\.json (was replaced by another process while|is no record)"):
            file.finish()
        assert record.read_text() == content
    file.close()


def test_sorting_keeps_a_link_and_permissions(path, tmp_path):
    target = tmp_path / "elsewhere.tsv"
    target.write_text("")
    target.chmod(0o640)
    path.symlink_to(target)
    file = opened(path)
    file.append(row(index) for index in file.remaining[::-1])
    file.finish()
    file.close()
    assert path.is_symlink() and target.read_text() == text(range(0, 20, 2))
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_while_sorting_leaves_the_lines(path, monkeypatch):
    file = opened(path)
    file.append(row(index) for index in file.remaining[::-1])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_all", full)
        with pytest.raises(OSError, match="No space left"):
            file.finish()
    assert path.read_bytes() == before
    file.finish()
    file.close()
    assert path.read_text() == text(range(0, 20, 2))


def test_a_full_disk_before_the_first_line_leaves_the_file(path, monkeypatch):
    complete(path, selection=ALL._replace(most=4))
    before = [path.read_bytes(), path.with_suffix(".json").read_bytes()]

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=r"No space left on device.*c.json"):
            opened(path)
    assert [path.read_bytes(), path.with_suffix(".json").read_bytes()] == before
    complete(path)

"""analyze.py: measures by hand, formats, pictures, and files that cannot be trusted."""

import csv
import gzip
import io
import json

import matplotlib.image
import numpy as np
import pytest

from rs_consistency.certificates import read
from rs_consistency.certificates.read import read_certificates
from rs_consistency.common.errors import EXIT_BROKEN_PIPE
from rs_consistency.report.plots import short_labels
from tests.helpers import start

FIELD = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    "0\t7\t7\t1.5\t1\t0:00:01.393193\n"
    "5\t2\t2\t0.5\t1\t0:00:00.298455\n"
    "10\t1\t8\t0.75\t0\t0:00:00.3\n"
    "15\t0\t-1\t0.0\t0\t0:01:00.3\n"
)
OURS = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\tcount0\tcount\tcount_runner_up\tselected\n"
    "0\t7\t7\t1.000000\t1\t0:00:01.393193\t100\t1000\t0\t7\n"
)


@pytest.fixture
def field(tmp_path):
    (tmp_path / "field.tsv").write_text(FIELD)
    return tmp_path / "field.tsv"


def test_measures_by_hand(program, field):
    (summary,) = json.loads(program.succeeds("cli.analyze", field, "--format=json", "--radii", 0, 0.5, 0.51, 1.5).out)
    assert summary == {
        "path": str(field),
        "n_images": 4,
        "acr": 0.5,  # (1.5 + 0.5) / 4: the error's radius does not count
        "accuracy": 0.5,
        "abstention": 0.25,
        "certified_accuracy": {"0": 0.5, "0.5": 0.5, "0.51": 0.25, "1.5": 0.25},
        # Another program's file tells nothing of its votes, nor when it is finished.
        **dict.fromkeys(["finished", "sigma", "n", "alpha", "bound", "radius_ceiling", "at_ceiling"]),
        "p_a": dict.fromkeys(["0.05", "0.25", "0.5", "0.75", "0.95"]),
    }


def test_a_workdir_several_files_and_every_format(program, field, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "certificates.tsv").write_text(OURS)
    command = ["cli.analyze", field, workdir, "--radii", 0.25, 1]
    text = program.succeeds(*command).out
    assert [line.split() for line in text.splitlines()] == [
        ["path", "images", "ACR", "accuracy", "abstention", "r=0.25", "r=1"],
        [str(field), "4", "0.5000", "0.5000", "0.2500", "0.500", "0.250"],
        [str(workdir), "1", "1.0000", "1.0000", "0.0000", "1.000", "1.000"],
    ]
    markdown = program.succeeds(*command, "--format=markdown").out.splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[3] == f"| {workdir} | 1 | 1.0000 | 1.0000 | 0.0000 | 1.000 | 1.000 |"
    table = list(csv.DictReader(io.StringIO(program.succeeds(*command, "--format=csv").out)))
    assert table[0]["certified_accuracy_0.25"] == "0.5" and table[1]["acr"] == "1.0"
    assert [summary["n_images"] for summary in json.loads(program.succeeds(*command, "--format=json").out)] == [4, 1]


def test_the_curves_are_a_picture(program, field, tmp_path):
    out = program.succeeds("cli.analyze", field, field, "--output", tmp_path / "a" / "b").out
    assert f"curves: {tmp_path / 'a' / 'b' / 'certified_accuracy.png'}" in out
    picture = matplotlib.image.imread(tmp_path / "a" / "b" / "certified_accuracy.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 600
    blue = np.abs(picture[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    assert blue.sum() > 200  # a curve is drawn


def test_labels_tell_files_apart(tmp_path):
    runs = tmp_path / "runs"
    assert short_labels([runs / "a", runs / "b"]) == ["a", "b"]
    assert short_labels([runs / "a" / "certificates.tsv", runs / "b" / "x.tsv"]) == ["a", "b/x"]
    assert short_labels([tmp_path / "one.tsv"]) == ["one"]
    assert len(set(short_labels([runs / "a" / "certificates.tsv", runs / "a"]))) == 2


def test_a_file_without_a_last_newline_is_read_when_nothing_can_be_missing(field):
    field.write_text(FIELD.rstrip("\n"))
    assert len(read_certificates(field).idx) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; certify some images"),
        ("1.0\n2.0\n", "column idx, label, predict, radius, correct is missing"),
        (FIELD.replace("radius", "r"), "column radius is missing"),
        (FIELD.splitlines()[0] + "\n", "has no images yet"),
        (FIELD.replace("0.5\t1", "nan\t1"), "image 5: radius=nan; expected a finite number of at least 0"),
        (FIELD.replace("0.5\t1", "inf\t1"), "image 5: radius=inf; expected a finite number"),
        (FIELD.replace("0.5\t1", "-0.5\t1"), "image 5: radius=-0.5; expected a finite number"),
        (FIELD.replace("0.5\t1", "half\t1"), "line 3: radius='half' is not a number"),
        (FIELD.replace("0.5\t1", "0.5\tyes"), "line 3: correct='yes' is not a whole number"),
        (FIELD.replace("0.5\t1", "0.5\t2"), "image 5: correct=2; expected 1 where predict is label"),
        (FIELD.replace("\t0.75\t0\t", "\t0.75\tTrue\t"), "image 10: correct=1; expected 1 where predict is label"),
        (FIELD.replace("0\t7\t7\t", "0\t7.5\t7\t"), "line 2: label='7.5' is not a whole number"),
        (FIELD.replace("0\t7\t7\t", "0\tTrue\t7\t"), "line 2: label='True' is not a whole number"),
        (FIELD.replace("\t7\t7\t", "\t7\t1e30\t"), "line 2: predict='1e30' is not a whole number"),
        (FIELD.replace("0\t-1\t0.0\t0", "0\t-1\t0.0\tTrue"), "line 5: correct=1, but predict=-1 is never correct"),
        (FIELD.replace("0\t-1\t0.0\t0", "-1\t-1\t0.0\t1"), "line 5: correct=1, but predict=-1 is never correct"),
        (FIELD.replace("\t-1\t", "\t-2\t"), "image 15: predict=-2; expected a class, or -1"),
        (FIELD.replace("15\t0", "5\t0"), "line 5: image 5 for the second time, first in line 3"),
        (OURS + OURS.splitlines()[1] + "\n", "line 3, is not what this program wrote ('0\\t7"),
        (OURS + OURS.splitlines()[1] + "\n", "image 0 for the second time, first in line 2"),
        (OURS.replace("\t", ","), "not those of this program; use another file"),
        (FIELD[:-17], "line 5: 3 columns instead of 6; is it cut off?"),
        (
            OURS.replace("\t1000\t0\t7\n", "\tmany\t0\t7\n"),
            "line 2, is not what this program wrote ('0\\t7\\t7\\t1.000000",
        ),
        (OURS[:-1], "the last line is cut off; run certify.py again"),
        (OURS[:-6], "the last line is cut off"),
    ],
)
def test_files_that_cannot_be_trusted(program, field, content, message):
    field.write_text(content)
    error = program.fails("cli.analyze", field)
    assert message in error and str(field) in error
    assert program.out == ""


def test_bad_arguments(program, field, tmp_path):
    assert "does not exist; give a workdir" in program.fails("cli.analyze", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "nor any other file of certificates; make it" in program.fails("cli.analyze", tmp_path / "empty")
    assert "radii: -1.0 is not a radius" in program.fails("cli.analyze", field, "--radii=-1")
    assert "give a folder" in program.fails("cli.analyze", field, "--output=figure.png")
    assert "the following arguments are required: PATH" in program.fails("cli.analyze")
    assert "alpha=2.0: use a number in (0, 1)" in program.fails("cli.analyze", field, "--alpha=2")
    assert "delta=0.0: use a number in (0, 1)" in program.fails("cli.analyze", field, "--joint", "--delta=0")
    assert "bound='wald' is unknown; use one of clopper" in program.fails("cli.analyze", field, "--bound=wald")
    assert "Not a directory" in program.fails("cli.analyze", field, "--output=/dev/null/figures")


def test_a_reader_that_goes_away_is_no_error(field):
    process = start("analyze.py", field)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=60) == EXIT_BROKEN_PIPE


@pytest.mark.parametrize(
    "written",
    [
        FIELD.replace("\t1\t0:", "\tTrue\t0:").replace("\t0\t0:", "\tFalse\t0:"),
        FIELD.replace("\t1\t0:", "\t1.0\t0:").replace("\t7\t7\t", "\t7.0\t7.0\t").replace("\t-1\t", "\t-1.0\t"),
        FIELD.replace("\t", ","),
        FIELD.replace("\t", " ; ").replace("\n", "\r\n"),
        FIELD.replace("idx", "\ufeff idx").replace("\t7\t", "\t 7 \t"),
        "".join(f"{number},{line}\n" for number, line in enumerate(FIELD.replace("\t", ",").splitlines())),
    ],
    ids=["true", "floats", "commas", "semicolons", "spaces", "numbered"],
)
def test_what_other_programs_write(field, written):
    expected = read_certificates(field)
    field.write_text(written)
    table = read_certificates(field)
    for column, wanted in zip(table, expected, strict=True):
        np.testing.assert_array_equal(column, wanted)
    assert table.correct.tolist() == [1, 1, 0, 0] and table.correct.dtype == table.idx.dtype == np.int64


def test_an_image_without_a_label_is_no_correct_abstention(field):
    field.write_text(FIELD.replace("15\t0\t-1", "15\t-1\t-1"))
    assert read_certificates(field).correct.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "header", ["idx\tlabel\tpredict\tcorrect\ttime", "idx\tlabel\tpredict\tbasePredict\tcorrect\ttime"]
)
def test_logs_of_predictions(field, header):
    base = "\t3" * ("base" in header)
    rows = [line.split("\t") for line in FIELD.splitlines()[1:]]
    lines = ["\t".join(row[:3]) + base + "\t" + "\t".join(row[4:]) for row in rows]
    field.write_text("\n".join([header, *lines]) + "\n")
    table = read_certificates(field)
    assert (
        table.mode == "predict" and table.predict.tolist() == [7, 2, 8, -1] and table.correct.tolist() == [1, 1, 0, 0]
    )
    assert table.radius.tolist() == [0, 0, 0, 0] and table.radius.dtype == np.float64


def test_a_folder_stands_for_its_certificate_files(program, tmp_path):
    logs = tmp_path / "logs"
    (logs / "deeper").mkdir(parents=True)
    written = {"b.csv": FIELD.replace("\t", ","), "noise_0.50": FIELD, "a.tsv": FIELD, "deeper/c.tsv": FIELD}
    written |= {"log.txt": "epoch\ttime\tlr\n", "a.json": '{"idx": 0}', ".hidden.tsv": FIELD, "empty.txt": ""}
    for name, text in written.items():
        (logs / name).write_text(text)
    (logs / "z.tsv.gz").write_bytes(gzip.compress(FIELD.encode()))
    (logs / "a.tsv.gz").write_bytes(gzip.compress(FIELD.encode()))  # beside the same file unpacked
    (logs / "network.pt").write_bytes(bytes(range(256)))
    summaries = json.loads(program.succeeds("cli.analyze", logs, logs / "a.tsv", "--format=json").out)
    names = [logs / name for name in ("a.tsv", "b.csv", "noise_0.50", "z.tsv.gz", "a.tsv")]
    assert [summary["path"] for summary in summaries] == list(map(str, names))
    assert {summary["acr"] for summary in summaries} == {0.5}


def test_a_packed_file_cannot_fill_the_memory(program, field, monkeypatch):
    packed = field.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(FIELD.encode()))
    monkeypatch.setattr(read, "_UNPACKED", len(FIELD))
    assert len(read_certificates(packed).idx) == 4
    monkeypatch.setattr(read, "_UNPACKED", len(FIELD) - 1)
    assert "field.tsv.gz unpacks to more than 1" in program.fails("cli.analyze", packed)
    monkeypatch.undo()
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "field.tsv.gz cannot be unpacked" in program.fails("cli.analyze", packed)


def test_seconds_and_mode(field):
    field.write_text(FIELD.replace("0:00:00.298455", "1.5").replace("0:00:00.3", "unknown"))
    table = read_certificates(field)
    np.testing.assert_array_equal(table.seconds, [1.393193, 1.5, np.nan, 60.3])
    assert table.mode == "certify"
    field.write_text("\n".join(line.rpartition("\t")[0] for line in FIELD.splitlines()))
    assert np.isnan(read_certificates(field).seconds).all()
    field.write_text(OURS)
    assert read_certificates(field).seconds == [1.393193]

"""analyze.py: measures by hand, formats, pictures, and files that cannot be trusted."""

import csv
import gzip
import io
import json

import matplotlib.image
import numpy as np
import pytest
from scipy import special, stats

from rs_consistency.certificates import read
from rs_consistency.certificates.columns import CERTIFY, DECIDE, PREDICT, make_rows
from rs_consistency.certificates.measures import best_at, lower_of_label, summarize, votes_for_label
from rs_consistency.certificates.proof import Evidence, load
from rs_consistency.certificates.record import Settings
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import EXIT_BROKEN_PIPE
from rs_consistency.report.plots import short_labels
from rs_consistency.statistics.bounds import certified_radius, lower_confidence_bound
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
        "mode": "certify",
        "n_images": 4,
        "acr": 0.5,  # (1.5 + 0.5) / 4: the error's radius does not count
        "accuracy": 0.5,
        "abstention": 0.25,
        "seconds": pytest.approx(1.393193 + 0.298455 + 0.3 + 60.3),
        "certified_accuracy": {"0": 0.5, "0.5": 0.5, "0.51": 0.25, "1.5": 0.25},
        "best": dict.fromkeys(["0", "0.5", "0.51", "1.5"]),  # a single file
        # Another program's file tells nothing of its votes, nor when it is finished.
        **dict.fromkeys(["finished", "radius", "sigma", "n", "alpha", "bound", "radius_ceiling", "at_ceiling", "hard"]),
        **dict.fromkeys(["base_accuracy", "acr_two_class", "acr_at_tenth", "votes"]),
        "p_true": dict.fromkeys(["0.05", "0.25", "0.5", "0.75", "0.95"]),
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
    assert len(load(field)[0].idx) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; certify some images"),
        ("1.0\n2.0\n", "column idx, label, predict, radius, correct is missing"),
        (FIELD.replace("radius", "r"), "column radius is missing"),
        (FIELD.splitlines()[0] + "\n", "has no images yet"),
        (FIELD.splitlines()[0] + "\n\n\t\t\n", "has no images yet"),
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
    for flag, needs in (("--delta=0.1", "--joint"), ("--no_network", "--output=FOLDER"), ("--data_dir=x", "--output=")):
        assert f"{flag.partition('=')[0]} needs another flag; add {needs}" in program.fails("cli.analyze", field, flag)
    error = program.fails("cli.analyze", field, "--match_images=x", "--format=json")
    assert "match_images: format=json has no comparisons; use text or markdown" in error
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
    expected = load(field)[0]
    field.write_text(written)
    table = load(field)[0]
    for column, wanted in zip(table, expected, strict=True):
        np.testing.assert_array_equal(column, wanted)
    assert table.correct.tolist() == [1, 1, 0, 0] and table.correct.dtype == table.idx.dtype == np.int64


def test_an_image_without_a_label_is_no_correct_abstention(field):
    field.write_text(FIELD.replace("15\t0\t-1", "15\t-1\t-1"))
    assert load(field)[0].correct.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "header", ["idx\tlabel\tpredict\tcorrect\ttime", "idx\tlabel\tpredict\tbasePredict\tcorrect\ttime"]
)
def test_logs_of_predictions(field, header):
    base = "\t3" * ("base" in header)
    rows = [line.split("\t") for line in FIELD.splitlines()[1:]]
    lines = ["\t".join(row[:3]) + base + "\t" + "\t".join(row[4:]) for row in rows]
    field.write_text("\n".join([header, *lines]) + "\n")
    table = load(field)[0]
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
    monkeypatch.setattr(read, "_MOST_BYTES", len(FIELD))
    assert len(load(packed)[0].idx) == 4
    monkeypatch.setattr(read, "_MOST_BYTES", len(FIELD) - 1)
    assert "field.tsv.gz unpacks to more than 1" in program.fails("cli.analyze", packed)
    monkeypatch.undo()
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "field.tsv.gz cannot be unpacked" in program.fails("cli.analyze", packed)


def test_seconds_and_mode(field):
    field.write_text(FIELD.replace("0:00:00.298455", "1.5").replace("0:00:00.3", "unknown"))
    table = load(field)[0]
    np.testing.assert_array_equal(table.seconds, [1.393193, 1.5, np.nan, 60.3])
    assert table.mode == "certify"
    field.write_text("\n".join(line.rpartition("\t")[0] for line in FIELD.splitlines()))
    assert np.isnan(load(field)[0].seconds).all()
    field.write_text(OURS)
    assert load(field)[0].seconds == [1.393193]


N, SIGMA, ALPHA = 1000, 0.5, 0.001
# label, selected, votes for the selected class, most for another, for the label
COUNTS = [
    (7, 7, 1000, 0, 1000),
    (2, 2, 990, 6, 990),
    (1, 8, 700, 250, 40),
    (3, 3, 450, 180, 450),
    (0, 0, 560, 440, 560),
]


def rows_of(counts, votes=N):
    label, selected, count, runner_up, of_label = np.array(counts).T
    radius = np.floor(1e6 * certified_radius(count, votes, ALPHA, SIGMA)) / 1e6
    predict = np.where(lower_confidence_bound(count, votes, ALPHA) >= 0.5, selected, -1)
    columns = {"idx": np.arange(len(counts)), "label": label, "predict": predict, "radius": radius, "time": 0.25}
    columns |= {"count0": 20, "count": count, "count_runner_up": runner_up, "selected": selected}
    return make_rows(**columns, count_label=of_label, votes=votes)


def write(path, schema, rows, **identity):
    """A finished file with its record."""
    identity = {"n": N, "sigma": SIGMA, "alpha": ALPHA, "seed": 0, "parameter_digest": "0", **identity}
    about = {"about": {"device": "", "versions": {}}, "selection": Selection(len(rows))}
    file = CertificateFile(path, schema=schema, identity=identity, **about)
    file.append(rows)
    file.finish()
    file.close()
    return path


@pytest.fixture
def counted(tmp_path):
    return write(tmp_path / "counted.tsv", CERTIFY, rows_of(COUNTS), n0=20, bound="clopper_pearson")


def summary_of(program, *args):
    (summary,) = json.loads(program.succeeds("cli.analyze", *args, "--format=json").out)
    return summary


def test_measures_of_votes_by_hand(program, counted):
    found = summary_of(program, counted)
    assert (found["sigma"], found["n"], found["alpha"], found["bound"]) == (SIGMA, N, ALPHA, "clopper_pearson")
    assert found["at_ceiling"] == 1 / 5 and found["hard"] == 2 / 5  # 40 and 450 votes for the label
    assert found["base_accuracy"] == pytest.approx((1000 + 990 + 40 + 450 + 560) / 5 / N)
    assert found["accuracy"] == 3 / 5 and found["abstention"] == 1 / 5
    assert found["votes"] == 5 * (20 + N) and found["seconds"] == 5 * 0.25
    assert found["p_true"] == {"0.05": 0.04, "0.25": 0.45, "0.5": 0.56, "0.75": 0.99, "0.95": 1.0}
    assert found["acr"] == pytest.approx(np.mean(certified_radius([1000, 990, 0, 450, 560], N, ALPHA, SIGMA)), abs=1e-6)
    # alpha divided 99 to 1, the others at most 1 - p_A: 450 votes against 180 certify, and 700 are still wrong.
    quantile = special.ndtri
    lower = [0.00099 ** (1 / N), *(stats.beta.ppf(0.00099, k, N - k + 1) for k in (990, 450, 560))]
    upper = [stats.beta.ppf(1 - 0.00001, k + 1, N - k) for k in (0, 6, 180, 440)]
    radii = [SIGMA / 2 * (quantile(p) - quantile(min(q, 1 - p))) for p, q in zip(lower, upper, strict=True)]
    assert radii[2] > 0.1 and found["acr_two_class"] == pytest.approx(sum(radii) / 5, abs=1e-6)
    assert found["acr_two_class"] == summary_of(program, counted, "--bound=two_class")["acr"]
    assert summary_of(program, counted, "--bound=two_class")["acr_two_class"] is None


def test_the_acr_of_a_tenth_of_the_votes_is_its_expectation(program, counted):
    drawn, fewer = np.arange(N // 10 + 1), N // 10
    radii = certified_radius(drawn, fewer, ALPHA, SIGMA)
    expected = [radii @ stats.hypergeom(N, count, fewer).pmf(drawn) for count in (1000, 990, 450, 560)]
    found = summary_of(program, counted)["acr_at_tenth"]
    assert found == pytest.approx(sum(expected) / 5, abs=2e-4)
    share_kept = certified_radius([100, 99, 45, 56], fewer, ALPHA, SIGMA)
    assert found > sum(share_kept) / 5 + 1e-3  # the mean of the radii is not the radius of the mean
    assert summary_of(program, counted, "--bound=two_class")["acr_at_tenth"] is None


def test_files_without_the_votes_of_the_label_bound_them(program, counted):
    lines = [line.rsplit("\t", 2)[0] + "\n" for line in counted.read_text().splitlines()]
    older = counted.with_name("older.tsv")
    older.write_text("".join(lines))
    record = json.loads(counted.with_suffix(".json").read_text())
    del record["finished"]
    older.with_suffix(".json").write_text(json.dumps(record))
    votes, known = votes_for_label(load(older)[1])
    assert votes.tolist() == [1000, 990, 250, 450, 560] and known.tolist() == [True, True, False, True, True]
    new, old = summary_of(program, counted), summary_of(program, older)
    assert old["base_accuracy"] is None and new["base_accuracy"] is not None
    changed = {"path", "finished", "base_accuracy", "p_true"}
    assert {key: old[key] for key in old.keys() - changed} == {key: new[key] for key in new.keys() - changed}
    assert old["p_true"]["0.05"] == 0.25 >= new["p_true"]["0.05"]
    # The bound of the true class is that of its own votes, whichever class was selected.
    lower = lower_of_label(load(counted)[1])
    np.testing.assert_array_equal(lower, lower_confidence_bound([1000, 990, 40, 450, 560], N, ALPHA))


def test_images_with_different_numbers_of_votes(tmp_path):
    rows = [*rows_of(COUNTS[:1]), *rows_of([(2, 2, 200, 0, 200)], votes=200), *rows_of([(2, 2, 90, 9, 90)], votes=200)]
    settings = Settings(SIGMA, 2 * N, ALPHA, 0, n0=20, bound="clopper_pearson", tolerance=0.1)
    count, votes = np.array([1000, 200, 90]), np.array([N, 200, 200])
    table = load(write(tmp_path / "a.tsv", PREDICT, predictions(), image_shape=[1, 1, 1]))[0]
    evidence = Evidence(settings, ALPHA, rows, count, votes, np.zeros(3))
    (found,) = summarize([tmp_path], [(table, evidence)], [{}])
    assert found["at_ceiling"] == 2 / 3 and found["hard"] == 1 / 3 and found["votes"] == 3 * 20 + N + 400
    assert found["base_accuracy"] == pytest.approx((1 + 1 + 0.45) / 3) and found["p_true"]["0.05"] == 0.45
    assert found["radius_ceiling"] == certified_radius(N, N, ALPHA, SIGMA)  # no image had 2 N votes
    fewer = certified_radius([N // 10, 20], [N // 10, 20], ALPHA, SIGMA)  # all agree, however they are drawn
    assert found["acr_at_tenth"] == pytest.approx(fewer.sum() / 3, abs=1e-12)


def predictions():
    counts = {"count": 900, "count_runner_up": 60, "p_value": 1e-9, "count_label": [900, 40]}
    return make_rows(idx=[0, 1], label=[7, 2], predict=7, radius=0.0, time=0.25, **counts)


def decisions():
    counts = {
        "count0": 20,
        "count": [1000, 500],
        "votes": N,
        "selected": [7, 2],
        "decision": ["certified", "undecided"],
    }
    return make_rows(idx=[0, 1], label=[7, 2], predict=[7, -1], radius=[0.3, 0.0], time=0.25, **counts)


def test_decisions_and_predictions_have_no_acr_and_no_opponent(program, counted, tmp_path):
    decided = write(tmp_path / "decided.tsv", DECIDE, decisions(), n0=20, radius=0.3, look_every=100)
    predicted = write(tmp_path / "predicted.tsv", PREDICT, predictions())
    for path, mode, radius, abstention in ((decided, "decide", 0.3, 0.5), (predicted, "predict", None, 0.0)):
        found = summary_of(program, path, "--radii", 0, 0.25)
        assert (found["mode"], found["radius"], found["accuracy"]) == (mode, radius, 0.5)
        assert (found["acr"], found["abstention"], found["seconds"]) == (None, abstention, 0.5)
        assert found["certified_accuracy"] == found["best"] == {"0": None, "0.25": None}
    files, folder = [counted, decided, predicted], tmp_path / "report"
    out = program.succeeds("cli.analyze", *files, "--radii", 0.25, f"--output={folder}", "--no_network").out
    cells = [line.split("  ") for line in out.splitlines()[:4]]
    table = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    assert table[0] == ["path", "mode", "images", "ACR", "ACR two-class", "accuracy", "abstention", "r=0.25"]
    assert table[2][1:] == ["decide at 0.3", "2", "-", "-", "0.5000", "0.5000", "-"]
    assert table[3][1:] == ["predict", "2", "-", "-", "0.5000", "0.0000", "-"]
    assert not (folder / "comparison.png").exists() and "curves: " in out
    page = (folder / "report.html").read_text()
    for name, mode in (("decided", "decide"), ("predicted", "predict")):
        assert f"{name} has no ACR, no curves and no images: its mode is {mode}, not certify" in page
    alone = program.succeeds("cli.analyze", decided, predicted, f"--output={tmp_path / 'alone'}", "--no_network").out
    assert "ACR two-class" not in alone and "curves: " not in alone
    assert not list((tmp_path / "alone").glob("*.png")) and (tmp_path / "alone" / "report.html").is_file()


def test_the_best_of_several_files_of_the_same_images(program, field, tmp_path):
    other = tmp_path / "other.tsv"
    first, *lines = FIELD.replace("\t1.5\t", "\t0.25\t").replace("\t0.5\t", "\t2.5\t").splitlines()
    other.write_text("\n".join([first, *reversed(lines)]) + "\n")  # in another order
    command = ["cli.analyze", field, other, "--radii", 0, 0.5, 1, 2, 3]
    one, two = json.loads(program.succeeds(*command, "--format=json").out)
    assert one["best"] == {"0": True, "0.5": True, "1": True, "2": False, "3": False}
    assert two["best"] == {"0": True, "0.5": False, "1": True, "2": True, "3": False}
    out = program.succeeds(*command).out.splitlines()
    assert out[3].split() == ["best", "4", "-", "0.5000", "-", "0.500", "0.500", "0.250", "0.250", "0.000"]
    assert out[5:] == [f"best at r=0, 0.5, 1: {field}", f"best at r=0, 1, 2: {other}"]
    tables = [load(path)[0] for path in (field, other)]
    assert best_at(tables, [1.0], [None, "a"]) == [{"1": True}] * 2
    unknown = [{"1": None}] * 2
    assert best_at(tables, [1.0], ["a", "b"]) == unknown
    assert best_at([tables[0], tables[1]._replace(label=tables[1].label + 1)], [1.0], [None, None]) == unknown
    assert best_at([tables[0], tables[1]._replace(mode="decide")], [1.0], [None, None]) == unknown


def test_which_acr_to_quote_is_said_once(program, counted):
    said = "Quote one of the two ACRs, chosen before you look; they are not valid together at alpha."
    assert program.succeeds("cli.analyze", counted, counted).out.count(said) == 1
    assert said in program.succeeds("cli.analyze", counted, "--format=markdown").out
    assert said not in program.succeeds("cli.analyze", counted, "--bound=randomized").out

"""analyze.py --output: the report's numbers by other means, what it leaves out and says, a page without links."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from rs_consistency import data, noise
from rs_consistency.certificates.measures import summarize
from rs_consistency.certificates.proof import load
from rs_consistency.certificates.read import Certificates
from rs_consistency.models import create_model
from rs_consistency.report import figures, formats, plots
from rs_consistency.report.contents import compare, subject
from tests.helpers import ROOT, final_params, grid_draws

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def field_file(path, radii, *, labels=None, indices=None):
    """Another program's file; a negative radius is one of a wrong class."""
    labels = [3] * len(radii) if labels is None else labels
    indices = range(len(radii)) if indices is None else indices
    lines = [
        f"{i}\t{label}\t{label if radius >= 0 else label + 1}\t{abs(radius):.6f}\t{int(radius >= 0)}\t0:00:01\n"
        for i, label, radius in zip(indices, labels, radii, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + "".join(lines))
    return path


def of_file(path, label):
    return subject(label, path, load(path)[0], None)


class Page(html.parser.HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.text = path.read_text(), [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.text += text

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(folder):
    """The page of a report: whole, self-contained, with every figure that lies beside it, each with a text."""
    page = Page(folder / "report.html")
    assert not {"script", "link", "iframe", "object", "a", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"href", "srcset", "style", "onload"} & set(attributes)
    assert "http:" not in page.source and "https:" not in page.source and "url(" not in page.source
    assert page.of("meta")[1]["content"].startswith("default-src 'none'; img-src data:")
    embedded = []
    for image in page.of("img"):
        kind, content = image["src"].split(",")
        assert kind == "data:image/png;base64" and len(image["alt"]) > 40
        embedded.append(base64.b64decode(content))
    pictures = sorted(folder.glob("*.png"))
    assert sorted(embedded) == sorted(path.read_bytes() for path in pictures)
    for path in pictures:
        assert f"{path.name}, {path.with_suffix('.pdf').name}" in page.text
        if "pdf" in plots.FORMATS:
            assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert not list(folder.glob(".*"))  # nothing half written
    return page


def figures_of(folder):
    return sorted(path.stem for path in folder.glob("*.png"))


def certify(workdir, **options):
    from rs_consistency.cli import certify

    words = [
        f"--{name}={value}" for name, value in {"n0": 10, "n": 100, "batch_size": 64, "skip": 4, **options}.items()
    ]
    certify.main([f"--workdir={workdir}", *words])


@pytest.fixture(autouse=True)
def png_alone(request, monkeypatch):
    """Half of a figure's time is its PDF: the report of two runs has them, the others do without."""
    if "report" not in request.fixturenames:
        monkeypatch.delitem(plots.FORMATS, "pdf")


@pytest.fixture(scope="module")
def two_runs(toy_trained, tmp_path_factory):
    """A run, certified on 15 images at its sigma and, as a second run, at half of it; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {"whole": {}, "half": {"sigma": 0.25}}.items():
        shutil.copytree(toy_trained, folder / name)
        certify(folder / name, **options)
    return folder


@pytest.fixture(scope="module")
def report(two_runs, tmp_path_factory):
    from rs_consistency.cli import analyze

    folder = tmp_path_factory.mktemp("report")
    analyze.main([str(two_runs / "whole"), str(two_runs / "half"), f"--output={folder}", "--radii", "0", "0.5"])
    return folder


def test_a_report_of_two_runs(report, two_runs):
    page = check_page(report)
    assert figures_of(report) == [
        "acr",
        "certified_accuracy",
        "comparison",
        "gained_lost",
        "images_1",
        "images_2",
        "margins",
        "p_a",
        "training",
    ]
    assert "Certificates of whole, half" in page.text and "What is missing" not in page.text
    assert "computed again" not in page.text and "linear" in page.text and "clopper_pearson" in page.text
    measured = list(csv.DictReader(io.StringIO((report / "measures.csv").read_text())))
    for line, name in zip(measured, ("whole", "half"), strict=True):
        table = load(two_runs / name)[0]
        radii = table.radius * table.correct
        assert (line["run"], float(line["acr"])) == (name, radii.mean())
        expected = stats.bootstrap((radii,), np.mean, method="percentile", n_resamples=10_000, rng=7)
        # Another seed of 10,000 resamples moves an end by about 2 % of the standard error.
        for end, found in zip(expected.confidence_interval, (line["acr_low"], line["acr_high"]), strict=True):
            assert float(found) == pytest.approx(end, abs=0.15 * expected.standard_error)
        assert f"{float(line['acr']):.4f}" in page.text


def test_the_tables_say_the_same_in_every_format(report):
    markdown, latex = (report / "tables.md").read_text(), (report / "tables.tex").read_text()
    assert markdown.count("\n| --- |") == latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 4
    acr = next(csv.DictReader(io.StringIO((report / "measures.csv").read_text())))["acr"]
    assert f"| whole | 15 | {float(acr):.4f} |" in markdown
    assert rf"whole & 15 & {float(acr):.4f} & " in latex and r"95 \% interval" in latex and "ACR two-class" in latex
    assert "| method | gaussian | gaussian |" in markdown and "| sigma | 0.5 | 0.25 |" in markdown


def test_differences_are_those_of_the_files(report, two_runs):
    first, second = (load(two_runs / name)[0] for name in ("whole", "half"))
    difference = first.radius * first.correct - second.radius * second.correct
    (line,) = csv.DictReader(io.StringIO((report / "comparisons.csv").read_text()))
    assert float(line["mean"]) == pytest.approx(difference.mean())
    assert float(line["standard_error"]) == pytest.approx(stats.sem(difference))
    assert (int(line["gained"]), int(line["lost"])) == ((difference > 0).sum(), (difference < 0).sum())
    images = list(csv.DictReader(io.StringIO((report / "differences.csv").read_text())))
    found = [float(line["difference"]) for line in images]
    assert found == sorted(difference, reverse=True) and len(found) == 15
    assert {int(line["image"]): float(line["difference"]) for line in images} == dict(
        zip(first.idx.tolist(), difference.tolist(), strict=True)
    )


def test_margins_and_votes_are_the_networks(two_runs, report):
    from rs_consistency.report import samples

    one = of_file(two_runs / "whole", "whole")
    asked = samples.ask(one, samples.open_images(one), images=2, copies=3)
    params, split = final_params(two_runs / "whole"), data.load("mnist", "test")
    model = create_model("linear", num_classes=10)

    def by_hand(images, labels):
        logits = np.asarray(model.apply({"params": params}, images))
        return np.array([line[y] - max(np.delete(line, y)) for line, y in zip(logits, labels, strict=True)])

    table = one.certificates
    images, labels = split.images[table.idx] / np.float32(255), split.labels[table.idx]
    # Rounding in the folded network: logits here are of the order 1.
    np.testing.assert_allclose(asked.clean_margins, by_hand(images, labels), atol=1e-4)
    clean = f"{np.mean(by_hand(images, labels) > 0):.4f}"
    (line,) = [line for line in (report / "tables.md").read_text().splitlines() if line.startswith("| whole | 0.5 |")]
    assert line.split(" | ")[8] == clean
    key = noise.stream_key(0, noise.Stream.REPORT)
    for copy in range(3):
        draws = np.asarray(grid_draws(key, table.idx, 1, copy, shape=(28, 28, 1), sigma=0.5)) / 255
        np.testing.assert_allclose(asked.noisy_margins[copy], by_hand(images + draws, labels), atol=1e-4)
    deviations = [np.std(asked.noisy_margins[:, i], ddof=1) for i in range(15)]
    assert asked.within() == pytest.approx(np.sqrt(np.mean(np.square(deviations))))
    robust = np.where(table.correct == 1, 1, -1) * table.radius
    assert asked.least == 2 and len(asked.shown) == 4
    np.testing.assert_array_equal(robust[np.searchsorted(table.idx, asked.shown)], np.sort(robust)[[0, 1, -2, -1]])
    np.testing.assert_array_equal(asked.images, split.images[asked.shown] / np.float32(255))
    assert asked.votes.sum(axis=1).tolist() == [samples.VOTES] * 4
    # The noise that is shown is that of the first votes: a class that is shown has a vote.
    assert all(asked.votes[row, label] for row in range(4) for label in asked.classes[row])
    assert (asked.copies[0, 0] != asked.copies[0, 1]).any()


def test_no_image_is_both_least_and_most_robust():
    from rs_consistency.report.samples import _extremes

    for number in range(1, 12):
        least, most = _extremes(np.arange(number)[::-1].astype(float), 3)
        assert len({*least, *most}) == len(least) + len(most) == min(number, 6)
        assert least[0] == number - 1


def test_the_same_report_is_the_same_bytes_and_old_files_are_replaced(program, two_runs, report, tmp_path):
    shutil.copytree(report, tmp_path / "again")
    (tmp_path / "again" / "report.html").write_text("old")
    (tmp_path / "again" / "mine.txt").write_text("stays")
    command = [two_runs / "whole", two_runs / "half", "--radii", 0, 0.5]
    program.succeeds("cli.analyze", *command, f"--output={tmp_path / 'again'}")
    assert {path.name: path.read_bytes() for path in report.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.name != "mine.txt"
    }


def test_other_alphas_and_bounds_are_shown_and_said(program, two_runs, tmp_path):
    options = ["--alpha=0.05", "--bound=two_class", "--bonferroni", "--joint", "--no_network", "--format=json"]
    out = program.succeeds("cli.analyze", two_runs / "whole", *options, f"--output={tmp_path}").out
    page = check_page(tmp_path)
    told = "with alpha = 0.05, bound = two_class, alpha divided by the number of images of the file (Bonferroni):"
    assert f"The radii were computed again from the counts, {told} they are not those of the files." in page.text
    (summary,) = json.loads(out)
    assert summary["alpha"] == pytest.approx(0.05 / 15)
    settings = next(part for part in (tmp_path / "tables.md").read_text().split("\n\n") if "| setting |" in part)
    assert "| alpha | 0.003333 |" in settings and "| bound | two_class |" in settings
    assert f"{summary['acr']:.4f}" in page.text and "new images" in page.text
    assert figures_of(tmp_path) == ["acr", "certified_accuracy", "p_a", "training"]


def test_files_of_other_programs_without_jax(tmp_path):
    field_file(tmp_path / "b" / "second.tsv", [1.0, 0.5, -2.0, 0.25, 0.0])
    (tmp_path / "b" / "second.json").write_text("not of this program, and no JSON")
    paths = [field_file(tmp_path / "a.tsv", [1.5, 0.25, 0.5, 0.25, 0.0]), tmp_path / "b" / "second.tsv"]
    command = f"import sys; from rs_consistency.cli import analyze; analyze.main({[*map(str, paths)]} + sys.argv[1:])"
    told = f"{command}; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", told, f"--output={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.endswith("False\n")
    page = check_page(tmp_path / "out")
    assert figures_of(tmp_path / "out") == ["acr", "certified_accuracy", "comparison"]
    assert "a.tsv has no record of certify.py" in page.text
    assert "second.json is damaged" in page.text and done.stderr.count("note: ") == 1
    (line,) = csv.DictReader(io.StringIO((tmp_path / "out" / "comparisons.csv").read_text()))
    assert (line["gained"], line["lost"], float(line["mean"])) == ("2", "1", pytest.approx((0.5 - 0.25 + 0.5) / 5))
    assert "| 0, 2 | 1 |" in (tmp_path / "out" / "tables.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("checkpoints", "has no checkpoint yet"),
        ("newest", "is of another checkpoint (step 14) than the newest of"),
        ("dataset", "is not prepared"),
        ("other data", "mnist (test) is not the data that"),
        ("elsewhere", "lies in no run's folder"),
        ("metrics", "metrics.jsonl, line 1 is damaged"),
    ],
)
def test_what_is_missing_of_a_run_is_one_note(program, two_runs, tmp_path, monkeypatch, damage, message):
    run = shutil.copytree(two_runs / "whole", tmp_path / "run")
    path = run
    if damage == "checkpoints":
        shutil.rmtree(run / "checkpoints")
    elif damage == "newest":
        shutil.rmtree(run / "checkpoints" / "14")
    elif damage == "dataset":
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    elif damage == "other data":
        record = json.loads((run / "certificates.json").read_text())
        (run / "certificates.json").write_text(json.dumps({**record, "data_digest": "0"}))
    elif damage == "elsewhere":
        for path in run.glob("certificates.*"):
            shutil.copy(path, tmp_path)
        path = tmp_path / "certificates.tsv"
    else:
        (run / "metrics.jsonl").write_text("{}\n")
    options = (
        ["--no_network"] if damage == "metrics" else []
    )  # whose figures take long, and are the other cases' subject
    program.succeeds("cli.analyze", path, *options, f"--output={tmp_path / 'out'}")
    notes = [line for line in program.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and message in notes[0]
    page = check_page(tmp_path / "out")
    assert message in page.text and "What is missing" in page.text
    of_training = set() if damage in ("metrics", "elsewhere") else {"training"}
    assert set(figures_of(tmp_path / "out")) == {"acr", "certified_accuracy", "p_a"} | of_training


HOSTILE = [
    "a|b",
    "*a* _b_ `c`",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1)) ![y](z)",
    "a\nb\r\n| 1 | 2 |",
    "\x1b[2J\x1b]0;title\x07",
    "\u202etxt.exe\u2028",
    "\udcff",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "-1+1",
    '"a",b',
    "\\|$\\|&lt;~~x~~",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_markup_a_formula_or_a_command(name):
    table = [["run", "ACR"], [name, "1.0"]]
    written = [formats.aligned(table), formats.markdown(table), formats.latex(table), formats.markdown_text(name)]
    written += [formats.csv_text([{"run": name, "acr": -1.0}])]
    for text in written:
        assert all(line.isprintable() for line in text.split("\n"))
        text.encode()
    text, markdown, latex, _, csv_text = written
    assert len(text.splitlines()) == 2 and len(markdown.splitlines()) == 3 and len(latex.splitlines()) == 7
    (cell, last) = re.fullmatch(r"\| (.*) \| (1\.0) \|", markdown.splitlines()[2]).groups()
    plain = re.sub(r"\\(.)", "", cell)  # without the escaped characters nothing is left of any markup
    assert last == "1.0" and not set(plain) & set("|*`<>[]\\~&$") and not re.search(r"\b_|_\b|^_|_$| _|_ ", plain)
    assert re.sub(r"\\(.)", r"\1", cell) == formats.plain_text(name)  # and it is all there
    header, row = csv.reader(io.StringIO(csv_text))
    assert header == ["run", "acr"] and row[1] == "-1.0" and not row[0].startswith(("=", "+", "-", "@"))


def test_labels_are_shown_as_they_are(program, tmp_path):
    names = ["<script>alert(1)</script>", 'a"b&c', "_hidden|$x$_%{}^~\\", "$\\broken{$"]
    paths = [field_file(tmp_path / name.replace("/", "\u2215") / "f.tsv", [0.5, 1.0]) for name in names]
    paths.append(paths[1])  # twice
    program.succeeds("cli.analyze", *paths, f"--output={tmp_path / 'out'}")
    page = check_page(tmp_path / "out")
    for path in paths:
        assert f"{path.parent.name}/f" in page.text
    assert 'a"b&c/f.tsv (2)' in page.text
    assert "<script" not in page.source and 'a"b' not in page.source
    markdown, latex = ((tmp_path / "out" / f"tables.{kind}").read_text() for kind in ("md", "tex"))
    assert r"| \_hidden\|\$x\$\_%{}^\~\\/f.tsv | 2 |" in markdown and "<script" not in markdown.replace(r"\<", "")
    assert r"\_hidden\textbar{}\$x\$\_\%\{\}\textasciicircum{}\textasciitilde{}\textbackslash{}/f.tsv & 2" in latex


def test_runs_on_other_images_are_not_compared(tmp_path):
    radii = [0.5, 1.0, 0.25]
    one = of_file(field_file(tmp_path / "one.tsv", radii), "one")
    labels = of_file(field_file(tmp_path / "labels.tsv", radii, labels=[3, 4, 3]), "labels")
    apart = of_file(field_file(tmp_path / "apart.tsv", radii, indices=[2, 7, 8]), "apart")
    part = of_file(field_file(tmp_path / "part.tsv", [0.25, 0.75, 0.125], indices=[9, 1, 2]), "part")
    found, notes = compare([one, labels, apart])
    assert not found and notes == [
        "one and labels are not compared: their images are not the same",
        "one and apart are not compared: 1 common images, 2 are needed",
        "labels and apart are not compared: 1 common images, 2 are needed",
    ]
    ((comparison,), ()) = compare([one, part])
    assert comparison.images.tolist() == [1, 2] and comparison.radii.tolist() == [[1.0, 0.25], [0.75, 0.125]]
    digests = [each._replace(record={"data_digest": digest}) for each, digest in ((one, "a"), (part, "b"))]
    assert compare(digests)[0] == []


def test_a_single_image_has_no_interval(program, tmp_path):
    path = field_file(tmp_path / "one.tsv", [0.5])
    program.succeeds("cli.analyze", path, path, f"--output={tmp_path / 'out'}")
    page = check_page(tmp_path / "out")
    assert "one.tsv and one.tsv (2) are not compared: 1 common images" in page.text
    assert "| one.tsv | 1 | 0.5000 | - |" in (tmp_path / "out" / "tables.md").read_text()
    assert not (tmp_path / "out" / "comparisons.csv").exists()


def drawn_band(monkeypatch, table):
    """x, low and high of the band that `save_curves` draws."""
    bands = []
    monkeypatch.setattr(plots.Axes, "fill_between", lambda axes, *arrays, **style: bands.append(arrays))
    monkeypatch.setattr(plots, "save", lambda figure, path: plots.plt.close(figure))
    plots.save_curves({"run": table}, None)
    return bands[0]


def test_bands_are_clopper_pearson_over_images_whatever_the_seeds(monkeypatch):
    radii = np.array([0.5, 1.0, 1.0, 2.0, 0.3])
    correct = np.array([1, 1, 1, 1, 0])
    one = Certificates(np.arange(5), np.zeros(5, int), 1 - correct, radii, correct, np.ones(5), "certify")
    x, low, high = drawn_band(monkeypatch, one)
    assert x.tolist() == [0, 0.5, 1, 1, 2]
    for k, place in ((4, 0), (3, 1), (1, 3), (0, 4)):
        interval = stats.binomtest(k, 5).proportion_ci(0.95, method="exact")
        assert (low[place], high[place]) == pytest.approx((interval.low, interval.high))
    # Two seeds on these images: no more images than before, so no narrower.
    twice = Certificates(*(np.concatenate([column, column]) for column in one[:-1]), mode="certify")
    _, low2, high2 = drawn_band(monkeypatch, twice)
    np.testing.assert_allclose(low2[::2], low)
    np.testing.assert_allclose(high2[::2], high)
    assert low2[1] == low[1] and high2[1] == high[0]  # a half image more: outwards


def test_runs_keep_their_colour_where_a_file_has_no_counts(monkeypatch, two_runs, tmp_path):
    from rs_consistency.certificates.proof import load

    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    evidences = {"field": None, "run": load(two_runs / "half")[1]}
    plots.save_p_a(evidences, tmp_path / "p_a.png")
    assert {line.get_color() for line in saved[0].axes[0].lines[:2]} == {plots.COLOURS[1]}
    plots.plt.close(saved[0])


def test_marks_are_at_the_share_of_hard_images_and_of_images_below_the_ceiling(monkeypatch, two_runs):
    from rs_consistency.certificates.proof import load

    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    evidence = load(two_runs / "half")[1]
    plots.save_p_a({"run": evidence}, None)
    shares = np.array([row["count_label"] / row["votes"] for row in evidence.rows])
    marks = {line.get_marker(): line.get_ydata()[0] for line in saved[0].axes[0].lines if len(line.get_xdata()) == 1}
    assert marks == {"o": np.mean(shares < 0.5), "D": 1 - np.mean(shares == 1)}
    text = saved[0].legends[0].get_texts()[0].get_text()
    assert text.startswith(
        f"run: hard {np.mean(shares < 0.5):.1%}, at the ceiling {np.mean(shares == 1):.1%}\nn = 100,"
    )
    assert "is at most" not in saved[0].axes[0].get_xlabel()
    older = [{name: value for name, value in row.items() if name != "count_label"} for row in evidence.rows]
    plots.save_p_a({"run": evidence._replace(rows=older)}, None)
    assert "another class was selected, p is at most" in saved[1].axes[0].get_xlabel()
    for figure in saved:
        plots.plt.close(figure)


def test_the_best_curve_is_the_largest_at_each_radius(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    radii = {"one": [1.5, 0.25, -2.0, 0.25], "two": [1.0, 1.0, 0.125, -0.5]}
    tables = {name: of_file(field_file(tmp_path / name, each), name).certificates for name, each in radii.items()}
    plots.save_curves({**tables, "three": tables["one"]._replace(mode="decide")}, None, with_best=True)
    *curves, best = saved[0].axes[0].lines
    assert len(curves) == 2 and best.get_label() == "the best at each radius"
    # Behind each radius: 0, 0.125, 0.25, 1 and 1.5.
    assert best.get_xdata().tolist() == [0, 0.125, 0.25, 1, 1.5]
    assert best.get_ydata().tolist() == [3 / 4, 3 / 4, 2 / 4, 1 / 4, 0]
    plots.plt.close(saved[0])


def test_figures_for_one_comparison_and_for_many(tmp_path):
    many = [of_file(field_file(tmp_path / f"{i}.tsv", [0.5 + 0.1 * i, 1.0 - 0.1 * i]), f"run {i}") for i in range(4)]
    found, _ = compare(many)
    assert len(found) == 6
    for number in (1, 4, 6):
        figures.save_comparisons(found[:number], tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.size == (round(200 * max(3.4 * min(number, 3), 4.6)), 780 * -(-number // 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_stored_pixels_keep_their_brightness_and_colour(monkeypatch, tmp_path, channels):
    from rs_consistency.report import page, samples

    stored = np.random.default_rng(0).integers(0, 256, size=(2, 4, 4, channels), dtype=np.uint8)
    stored[0, 0, 0] = 128  # mid-grey
    stored[1, 0, 0] = (255, 128, 0)[:channels]  # orange, if it has colours
    split = data.Split(stored, np.int32([3, 3]))
    monkeypatch.setattr(samples, "open_images", lambda one, *, data_dir: split)
    drawn = {}
    monkeypatch.setattr(
        figures, "save", lambda figure, path: drawn.update({path.stem: figure}) or plots.save(figure, path)
    )
    record = {"dataset": "cifar10", "sigma": 0.5, "seed": 0}
    subjects = [
        of_file(field_file(tmp_path / f"{name}.tsv", radii), name)._replace(record=record)
        for name, radii in {"one": [1.0, 0.25], "two": [0.5, 0.5]}.items()  # image 0 gained, image 1 lost
    ]
    summaries = summarize([one.path for one in subjects], [(one.certificates, None) for one in subjects], [{}, {}])
    page.write_report(subjects, summaries, tmp_path)
    found = [axes.images[0] for axes in drawn["gained_lost"].axes if axes.images]
    for image, pixels in zip(found, stored, strict=True):
        shown = image.to_rgba(image.get_array(), bytes=True)[..., :3]
        assert np.abs(shown.astype(int) - pixels).max() <= 1  # a grey pixel in all three channels
    with Image.open(tmp_path / "gained_lost.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert any(max(map(abs, np.subtract(colour, stored[1, 0, 0]))) <= 1 for colour in colours)


@pytest.mark.parametrize(
    "image", [np.full((2, 2, 1), 128, np.uint8), np.full((2, 2, 3), 128.0), np.full((2, 2, 3), -0.1)]
)
def test_pixels_of_another_range_are_refused(image):
    with pytest.raises(ValueError, match=r"pixels from .* cannot be drawn: give floats in \[0, 1\]"):
        figures._picture(None, image)


def test_long_names_of_many_runs_are_shown_whole_and_leave_the_curves_their_room(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    monkeypatch.setattr(figures, "save", plots.save)
    one = of_file(field_file(tmp_path / "a.tsv", [0.5, 1.0]), "a")
    metrics = [{"epoch": 1, "loss": 1.0, "noisy_test_accuracy": 0.5}]
    names = [f"models/consistency_lbd10_eta0.5_sigma0.50_resnet110_batch256_augmented_seed{i}" for i in range(8)]
    runs = [one._replace(label=name, workdir=name, metrics=metrics) for name in names]
    plots.save_curves({run.label: run.certificates for run in runs}, None)
    figures.save_training(runs, None)
    for figure in saved:
        figure.canvas.draw()
        whole, legend = figure.bbox, figure.legends[0].get_window_extent()
        assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and whole.y0 <= legend.y0
        assert all(axes.get_window_extent().height > 2 * figure.dpi for axes in figure.axes)
        assert figure.legends[0].get_texts()[0].get_text().replace("\n", "").startswith(names[0])
        plots.plt.close(figure)


def test_formats_escape_and_align():
    cells = [["name", "x"], ["a|b\nc", "1"], ["50 % +- 1", "22"]]
    assert formats.markdown(cells) == "| name | x |\n| --- | ---: |\n| a\\|b c | 1 |\n| 50 % +- 1 | 22 |\n"
    assert r"50 \% $\pm$ 1 & 22 \\" in formats.latex(cells)
    assert formats.aligned([["name", "x"], ["a", "10"]]) == "name   x\na     10\n"
    assert formats.csv_text([{"a": 1.5, "b": {"x": None, "y": "p,q"}}]) == 'a,b_x,b_y\n1.5,,"p,q"\n'
    assert formats.csv_text([]) == "\n"


def test_help_says_what_is_written(program):
    text = program.succeeds("cli.analyze", "--help").out
    for name in ("report.html", "gained_lost.png", "tables.tex", "differences.csv", "--no_network"):
        assert name in text

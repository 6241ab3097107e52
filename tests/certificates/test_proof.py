"""Certificates from their counts: equal to what was written, recomputed, audited; files that cannot be recomputed."""

import gzip
import json

import matplotlib.image
import numpy as np
import pytest
from scipy import special, stats

from rs_consistency.certificates.columns import CERTIFY, make_rows
from rs_consistency.certificates.proof import load
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.noise import bound_uniform
from rs_consistency.report import plots
from rs_consistency.statistics.bounds import BOUNDS, certify_votes

N0, N, SIGMA, ALPHA, SEED = 20, 1000, 0.5, 0.001, 7
COUNTS = [1000, 1000, 999, 990, 900, 700, 560, 549, 530, 480, 300, 0]
INDICES = np.arange(len(COUNTS)) * 5


def write(path, bound=BOUNDS[0]):
    """A file as certify.py writes it: the i-th image has COUNTS[i] votes for the selected class, i % 3."""
    images = np.arange(len(COUNTS))
    selected = images % 3
    runner_up = (N - np.array(COUNTS)) * 2 // 3
    proven = certify_votes(
        COUNTS,
        runner_up,
        N,
        alpha=ALPHA,
        sigma=SIGMA,
        bound=bound,
        uniform=bound_uniform(SEED, INDICES),
    )
    prediction = np.where(proven.certified, selected, -1)
    identity = {"n0": N0, "n": N, "sigma": SIGMA, "alpha": ALPHA, "seed": SEED, "parameter_digest": "0", "bound": bound}
    identity |= {"alpha_share": 0.99} if bound == "two_class" else {}
    selection = Selection(int(INDICES[-1]) + 1, skip=5)
    file = CertificateFile(
        path, schema=CERTIFY, identity=identity, about={"device": "", "versions": {}}, selection=selection
    )
    labels = np.where(images == 3, 9, selected)  # one is wrong
    counts = {"count0": N0, "count": COUNTS, "count_runner_up": runner_up, "selected": selected}
    counts |= {"count_label": np.where(labels == selected, COUNTS, 0), "votes": N}
    file.append(make_rows(idx=INDICES, label=labels, predict=prediction, radius=proven.radius, time=0.1, **counts))
    file.finish()
    file.close()
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "certificates.tsv")


def lines_of(table):
    return [
        (idx, predict, f"{radius:.6f}", correct)
        for idx, predict, radius, correct in zip(table.idx, table.predict, table.radius, table.correct, strict=True)
    ]


def written_lines(path):
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(int(row[0]), int(row[2]), row[3], int(row[4])) for row in rows]


@pytest.mark.parametrize("bound", BOUNDS)
def test_with_its_own_alpha_and_bound_a_file_stays_what_it_is(tmp_path, bound):
    path = write(tmp_path / "a.tsv", bound)
    table, evidence = load(path, alpha=ALPHA)
    assert lines_of(table) == written_lines(path) == lines_of(load(path)[0])
    assert evidence.settings.bound == bound
    other = BOUNDS[BOUNDS.index(bound) - 1]
    assert lines_of(load(path, bound=other)[0]) != written_lines(path)
    # From one bound to another is the same as having certified with the other.
    certified_so = write(tmp_path / "b.tsv", other)
    assert lines_of(load(path, bound=other)[0]) == written_lines(certified_so)


def test_the_randomized_bound_takes_the_draws_of_the_seed(tmp_path):
    path = write(tmp_path / "a.tsv", "randomized")
    record = path.with_suffix(".json")
    record.write_text(record.read_text().replace(f'"seed": {SEED}', f'"seed": {SEED + 1}'))
    assert lines_of(load(path, alpha=ALPHA)[0]) != written_lines(path)


def test_another_alpha_by_hand(program, file):
    (summary,) = json.loads(program.succeeds("cli.analyze", file, "--alpha=0.05", "--format=json").out)
    counts = np.array(COUNTS)
    lower = np.array([stats.beta.ppf(0.05, count, N - count + 1) if 0 < count < N else count / N for count in counts])
    lower[counts == N] = 0.05 ** (1 / N)
    radius = np.where(lower >= 0.5, np.floor(1e6 * SIGMA * special.ndtri(np.clip(lower, 0.5, None))) / 1e6, 0)
    right = np.arange(len(counts)) != 3
    assert summary["acr"] == pytest.approx(np.mean(radius * right), abs=1e-12)
    assert summary["abstention"] == np.mean(lower < 0.5)
    assert summary["radius_ceiling"] == pytest.approx(SIGMA * special.ndtri(0.05 ** (1 / N)), rel=1e-12)
    assert (summary["alpha"], summary["bound"], summary["n"], summary["sigma"]) == (0.05, "clopper_pearson", N, SIGMA)
    assert summary["at_ceiling"] == 2 / 12
    assert summary["p_true"] == {"0.05": 0.0, "0.25": 0.3, "0.5": 0.549, "0.75": 0.9, "0.95": 1.0}


def test_two_classes_certify_what_one_half_cannot(file):
    alone, _ = load(file)
    both, _ = load(file, bound="two_class")
    assert both.predict[9] == 0 and both.radius[9] > 0 and alone.predict[9] == -1  # 480 votes against 346


def family_error(path, **asked):
    """The exact probability of any claim, if all images had p_A a hair below 1/2: none has a certificate."""
    _, evidence = load(path, **asked)
    proven = certify_votes(np.arange(N + 1), 0, N, alpha=evidence.settings.alpha, sigma=SIGMA)
    one = stats.binom.pmf(np.arange(N + 1), N, 0.5)[proven.certified].sum()
    return 1 - (1 - one) ** len(COUNTS)


def test_bonferroni_bounds_the_error_of_the_whole_file(file):
    assert family_error(file, bonferroni=True) <= ALPHA < family_error(file)
    assert family_error(file, bonferroni=True, alpha=0.05) <= 0.05 < family_error(file, alpha=0.05)
    assert load(file, bonferroni=True, alpha=0.06)[1].settings.alpha == pytest.approx(0.005)


def test_the_tables_and_strict_json(program, file):
    command = ["cli.analyze", file, "--radii", 0, 0.5, "--alpha=0.012", "--bonferroni", "--joint", "--delta=0.01"]
    measures, _, votes, joint = program.succeeds(*command).out.split("\n\n")
    names = ["path", "images", "ACR", "ACR", "two-class", "accuracy", "abstention", "r=0", "r=0.5"]
    assert measures.splitlines()[0].split() == names
    assert votes.splitlines()[1].split()[1:5] == ["0.5", "1000", "0.001", "clopper_pearson"]
    # 0.001 for each of 12: that all are true has probability 0.988 only.
    assert joint.splitlines()[1].split()[1:6] == ["these", "images", "0.01", "<=", "1"]
    assert joint.splitlines()[1].split()[6] == "0.416"  # 5 of 12, rounded down
    tables = program.succeeds(*command, "--format=markdown").out.split("\n\n")
    assert [table.splitlines()[1].count("---:") for table in (tables[0], *tables[2:])] == [7, 11, 5]

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (summary,) = json.loads(program.succeeds(*command, "--format=json").out, parse_constant=refuse)
    assert summary["certified_accuracy_lower"]["0"] <= summary["certified_accuracy"]["0"] == 6 / 12
    assert 0 < summary["population_accuracy_lower"]["0"] < summary["certified_accuracy_lower"]["0"]
    header, row = program.succeeds(*command, "--format=csv").out.splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["certified_accuracy_lower_0"]


def test_the_pictures(program, file, tmp_path):
    out = program.succeeds("cli.analyze", file, "--output", tmp_path / "figures").out
    assert f"curves: {tmp_path}/figures/certified_accuracy.png\np_A: {tmp_path}/figures/p_a.png\n" in out
    picture = matplotlib.image.imread(tmp_path / "figures" / "p_a.png")
    blue = np.abs(picture[..., :3] - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    assert np.ptp(rows) > 300 and np.ptp(columns) > 600  # the curve goes from corner to corner
    program.succeeds("cli.analyze", file, "--output", tmp_path / "two", "--bound=two_class")
    assert (tmp_path / "two" / "p_a.png").is_file()


def test_a_file_without_its_record_has_no_second_picture_and_no_second_table(program, file, tmp_path):
    file.with_suffix(".json").unlink()
    out = program.succeeds("cli.analyze", file, "--output", tmp_path / "figures").out
    assert "ceiling" not in out and not (tmp_path / "figures" / "p_a.png").exists()


@pytest.mark.parametrize("option", ["--alpha=0.01", "--bound=two_class", "--bonferroni", "--joint"])
def test_what_is_needed_to_recompute(program, file, tmp_path, option):
    field = tmp_path / "field.tsv"
    field.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t7\t7\t1.5\t1\t0:00:01.393193\n")
    error = program.fails("cli.analyze", field, option)
    assert f"{field} has no columns count0, count, count_runner_up, selected" in error and "leave out --alpha" in error
    record = file.with_suffix(".json")
    made = json.loads(record.read_text())
    record.write_text(json.dumps({**made, "mode": "predict"}))
    contradiction = f"{file} has the columns of mode='certify', and certificates.json is the record of mode='predict'"
    for words in ([option], []):
        assert contradiction in program.fails("cli.analyze", file, *words)
    record.unlink()
    assert "has no certificates.json beside it that says how" in program.fails("cli.analyze", file, option)
    assert program.out == ""


def change_record(path, **changed):
    """Changes keys of the record; ... removes a key."""
    record = path.with_suffix(".json")
    made = {**json.loads(record.read_text()), **changed}
    record.write_text(json.dumps({name: value for name, value in made.items() if value is not ...}))


def changed_line(path, number, **values):
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    for name, value in values.items():
        lines[number + 1][lines[0].index(name)] = str(value)
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (
            4,
            {"radius": "9.000000"},
            "image 20: predict=1, radius=9.000000 do not follow from the counts, which prove class 1",
        ),
        (4, {"count": 890, "count_label": 890}, "image 20: predict=1, radius=0."),
        (4, {"selected": 2, "count_label": 0}, "which prove class 2, radius 0."),
        (4, {"count_label": 899}, "image 20: count_label 899 contradicts its other counts"),
        (3, {"count_label": 999}, "image 15: count_label 999 contradicts its other counts"),
        (4, {"votes": 999}, "image 20: its counts cannot be with n0=20 and n=1000"),
        (11, {"predict": 2, "correct": 1}, "image 55: predict=2, radius=0.000000 do not follow"),
        (11, {"predict": 2, "correct": 1}, "which prove no certificate; certify again"),
        (0, {"count": 1001}, "image 0: its counts cannot be with n0=20 and n=1000"),
        (0, {"count_runner_up": 1}, "image 0: its counts cannot be with n0=20 and n=1000"),
        (0, {"count0": 21}, "image 0: its counts cannot be with n0=20 and n=1000"),
        (9, {"selected": -1}, "line 11, is not what this program wrote ('45\\t0\\t-1\\t"),
        (0, {"idx": -3}, "line 2, is not what this program wrote ('-3\\t"),
        (0, {"idx": 2**31}, "line 2, is not what this program wrote ('2147483648\\t"),
        (4, {"radius": 9}, "line 6, is not what this program wrote ('20\\t"),
        (4, {"correct": 0}, "image 20: correct=0; expected 1 where predict is label, else 0"),
    ],
)
def test_lines_that_their_counts_do_not_prove(program, file, number, values, message):
    changed_line(file, number, **values)
    assert message in program.fails("cli.analyze", file)
    assert program.out == ""
    if "correct" in values and "predict" not in values:  # no recomputation hides a line that contradicts itself
        assert message in program.fails("cli.analyze", file, "--alpha=0.01")


def test_a_line_may_claim_less_than_it_could(program, file):
    radius = load(file)[0].radius[4]
    change_record(file, finished=...)
    changed_line(file, 4, radius="0.100000")
    assert load(file)[0].radius[4] == 0.1 < radius
    assert load(file, alpha=ALPHA)[0].radius[4] == radius
    changed_line(file, 4, radius=f"{radius + 1e-6:.6f}")  # as another version of SciPy might round
    program.succeeds("cli.analyze", file)
    changed_line(file, 4, radius=f"{radius + 2e-6:.6f}")
    assert "certify again, or recompute with --alpha" in program.fails("cli.analyze", file)
    program.succeeds("cli.analyze", file, "--alpha=0.001")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n", 10.5, "certificates.json is damaged: n=10.5: use a whole number"),
        ("sigma", float("nan"), "certificates.json is damaged: NaN is not a finite number"),
        ("alpha", 2, "certificates.json is damaged: alpha=2: use a number in"),
        ("seed", -1, "certificates.json is damaged: seed=-1"),
        ("bound", "wald", "certificates.json is damaged: bound='wald' is unknown"),
        ("bound", None, "certificates.json is damaged: bound=None is unknown"),
        ("n", ..., "certificates.json is damaged: it lacks n; restore it from a copy"),
    ],
)
def test_records_that_cannot_be_trusted(program, file, key, value, message):
    change_record(file, **{key: value})
    assert message in program.fails("cli.analyze", file)


def test_a_workdir_is_a_path_too(file):
    table, evidence = load(file.parent, alpha=0.01)
    assert len(table.idx) == len(evidence.lower) == len(COUNTS)


def pack(path):
    packed = path.with_suffix(".tsv.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_a_packed_file_keeps_its_evidence(program, file):
    packed, expected = pack(file), load(file, alpha=0.01, bound="two_class")
    table, evidence = load(packed, alpha=0.01, bound="two_class")
    assert lines_of(table) == lines_of(expected[0]) and evidence.rows == expected[1].rows
    assert read_table(packed).rows == read_table(file).rows and not read_table(packed).changed
    for command in (["--exact"], ["--bonferroni"], ["--joint"]):
        program.succeeds("cli.analyze", packed, *command)
    for number, radius in ((4, "9.000000"), (0, "1.239000")):
        changed_line(file, number, radius=radius)
        message = f"image {INDICES[number]}: predict={number % 3}, radius={radius} do not follow from the counts"
        pack(file)
        assert read_table(packed).changed
        assert message in program.fails("cli.analyze", file)
        assert message in program.fails("cli.analyze", packed)
        file.unlink()
        assert message in program.fails("cli.analyze", file.parent)  # the folder stands for the packed file
        assert message in program.fails("cli.analyze", packed, "--exact")
        file.with_suffix(".json").unlink()
        write(file)
    file.with_suffix(".json").unlink()
    assert f"{packed} has no certificates.json beside it" in program.fails("cli.analyze", packed, "--alpha=0.01")


def test_a_file_that_is_not_as_it_was_finished_says_so(program, file, tmp_path, monkeypatch):
    def analysis(path):
        program.succeeds("cli.analyze", path, "--format=json")
        return json.loads(program.out)[0]["finished"], program.err

    packed = pack(file)
    assert analysis(file) == analysis(packed) == analysis(file.parent) == (True, "")
    changed_line(file, 4, radius="0.100000")  # it claims less: no line is refused, but the file is
    pack(file)
    for path in (file, packed):
        fault = f"{path} was changed after it was finished: its SHA-256 is not the one in certificates.json"
        for words in ([], ["--alpha=0.01"], ["--exact"], [f"--output={tmp_path / 'report'}"]):
            error = program.fails("cli.analyze", path, *words)
            assert error == f"error: {fault}; restore it from a copy, or certify again" and program.out == ""
    assert not (tmp_path / "report").exists()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    pack(file)
    assert "was changed after" in program.fails("cli.analyze", file)
    change_record(file, finished=...)
    fault = f"{file} is not finished: 10 of 12 images; certify.py with the same settings completes it"
    assert analysis(file) == (False, f"note: {fault}\n")
    for form in ("text", "markdown"):
        assert f"\nnot finished: {file}\n" in program.succeeds("cli.analyze", file, f"--format={form}").out
    monkeypatch.delitem(plots.FORMATS, "pdf")
    program.succeeds("cli.analyze", file, f"--output={tmp_path / 'report'}", "--no_network")
    assert program.err.count(fault) == (tmp_path / "report" / "report.html").read_text().count(fault) == 1
    file.with_suffix(".json").unlink()
    fault = f"note: {file} has no certificates.json beside it: nothing shows that its lines follow from its counts\n"
    assert analysis(file) == (None, fault)
    field = tmp_path / "field.tsv"
    field.write_text("idx\tlabel\tpredict\tradius\tcorrect\n0\t7\t7\t1.5\t1\n")
    field.with_suffix(".json").write_text("{}")
    assert analysis(field) == (None, "")

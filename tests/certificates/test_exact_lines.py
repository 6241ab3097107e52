"""Exact lines: honest files of both samplers are proven; lines that claim a little more are refused, by themselves."""

import gzip
import json
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rs_consistency.certificates import audit
from rs_consistency.certificates.columns import ATTACK, CERTIFY, DECIDE, PREDICT, SCHEMAS
from rs_consistency.certificates.exact_lines import prove, unproven
from rs_consistency.certificates.proof import contradictions, load, rows_of_counts
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.record import Settings
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.statistics.bounds import BOUNDS
from rs_consistency.statistics.samplers import NoiseLaw

UNIT = Decimal("0.000001")
FLOAT = {"sampler": "float", "precision": "highest"}
# Images so large that the slack is 7e-5.
GRID = {**FLOAT, "sampler": "grid", "grid_steps": 255, "image_shape": [4096, 4096, 3]}
ABOUT = {"device": "8 x cpu", "versions": {"jax": "1"}, "code_digest": "c"}
KINDS = [*BOUNDS, DECIDE.name, PREDICT.name, ATTACK.name]


def settings_of(kind, sampler):
    identity = {"sigma": 0.5, "n": 1000, "alpha": 0.001, "seed": 3, **sampler}
    if kind == PREDICT.name:  # n times the slack is 0.07
        return identity | {"alpha": 0.1}
    if kind == ATTACK.name:  # five tests share alpha
        return identity | {"alpha": 0.5, "copies": 4, "steps": 9, "restarts": 1}
    if kind == DECIDE.name:
        return identity | {"n0": 20, "n": 96_000, "radius": 0.3, "look_every": 16}
    return identity | {"n0": 20, "bound": kind} | ({"alpha_share": 0.99} if kind == "two_class" else {})


def rows_for(kind, settings):
    """Lines that claim something and lines that do not; of decisions and predictions, all around the limits."""
    schema, n = SCHEMAS.get(kind, CERTIFY), settings["n"]
    if schema is CERTIFY:
        count = np.array([1000, 1000, 999, 950, 700, 560, 549, 480, 300, 0])
        columns = {"count": count, "count_runner_up": (n - count) * 2 // 3}
    elif schema is DECIDE:
        count = np.array([n, *range(68_955, 68_975), *range(70_365, 70_385), 0])
        columns = {"count": count, "votes": n}
    else:
        count = np.array([n, *range(520, 545)])
        columns = {"count": count, "count_runner_up": n - count, "predict": count % 3}
    if schema is ATTACK:
        columns |= {"predict": (count + 1) % 3, "adversarial": count % 3, "distance": 0.25}
    if schema in (CERTIFY, DECIDE):
        columns |= {"count0": 20, "selected": count % 3}
    if schema in (CERTIFY, PREDICT):
        columns |= {"count_label": np.where(count % 3 == 0, count, 0)}
    if schema is CERTIFY:
        columns |= {"votes": n}
    return rows_of_counts(
        schema, Settings(**settings), {"idx": np.arange(len(count)) * 2, "label": 0, "time": 0.1, **columns}
    )


def write(path, kind, settings, rows):
    file = CertificateFile(
        path,
        schema=SCHEMAS.get(kind, CERTIFY),
        identity={**settings, "parameter_digest": "p"},
        about=ABOUT,
        selection=Selection(2 * len(rows), 2),
    )
    file.append(rows)
    file.finish()
    file.close()
    return path


def honest(path, kind, sampler):
    settings = settings_of(kind, sampler)
    return write(path, kind, settings, rows_for(kind, settings))


def faults(path):
    table = read_table(path)
    settings = table.record.settings
    return unproven(table.record.schema, settings, table.rows.values(), alpha=Fraction(str(settings.alpha)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [FLOAT, GRID])
def test_honest_files_are_proven(program, tmp_path, kind, sampler):
    path = honest(tmp_path / "c.tsv", kind, sampler)
    rows = list(read_table(path).rows.values())
    claims = sum(row[claimed(kind)] != -1 or row.get("decision") == "not_certified" for row in rows)
    assert 0 < claims < len(rows)
    out = program.succeeds("cli.analyze", path, "--exact").out
    assert f"\n{path}: all {claims} claims in {len(rows)} lines are proven in whole numbers, " in out
    assumption = "with the sampler's error of 6.9e-05 a vote included\n"
    if sampler is FLOAT:
        assumption = "if float32 noise is taken for exact Gaussian noise\n"
    if kind == ATTACK.name:
        assumption = (
            assumption[:-1]
            + "; distances, and the classes at the images themselves, are not in the votes of the file\n"
        )
    assert out.endswith(assumption)
    report = audit.compare(read_table(path), rows, ABOUT)
    assert report.ok and report.text().endswith(f"lines reproduce; all {len(rows)} are proven in whole numbers")


def claimed(kind):
    """The column with the class that a line claims."""
    return "adversarial" if kind == ATTACK.name else "predict"


def claims_a_little_more(kind, rows):
    """Lines that claim something, and 1e-6 more; where votes prove no radius, what takes one more vote."""
    if kind in BOUNDS:
        return [row | {"radius": row["radius"] + UNIT} for row in rows if row["predict"] != -1]
    if kind in (PREDICT.name, ATTACK.name):
        line = min((row for row in rows if row[claimed(kind)] != -1), key=lambda row: row["count"])
        return [line | {"count": line["count"] - 1, "count_runner_up": line["count_runner_up"] + 1}]
    certified = min((row for row in rows if row["decision"] == "certified"), key=lambda row: row["count"])
    not_certified = max((row for row in rows if row["decision"] == "not_certified"), key=lambda row: row["count"])
    return [
        certified | {"count": certified["count"] - 1},
        not_certified | {"count": not_certified["count"] + 1},
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [FLOAT, GRID])
def test_lines_that_claim_a_little_more_are_refused(monkeypatch, program, tmp_path, kind, sampler):
    settings = settings_of(kind, sampler)
    rows = rows_for(kind, settings)
    more = claims_a_little_more(kind, rows)
    forged = {row["idx"]: row for row in rows} | {row["idx"]: row for row in more}
    path = write(tmp_path / "c.tsv", kind, settings, forged.values())
    assert set(faults(path)) == {row["idx"] for row in more}
    # And where it is the only one.
    line = more[-1]
    path = write(tmp_path / "d.tsv", kind, settings, ({row["idx"]: row for row in rows} | {line["idx"]: line}).values())
    error = program.fails("cli.analyze", path, "--exact")
    claims = {DECIDE.name: "decision not_certified", ATTACK.name: f"adversarial class {line[claimed(kind)]}"}
    claim = claims.get(kind, f"class {line['predict']} with radius {line['radius']}")
    assert f"{path}, image {line['idx']}: " in error and program.out == ""
    fault = f"{path}, image {line['idx']}: {claim} is not proven by its counts in whole numbers; certify again"
    assert (fault in error) == (kind in BOUNDS)  # else float64 sees it before
    with pytest.raises(UserError, match=re.escape(fault)):
        prove(path, load(path)[1] if kind in BOUNDS else None)
    # The audit refuses it, also if float64 were to prove it.
    monkeypatch.setattr(audit, "contradictions", lambda table: {})
    report = audit.compare(read_table(path), rows[:3], ABOUT)
    assert list(report.problems) == [line["idx"]] and not report.ok
    assert report.text().endswith(f"3 of 3 lines reproduce; {len(rows) - 1} of {len(rows)} are proven in whole numbers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_forgets_the_slack_is_refused(monkeypatch, tmp_path, kind):
    settings = settings_of(kind, GRID)
    path = write(tmp_path / "c.tsv", kind, settings, rows_for(kind, settings_of(kind, FLOAT)))
    table = read_table(path)
    assert faults(path) and set(faults(path)) <= set(contradictions(table))
    assert set(faults(path)) <= set(audit.compare(table, [], ABOUT).problems)
    # Without the slack in proof and audit, nobody would have noticed.
    monkeypatch.setattr(Settings, "law", NoiseLaw(0.5, 0.0))
    assert not faults(path) and not contradictions(table) and audit.compare(table, [], ABOUT).ok


@pytest.mark.parametrize("sampler", [FLOAT, GRID])
def test_recomputed_lines_are_proven_at_what_they_were_recomputed_with(program, tmp_path, sampler):
    path = honest(tmp_path / "c.tsv", "clopper_pearson", sampler)
    other = honest(tmp_path / "d.tsv", "randomized", sampler)
    for bound in BOUNDS:
        words = ["cli.analyze", path, other, "--exact", "--alpha=0.05", f"--bound={bound}", "--format=json"]
        found = json.loads(program.succeeds(*words).out)
        assert [one["exact"] for one in found] == [round((1 - one["abstention"]) * 10) for one in found]
    out = program.succeeds("cli.analyze", path, "--exact", "--bonferroni", "--format=csv").out
    header, row = out.splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["exact"] == "6"
    _, all_hold = load(path, bonferroni=True, alpha=0.001)
    assert prove(path, all_hold).claims == 6 and all_hold.alpha == Fraction(1, 10_000)
    with pytest.raises(
        UserError, match=r"c.tsv, image 0: class 1 with radius .* is not proven .* recompute with --alpha"
    ):
        prove(path, all_hold._replace(rows=load(path)[1].rows))  # the lines at alpha, not divided
    two_class = load(path, bound="two_class")[1]
    with pytest.raises(UserError, match=r"c.tsv, image 6: class 2 with radius .* is not proven"):
        prove(path, two_class._replace(settings=load(path)[1].settings))


def test_a_packed_file_is_proven_by_the_record_beside_it(program, tmp_path):
    path = honest(tmp_path / "c.tsv", "clopper_pearson", GRID)
    content = path.read_bytes()
    path.unlink()
    packed = tmp_path / "c.tsv.gz"
    packed.write_bytes(gzip.compress(content))
    assert "all 6 claims in 10 lines are proven" in program.succeeds("cli.analyze", packed, "--exact").out
    radius = content.split(b"\t")[content.split(b"\t").index(b"950") - 4]
    packed.write_bytes(gzip.compress(content.replace(radius, b"%.6f" % (float(radius) + 1e-6))))
    assert f"{packed} was changed after it was finished" in program.fails("cli.analyze", packed, "--exact")
    record = json.loads((tmp_path / "c.json").read_text())
    del record["finished"]
    (tmp_path / "c.json").write_text(json.dumps(record))
    assert f"{packed}, image 6: class 2 with radius" in program.fails("cli.analyze", packed, "--exact")


@pytest.mark.parametrize(
    ("kind", "count", "change", "fault"),
    [
        ("clopper_pearson", 950, {"predict": 0}, "class 0 with radius 0."),
        ("two_class", 950, {"count_runner_up": 51}, "its counts cannot be with n0=20 and n=1000"),
        ("decide", 96_000, {"radius": Decimal("0.300001")}, "class 0 with radius 0.300001"),
        ("decide", 96_000, {"predict": 1}, "class 1 with radius 0.300000"),
        ("decide", 96_000, {"decision": "undecided"}, "class 0 with radius 0.300000"),
        ("decide", 96_000, {"predict": -1, "decision": "not_certified"}, "decision not_certified"),
        ("decide", 0, {"decision": "certified"}, "decision certified"),
        ("decide", 0, {"predict": 0}, "class 0 with radius 0.000000"),
        ("decide", 0, {"votes": 17}, "its counts cannot be with n0=20 and n=96000"),
        ("predict", 1000, {"radius": UNIT}, "class 1 with radius 0.000001"),
        ("predict", 520, {"predict": 1}, "class 1 with radius 0.000000"),
    ],
)
def test_claims_that_no_votes_prove(kind, count, change, fault):
    settings = settings_of(kind, FLOAT)
    row = next(row for row in rows_for(kind, settings) if row["count"] == count)
    asked = {"schema": SCHEMAS.get(kind, CERTIFY), "settings": Settings(**settings), "alpha": Fraction("0.1")}
    assert not unproven(rows=[row], **asked)
    (found,) = unproven(rows=[row | change], **asked).values()
    assert found.startswith(fault) and ("cannot be" in found or found.endswith(" in whole numbers"))
    assert not unproven(rows=[row | {"predict": -1, "radius": Decimal(0)}], **asked)  # a claim less


def test_files_that_no_proof_is_possible_for(program, tmp_path):
    field = tmp_path / "field.tsv"
    field.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t7\t7\t1.5\t1\t0:00:01.393193\n")
    message = " is no file of certify.py with its record beside it; leave out --exact, or this file"
    assert f"{field}{message}" in program.fails("cli.analyze", field, "--exact")
    for kind in ("clopper_pearson", "decide"):
        path = honest(tmp_path / f"{kind}.tsv", kind, FLOAT)
        assert f"{field}{message}" in program.fails("cli.analyze", path, field, "--exact")
        record = path.with_suffix(".json")
        content = record.read_text()
        record.unlink()
        assert f"{path}{message}" in program.fails("cli.analyze", path, "--exact")
        record.write_text(content.replace(f'"mode": "{json.loads(content)["mode"]}"', '"mode": "predict"'))
        assert f"{path} has the columns of mode=" in program.fails("cli.analyze", path, "--exact")
        assert program.out == ""

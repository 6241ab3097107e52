"""Attacks beside certificates: distances are rounded up, and an attack inside a certified radius is an alarm."""

import json
from decimal import Decimal

import numpy as np
import pytest

from rs_consistency.certificates.alarms import alarms, beside, differences
from rs_consistency.certificates.columns import ATTACK, CERTIFY, format_distance, make_rows
from rs_consistency.certificates.proof import contradictions, load
from rs_consistency.certificates.read import read_table
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.report import plots
from rs_consistency.report.contents import subject
from rs_consistency.statistics.bounds import p_value_of

SETTINGS = {"sigma": 0.5, "n": 1000, "alpha": 0.001, "seed": 0, "sampler": "float", "precision": "default"}
ABOUT = {"dataset": "mnist", "split": "test", "data_digest": "d", "parameter_digest": "p"}
CERTIFYING = {"n0": 100, "bound": "clopper_pearson", "tolerance": None}
ATTACKING = {"copies": 4, "steps": 9, "restarts": 2}


def write(path, schema, identity, rows):
    file = CertificateFile(
        path, schema=schema, identity={**SETTINGS, **ABOUT, **identity}, about={}, selection=Selection(len(rows))
    )
    file.append(rows)
    file.finish()
    file.close()
    return read_table(path)


def attacked(path):
    columns = {
        "idx": range(4),
        "label": [1, 1, 2, 0],
        "predict": [1, 1, 0, -1],
        "radius": 0.0,
        "time": 1.0,
        "adversarial": [0, 2, -1, -1],
        "distance": [0.7000001, 0.25, float("inf"), float("inf")],
        "count": [600, 1000, 500, 0],
        "count_runner_up": [400, 0, 500, 0],
        "p_value": [*p_value_of([600, 1000], [400, 0]), 1.0, 1.0],
    }
    return write(path, ATTACK, ATTACKING, make_rows(**columns))


def test_distances_are_written_rounded_up_and_read_back(tmp_path):
    assert [format_distance(each) for each in (0.7, 0.7000001, 0.0, float("inf"))] == [
        "0.700000",
        "0.700001",
        "0.000000",
        "inf",
    ]
    table = attacked(tmp_path / "attacks.tsv")
    assert [row["distance"] for row in table.rows.values()] == [
        Decimal("0.700001"),
        Decimal("0.250000"),
        Decimal("inf"),
        Decimal("inf"),
    ]
    assert [row["correct"] for row in table.rows.values()] == [1, 1, 0, 0]
    assert load(table.path)[0].mode == "attack"
    for distance in ("-0.100000", "nan", "0.1", "Infinity"):
        with pytest.raises(ValueError, match="damaged"):
            ATTACK.parse(ATTACK.line(table.rows[0])[:-1].replace("0.700001", distance))


def test_an_attack_must_follow_from_its_counts(tmp_path):
    table = attacked(tmp_path / "attacks.tsv")
    assert not contradictions(table)
    found = contradictions(table._replace(rows={0: table.rows[0] | {"p_value": 1.4e-10}}))
    assert found[0].startswith("p_value 1.4e-10, its counts give 2.7")
    forged = {2: table.rows[2] | {"adversarial": 1, "distance": Decimal("0.300000")}}
    assert contradictions(table._replace(rows=forged)) == {
        2: "adversarial 1, its counts give -1, distance 0.300000, its counts give Infinity"
    }
    for changed in ({"predict": -1, "correct": 0}, {"predict": 2, "correct": 0}):
        same = {1: table.rows[1] | changed}
        assert contradictions(table._replace(rows=same)) == {
            1: f"adversarial 2 is no other class than predict {changed['predict']}"
        }
    impossible = {1: table.rows[1] | {"count_runner_up": 1}}
    assert contradictions(table._replace(rows=impossible)) == {1: "its counts cannot be with n=1000"}


@pytest.mark.parametrize(
    ("radius", "predict", "text"),
    [
        ("0.700001", 1, None),
        ("0.700002", 1, "class 0 at distance 0.700001, inside the certified radius 0.700002 of class 1"),
        ("0.100000", 2, "class 1 at the image, where class 2 is certified"),
        ("0.000000", -1, None),
    ],
)
def test_an_attack_inside_a_certified_radius_is_an_alarm(tmp_path, radius, predict, text):
    attacks = attacked(tmp_path / "attacks.tsv").rows
    certificates = {0: {"predict": predict, "radius": Decimal(radius)}, 9: {"predict": 1, "radius": Decimal(9)}}
    assert alarms(certificates, attacks) == ({} if text is None else {0: text})


@pytest.mark.parametrize("adversarial", [-1, 1])
def test_a_line_that_names_no_other_class_is_no_alarm(adversarial):
    attacks = {0: {"predict": 1, "adversarial": adversarial, "distance": Decimal("0.1")}}
    assert not alarms({0: {"predict": 1, "radius": Decimal("0.5")}}, attacks)


def certified(path, radii):
    count = np.full(4, 995)
    columns = {"idx": range(4), "label": [1, 1, 2, 0], "predict": [1, 1, 0, 0], "radius": radii, "time": 1.0}
    columns |= {"count0": 100, "count": count, "count_runner_up": 5, "selected": [1, 1, 0, 0]}
    columns |= {"count_label": [995, 995, 5, 995], "votes": 1000}
    return write(path, CERTIFY, CERTIFYING, make_rows(**columns))


def test_the_report_draws_attacks_and_prints_alarms(program, tmp_path, monkeypatch):
    monkeypatch.delitem(plots.FORMATS, "pdf")
    attacked(tmp_path / "attacks.tsv")
    text = "image 0: class 0 at distance 0.700001, inside the certified radius 0.750000 of class 1"
    for radius, alarm in ((0.5, ""), (0.75, text)):
        path = certified(tmp_path / "certificates.tsv", [radius, 0.125, 0.25, 0.375]).path
        found = subject("run", path, *load(path)).attacked()
        assert found == [(radius, 0.700001, alarm), (0.125, 0.25, ""), (0.25, np.inf, ""), (0.375, np.inf, "")]
        if not alarm:
            path.unlink()
    report = tmp_path / "report"
    program.succeeds("cli.analyze", path, f"--output={report}", "--no_network")
    page = (report / "report.html").read_text()
    assert "<strong>ALARM.</strong>" in page and f": {text}</p>" in page
    assert "| 4 | 2 | 0.4375 | 0.4750 | 0.0375 | 1 |" in (report / "tables.md").read_text()
    assert (report / "attacked.png").stat().st_size > 10_000


def test_only_files_of_the_same_classifier_and_images_are_compared(tmp_path):
    attacks = attacked(tmp_path / "attacks.tsv")
    assert beside(attacks.path, CERTIFY) is None
    certificates = certified(tmp_path / "certificates.tsv", [0.5, 0.4, 0.3, 0.2])
    assert beside(certificates.path, ATTACK).rows == attacks.rows
    assert not differences(certificates.record, attacks.record)
    record = json.loads(attacks.path.with_suffix(".json").read_text())
    other = {"sigma": 0.25, "parameter_digest": "x", "data_digest": "x", "precision": "highest", "torch_input": "none"}
    for key, value in other.items():
        attacks.path.with_suffix(".json").write_text(
            json.dumps({**record, key: value, "identity": [*record["identity"], key]})
        )
        assert len(differences(certificates.record, beside(certificates.path, ATTACK).record)) == 1
    attacks.path.with_suffix(".json").write_text(json.dumps(record))
    lines = attacks.path.read_text()
    attacks.path.write_text(lines.replace("0.250000\t1000", "0.200000\t1000"))
    with pytest.raises(UserError, match=r"attacks\.tsv was changed after it was finished"):
        beside(certificates.path, ATTACK)
    del record["finished"]
    attacks.path.with_suffix(".json").write_text(json.dumps(record))
    attacks.path.write_text(lines.replace("0.250000\t1000", "0.250000\t500"))
    with pytest.raises(UserError, match=r"attacks\.tsv, image 1: p_value .*; make it again"):
        beside(certificates.path, ATTACK)

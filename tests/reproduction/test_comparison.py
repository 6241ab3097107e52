"""Measured beside published: against independent computations, and runs of different settings kept apart."""

import gzip
import json
import math
import shutil
from decimal import Decimal

import numpy as np
import pytest

from rs_consistency.certificates.columns import CERTIFY
from rs_consistency.certificates.selection import Selection
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import UserError
from rs_consistency.reproduction import render, results
from rs_consistency.reproduction.comparison import difference_error, groups_of, pairs_of, rows_of
from rs_consistency.reproduction.plan import Options, deviations, make_plan
from rs_consistency.reproduction.published import Published, table_of
from rs_consistency.reproduction.results import read_results
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Cells of few images and many votes are accepted; tests/certificates/test_forgeries.py is about the check."""
    monkeypatch.setattr(results, "_check_made", lambda *_: None)


MANY = 10**9  # votes


def write_result(folder, method, sigma, seed, radii, *, notes=(), lbd=None, epochs=90, images=None, **made):
    """A kept cell with these radii, all correct, of images 0, 20, 40, ...; -1 for a wrong class."""
    cell = folder / f"{method}{'' if lbd is None else f'_lbd{lbd:g}'}_sigma{sigma:.2f}_seed{seed}_{len(notes)}"
    cell.mkdir(parents=True)
    # With all of so many votes, a line claims less than it could.
    identity = {"sigma": sigma, "n0": 100, "n": MANY, "alpha": 0.001, "seed": seed, "bound": "clopper_pearson"}
    file = CertificateFile(
        cell / "certificates.tsv",
        schema=CERTIFY,
        identity={**identity, "parameter_digest": "p", **({"data_digest": images} if images else {})},
        about={},
        selection=Selection(20 * len(radii), 20),
    )
    lines = []
    for i, r in enumerate(radii):
        named, right, radius = (3, 1, f"{r:.6f}") if r >= 0 else (4, 0, "0.1")
        lines.append((20 * i, 3, named, Decimal(radius), right, 1, 100, MANY, 0, named, right * MANY, MANY))
    file.append(lines)
    file.finish()
    file.close()
    (cell / "certificates.tsv.gz").write_bytes(gzip.compress(file.path.read_bytes(), mtime=0))
    file.path.unlink()
    about = {"method": method, "sigma": sigma, "seed": seed, "lbd": lbd, "epochs": epochs, "deviations": list(notes)}
    (cell / "run.json").write_text(json.dumps(about | made))


def test_rows_are_means_over_seeds_beside_the_published_ones(tmp_path):
    rng = np.random.default_rng(0)
    first, second = np.round(rng.uniform(0, 2, size=(2, 500)), 6)
    first[:5] = -1
    write_result(tmp_path, "gaussian", 0.5, 0, first, notes=["500 of 10,000 images"])
    write_result(tmp_path, "gaussian", 0.5, 1, second, notes=["500 of 10,000 images"])
    write_result(tmp_path, "gaussian", 0.5, 2, second[:100], notes=["n 30", "few"])
    rows = rows_of(read_results(tmp_path), table_of("mnist"))
    row = next(row for row in rows if row.seeds == 2)
    assert len(rows) == 2 and row.images == 500
    means = [np.maximum(first, 0).mean(), second.mean()]
    assert row.acr == pytest.approx(np.mean(means)) and row.deviation == pytest.approx(np.std(means, ddof=1))
    assert row.accuracy == pytest.approx((495 + 500) / 1000)
    per_image = (np.maximum(first, 0) + second) / 2
    images = per_image.std(ddof=1) / math.sqrt(500) * math.sqrt(1 - 500 / 10_000)
    pooled = (np.var(means, ddof=1) + 4 * 0.0016**2) / 5
    error = math.sqrt(pooled * (1 / 2 + 1 / 5) + images**2)
    assert row.error == pytest.approx(error) and row.difference == pytest.approx(row.acr - 1.5581)
    assert row.errors_apart == pytest.approx((row.acr - 1.5581) / error)


def test_errors_of_a_difference_with_few_seeds():
    radii, table = np.linspace(0, 2, 50), table_of("mnist")._replace(images=50)

    def error(deviation, seeds, published, table=table):
        return difference_error(radii, deviation, seeds, published, table)

    both = math.sqrt((1 * 0.001**2 + 4 * 0.003**2) / 5 * (1 / 2 + 1 / 5))
    assert error(0.001, 2, Published(1.0, 0.003, 5)) == pytest.approx(both)
    assert error(None, 1, Published(1.0, 0.003, 5)) == pytest.approx(0.003 * math.sqrt(1 + 1 / 5))
    assert error(0.001, 4, Published(1.0)) == pytest.approx(0.001 * math.sqrt(1 / 4 + 1))
    assert error(None, 1, Published(1.0)) is None
    # The images are not all the chance there is: no error from them alone.
    more = table._replace(images=1000)
    assert error(None, 1, Published(1.0), more) is None
    sample = radii.var(ddof=1) / 50 * (1 - 50 / 1000)
    assert error(0.001, 4, Published(1.0), more) == pytest.approx(math.sqrt(0.001**2 * 1.25 + sample))
    assert error(0.001, 4, Published(1.0, images=50), more) == error(0.001, 4, Published(1.0))
    # ImageNet: two samples of as many images.
    two = table._replace(same_images=False)
    assert error(0.001, 4, Published(1.0), two) == pytest.approx(
        math.sqrt(0.001**2 * 1.25 + 2 * radii.var(ddof=1) / 50)
    )


def test_other_models_and_datasets_are_not_compared_with_numbers_of_this_one(tmp_path):
    for seed, notes in enumerate((["model resnet20"], ["model densenet40"], ["model resnet50"], ["dataset.name svhn"])):
        write_result(tmp_path, "consistency", 0.5, seed, [0.5, 0.7], notes=notes)
    write_result(tmp_path, "consistency", 0.25, 0, [0.5, 0.7], notes=["model resnet20"])
    rows = rows_of(read_results(tmp_path), table_of("cifar10"))
    numbers = {(row.first.sigma, row.first.deviations[0]): row.published and row.published.acr for row in rows}
    assert numbers == {
        (0.5, "model resnet20"): 0.6864,
        (0.5, "model densenet40"): 0.6609,
        (0.5, "model resnet50"): None,
        (0.5, "dataset.name svhn"): None,
        (0.25, "model resnet20"): None,
    }


def test_pairs_are_compared_on_the_same_images(tmp_path):
    rng = np.random.default_rng(1)
    base = np.round(rng.uniform(0.2, 1.5, size=300), 6)
    write_result(tmp_path, "gaussian", 0.5, 0, base)
    few = ["200 of 300 images"]
    write_result(tmp_path, "consistency", 0.5, 0, np.round(base + 0.1, 6)[:200], notes=few)
    write_result(tmp_path, "smoothadv", 0.5, 1, base)  # no common seed with the others
    (pair,) = pairs_of(read_results(tmp_path))
    assert (pair.method, pair.baseline, pair.difference.images) == ("consistency", "gaussian", 200)
    assert pair.difference.mean == pytest.approx(0.1) and pair.difference.standard_error < 1e-6
    assert (pair.difference.gained, pair.difference.lost) == (200, 0) and pair.notes == tuple(few)


def test_images_of_another_content_are_no_pair_and_no_mean(tmp_path):
    write_result(tmp_path, "consistency", 0.5, 0, [0.5, 0.7])
    for seed, data_digest in enumerate(("aa", "aa", "bb")):
        write_result(tmp_path, "gaussian", 0.5, seed, [0.5, 0.7], images=data_digest)
    found = read_results(tmp_path)
    assert [[one.seed for one in group] for group in groups_of(found)] == [[0], [0, 1], [2]]
    assert pairs_of(found) == []  # of what the consistency run was certified on, nothing is known
    shutil.rmtree(tmp_path / "consistency_sigma0.50_seed0_0")
    write_result(tmp_path, "consistency", 0.5, 0, [0.5, 0.7], images="aa")
    assert len(pairs_of(read_results(tmp_path))) == 1


def test_runs_of_different_settings_are_no_pair_no_curve_and_no_mean(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    radii = np.round(rng.uniform(0.2, 1.5, size=(4, 50)), 6)
    short = ["num_epochs 1", "n 30"]
    write_result(tmp_path / "mnist", "gaussian", 0.5, 0, radii[0])
    write_result(tmp_path / "mnist", "gaussian", 0.5, 1, radii[1], notes=short, epochs=1)
    write_result(tmp_path / "mnist", "consistency", 0.5, 1, radii[2][:20], notes=short, epochs=1)
    found = read_results(tmp_path / "mnist")
    (pair,) = pairs_of(found)  # not with the Gaussian run of 90 epochs
    write_result(tmp_path / "other", "gaussian", 0.5, 0, radii[0])
    write_result(tmp_path / "other", "consistency", 0.5, 0, radii[1], notes=["model resnet20"])
    assert pairs_of(read_results(tmp_path / "other")) == []
    assert pair.seeds == 1 and pair.notes == tuple(short)
    assert pair.difference.mean == pytest.approx((radii[2][:20] - radii[1][:20]).mean())
    assert len(groups_of(found)) == 3

    drawn = {}
    monkeypatch.setattr(render, "save_curves", lambda curves, path: drawn.update(curves))
    text = render.render("mnist", tmp_path)
    assert {name: len(curve.idx) for name, curve in drawn.items()} == {
        "gaussian": 50,
        "gaussian (a)": 50,
        "consistency (a)": 20,
    }
    lines = [line.split() for line in text.splitlines()]
    assert [line[-1] for line in lines if line[:1] == ["0.50"]] == ["a"]  # the pair's line
    assert "(a) not as published: num_epochs 1, n 30" in text


def test_a_method_with_another_published_schedule_is_compared(tmp_path):
    write_result(tmp_path / "mnist", "gaussian", 0.5, 0, [1.0, 1.5])
    write_result(tmp_path / "mnist", "catrs", 0.5, 0, [1.2, 1.5], epochs=150)
    (pair,) = pairs_of(read_results(tmp_path / "mnist"))
    assert (pair.method, pair.baseline) == ("catrs", "gaussian") and pair.difference.mean == pytest.approx(0.1)
    text = render.render("mnist", tmp_path)
    assert "not published, so chosen here: catrs.lbd at sigma 0.5, 1" in text
    write_result(tmp_path / "mnist", "smoothmix", 0.5, 0, [1.2, 1.5])
    assert "1.6932 +- 0.0007" in render.render("mnist", tmp_path)  # of released files, over 5 seeds


def test_a_tradeoff_connects_runs_of_the_same_settings(tmp_path, monkeypatch):
    for lbd, notes in ((1.0, []), (5.0, []), (5.0, ["n 30"]), (15.0, ["n 30"])):
        write_result(tmp_path / "tradeoff", "consistency", 1.0, 0, [1.0, 1.5], lbd=lbd, notes=notes)
    rows = rows_of(read_results(tmp_path / "tradeoff"), table_of("tradeoff"))
    lines = render._lines(rows, {("n 30",): "a"})
    assert {name: [row.first.lbd for row in some] for name, some in lines.items()} == {
        "measured": [1.0, 5.0],
        "measured (a)": [5.0, 15.0],
    }


def test_tables_and_pictures_come_from_the_results_alone(program, tmp_path):
    rng = np.random.default_rng(2)
    for method, scale in (("gaussian", 1.0), ("consistency", 1.2)):
        radii = np.round(scale * rng.uniform(0, 1.5, size=100), 6)
        write_result(tmp_path / "mnist", method, 0.5, 0, radii, notes=["100 of 10,000 images"])
    out = program.succeeds("cli.reproduce", "--render", f"--results={tmp_path}").out
    lines = [line.split() for line in out.splitlines()]
    for name, reported in (("gaussian", "1.5581 +- 0.0016 1.5580"), ("consistency", "1.6653 +- 0.0007 1.6548")):
        (line,) = (words for words in lines if words[:2] == [name, "0.50"])
        assert " ".join(line).partition(" to ")[2].split(maxsplit=1)[1].startswith(reported)  # and released files
    assert "published without a cell" not in out and "chosen here" not in out
    assert "(a) not as published: 100 of 10,000 images" in out
    markdown = (tmp_path / "mnist" / "table.md").read_text()
    assert "| gaussian | 0.50 |" in markdown and "| 0.50 | consistency | gaussian | +0." in markdown
    latex = (tmp_path / "mnist" / "table.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2 and r"1.5581 $\pm$ 0.0016" in latex
    assert (tmp_path / "mnist" / "certified_accuracy_sigma0.50.png").read_bytes().startswith(b"\x89PNG")
    for lbd in (1.0, 25.0):
        write_result(tmp_path / "tradeoff", "consistency", 1.0, 0, rng.uniform(0, 2, size=50), lbd=lbd)
    out = program.succeeds("cli.reproduce", "--render", "--table=tradeoff", f"--results={tmp_path}").out
    assert "consistency (lbd 25)" in out and "1.2261" in out
    assert (tmp_path / "tradeoff" / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_a_tradeoff_of_equal_radii_is_drawn(tmp_path):
    for number, lbd in ((7, 1.0), (9, 5.0), (13, 15.0)):  # whose mean and quantiles round differently
        write_result(tmp_path / "tradeoff", "consistency", 1.0, 0, [3.811493] * number, lbd=lbd)
    render.render("tradeoff", tmp_path)
    assert (tmp_path / "tradeoff" / "tradeoff.png").exists()


@pytest.mark.parametrize("change", [{"deviations": None}, {"epochs": "many"}])
def test_a_damaged_record_is_named(tmp_path, change):
    write_result(tmp_path, "gaussian", 0.5, 0, [1.0, 1.5], **change)
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*run reproduce\.py again"):
        read_results(tmp_path)


def test_methods_are_compared_after_other_numbers_of_epochs_too(tmp_path):
    options = Options(methods=["gaussian", "smoothadv"], sigmas=[0.5], epochs=45)
    for cell in make_plan("mnist", options, workdir=tmp_path):
        write_result(tmp_path, cell.method, 0.5, 0, [1.0, 1.5, 0.2], notes=deviations(cell), epochs=45)
    notes = [one.deviations for one in read_results(tmp_path)]
    assert notes[0] != notes[1]  # only one of them has a warm-up
    (pair,) = pairs_of(read_results(tmp_path))
    assert (pair.method, pair.baseline) == ("smoothadv", "gaussian")
    write_result(tmp_path, "macer", 0.5, 0, [1.0, 1.5, 0.2], notes=["num_epochs 45"], epochs=45)  # another schedule
    assert len(pairs_of(read_results(tmp_path))) == 1


def test_a_table_says_where_it_was_made_and_what_was_not_recorded(tmp_path):
    calls = [{"program": "train", "git_commit": "0123456789abcdef (dirty)"}, {"program": "certify"}]
    new = [{"program": "train", "device": "2 x gpu", "processor": "P", "git_commit": "f" * 40}]
    places = {"certified_with": {"device": "1 x cpu (cpu)", "git_commit": "a" * 40}}
    places["continued_with"] = [places["certified_with"], {"device": "8 x tpu", "git_commit": "b" * 40}]
    write_result(tmp_path / "mnist", "gaussian", 0.5, 0, [1.0, 1.5], calls=calls, **places)
    alone = (
        "trained on device not recorded, at commit 0123456789 (dirty); certified on device 1 x cpu (cpu), at commit"
        " aaaaaaaaaa and on device 8 x tpu, at commit bbbbbbbbbb"
    )
    assert f"\n{alone}\n" in render.render("mnist", tmp_path)
    for seed in (1, 2):
        write_result(tmp_path / "mnist", "gaussian", 0.5, seed, [1.0, 1.5], calls=new)
    write_result(tmp_path / "mnist", "gaussian", 0.5, 3, [1.0, 1.5])  # by hand
    text = render.render("mnist", tmp_path)
    assert f"\ngaussian_sigma0.50_seed0_0: {alone}\n" in text
    both = "gaussian_sigma0.50_seed1_0, gaussian_sigma0.50_seed2_0"
    assert f"\n{both}: trained on device 2 x gpu, at commit ffffffffff; processor P\n" in text
    assert "seed3_0:" not in text


def missing_tables(results, document):
    """Tables of the results that the document does not show as they are, those without a table.md among them."""
    folders = {path.parents[1] for path in results.glob("*/*/run.json")}
    return [
        folder.name
        for folder in sorted(folders)
        if not (folder / "table.md").exists() or (folder / "table.md").read_text() not in document
    ]


def test_the_results_document_shows_the_tables_as_they_are(tmp_path):
    write_result(tmp_path / "mnist", "gaussian", 0.5, 0, [1.0, 1.5])
    assert missing_tables(tmp_path, "") == ["mnist"]
    render.render("mnist", tmp_path)
    table = (tmp_path / "mnist" / "table.md").read_text()
    assert missing_tables(tmp_path, f"before\n\n{table}\nafter") == []
    assert missing_tables(tmp_path, table.replace("1.25", "1.26")) == ["mnist"]
    kept = ROOT / "results"
    missing = missing_tables(kept, (ROOT / "docs" / "results.md").read_text())
    assert not missing, f"put table.md of {missing} into docs/results.md, after reproduce.py --render"
    assert not kept.exists() or list(kept.glob("*/*/run.json")), "results/ holds no finished cell"

"""reproduce.py: plans, killed and failing plans on tiny settings, and tables against independent computations."""

import gzip
import json
import math
import shutil
import subprocess

import numpy as np
import pytest

from rs_consistency.reproduction.comparison import difference_error, pairs_of, rows_of
from rs_consistency.reproduction.plan import Options, deviations, make_plan, share_of
from rs_consistency.reproduction.published import TABLES, TRADEOFF, Published, table_of
from rs_consistency.reproduction.results import read_results
from rs_consistency.reproduction.runner import Speeds
from rs_consistency.reproduction.state import State
from rs_consistency.shards import Shard
from tests.helpers import ROOT, count_lines, kill_when, start

TINY = [
    "--table=mnist", "--sigmas=0.5", "--dataset=mnist_subset", "--epochs=3", "--images=4", "--n=30", "--jobs=2",
    "--config", "batch_size=2000", "--config", "num_devices=1", "--config", "dataset.augment=none",
]  # fmt: skip


def plan(table="mnist", folder=ROOT, **options):
    return make_plan(table, Options(**options), workdir=folder)


def test_the_mnist_table_is_six_methods_at_three_sigmas_as_published():
    cells = plan()
    assert len(cells) == 18 and len({cell.name for cell in cells}) == 18
    assert not any(deviations(cell) for cell in cells)
    by_name = {cell.name: cell for cell in cells}
    config = by_name["smoothadv+consistency_sigma1.00_seed0"].config()
    assert (config.method, config.consistency.lbd, config.num_noise, config.num_epochs) == ("smoothadv", 1.0, 4, 90)
    assert by_name["macer_sigma1.00_seed0"].config().macer.lbd == 6.0
    table = table_of("mnist")
    assert table.cells["consistency", 0.5] == Published(1.6653, 0.0007, 5)
    assert table.cells["macer", 1.0] == Published(1.5950, 0.0051, 5) and TRADEOFF[25.0] == (1.2261, 0.732)
    assert {name: len(plan(name)) for name in TABLES} == {"mnist": 18, "tradeoff": 6, "cifar10": 21, "imagenet": 5}


def test_seeds_and_shorter_schedules_are_settings_of_a_cell():
    cells = plan(methods=["smoothadv"], sigmas=[0.25], seeds=2, epochs=9, images=500)
    assert [cell.config().seed for cell in cells] == [0, 1]
    config = cells[1].config()
    assert (config.num_epochs, config.optimizer.lr_step_size, config.smoothadv.warmup_epochs) == (9, 3, 1)
    assert cells[0].selection.indices().tolist() == list(range(0, 10_000, 20))
    notes = deviations(cells[1])
    assert "num_epochs 9" in notes and "500 of 10,000 images" in notes and not any("seed" in note for note in notes)
    weights = [cell.config().consistency.lbd for cell in plan("tradeoff")]
    assert weights == [1, 5, 15, 20, 25, 30]


def test_catrs_waits_for_its_teacher(tmp_path):
    cells = plan("cifar10", tmp_path, methods=["catrs"])
    assert [cell.name for cell in cells] == ["gaussian_sigma0.25_seed0", "catrs_sigma0.25_seed0"]
    assert cells[1].needs == cells[0].name and cells[0].needs is None
    assert cells[1].config().catrs.teacher == str(tmp_path / cells[0].name)


def test_shards_divide_a_plan():
    cells = plan(seeds=2)
    shares = [share_of(cells, Shard(index, 5)) for index in range(1, 6)]
    assert sorted(cell.name for share in shares for cell in share) == sorted(cell.name for cell in cells)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_time_left_follows_from_what_was_measured(tmp_path):
    (cell,) = plan(methods=["gaussian"], sigmas=[0.5], images=500)
    speeds = Speeds(tmp_path / "speeds.json")
    assert speeds.seconds_left(cell, State()) is None
    speeds.learn(cell, keep=True, epoch_seconds=10.0, votes_per_second=100_100.0)
    speeds = Speeds(tmp_path / "speeds.json")
    assert speeds.seconds_left(cell, State()) == pytest.approx(90 * 10 + 500)
    assert speeds.seconds_left(cell, State(epochs=30)) == pytest.approx(60 * 10 + 500)
    assert speeds.seconds_left(cell, State(epochs=90, trained=True, images=400)) == pytest.approx(100)


def processes_with(text):
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if text in line and "reproduction.child" in line]


def test_a_killed_plan_goes_on_and_a_failing_cell_stops_no_other(program, tmp_path, capfd):
    folder, results = tmp_path / "runs", tmp_path / "results"
    arguments = [*TINY, "--methods=gaussian,stability", f"--workdir={folder}", f"--results={results}"]
    folder.mkdir()
    speeds = Speeds(folder / "speeds.json")
    for cell in plan(methods=["gaussian", "stability"], sigmas=[0.5], dataset="mnist_subset"):
        speeds.learn(cell, keep=True, epoch_seconds=2.0, votes_per_second=1e4)
    (folder / "stability_sigma0.50_seed0").write_text("in the way")

    process = start("reproduce.py", *arguments)
    metrics = folder / "gaussian_sigma0.50_seed0" / "metrics.jsonl"
    kill_when(process, lambda: (metrics.parent / "checkpoints" / "5").is_dir())  # of the first epoch
    assert 1 <= count_lines(metrics) < 3

    program("cli.reproduce", *arguments)
    assert program.status == 1
    assert not processes_with(str(folder))
    failures = [line for line in program.err.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1 and failures[0].startswith("failed: stability_sigma0.50_seed0: ")
    assert "1 of 2 cells failed" in program.err
    assert "continuing after step" in (folder / "gaussian_sigma0.50_seed0.log").read_text()
    assert count_lines(metrics) == 3
    kept = results / "mnist" / "gaussian_sigma0.50_seed0"
    assert sorted(path.name for path in kept.iterdir()) == [
        "certificates.json", "certificates.tsv.gz", "config.json", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    assert str(tmp_path) not in "".join(path.read_text() for path in kept.glob("*.json*"))
    run = json.loads((kept / "run.json").read_text())
    assert run["epochs"] == 3 and run["images"] == 4 and "4 of 10,000 images" in run["deviations"]
    assert [call["program"] for call in run["calls"]] == ["train", "train", "certify"]
    assert "1.5581 +- 0.0016" in program.out and "written: " in program.out
    packed = (kept / "certificates.tsv.gz").read_bytes()
    assert gzip.decompress(packed) == (folder / kept.name / "certificates.tsv").read_bytes()

    # The same command after the obstacle is gone does what is left, and then nothing.
    (folder / "stability_sigma0.50_seed0").unlink()
    assert "2 cells, 1 to do, 2 at a time" in program.succeeds("cli.reproduce", *arguments, "--dry_run").out
    shutil.copytree(folder / "gaussian_sigma0.50_seed0", folder / "stability_sigma0.50_seed0")
    program("cli.reproduce", *arguments)  # another method's run in its place
    assert program.status == 1 and "holds a run with another config" in program.err
    assert (kept / "certificates.tsv.gz").read_bytes() == packed


def test_speed_is_measured_before_a_plan_starts(program, tmp_path):
    arguments = [*TINY, "--methods=gaussian", f"--workdir={tmp_path}", "--dry_run"]
    out = program.succeeds("cli.reproduce", *arguments).out
    assert "gaussian_sigma0.50_seed0  epoch 0/3, image 0/4, about 0:00" in out and "not as published: " in out
    assert not (tmp_path / "gaussian_sigma0.50_seed0").exists()
    (measured,) = json.loads((tmp_path / "speeds.json").read_text()).values()
    assert measured["epoch_seconds"] > 0 and measured["votes_per_second"] > 0


def write_result(folder, method, sigma, seed, radii, *, notes=(), lbd=None):
    """A kept cell with these radii, all correct, of images 0, 20, 40, ...; -1 for a wrong class."""
    cell = folder / f"{method}{'' if lbd is None else f'_lbd{lbd:g}'}_sigma{sigma:.2f}_seed{seed}_{len(notes)}"
    cell.mkdir(parents=True)
    lines = [
        f"{20 * i}\t3\t{3 if r >= 0 else 4}\t{r if r >= 0 else 0.1:.6f}\t{int(r >= 0)}\t0:00:01"
        for i, r in enumerate(radii)
    ]
    text = "\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *lines, ""])
    (cell / "certificates.tsv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    about = {"method": method, "sigma": sigma, "seed": seed, "lbd": lbd, "epochs": 90, "deviations": list(notes)}
    (cell / "run.json").write_text(json.dumps(about))


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
    error = math.sqrt(np.std(means, ddof=1) ** 2 / 2 + 0.0016**2 / 5 + images**2)
    assert row.error == pytest.approx(error) and row.difference == pytest.approx(row.acr - 1.5581)
    assert row.errors_apart == pytest.approx((row.acr - 1.5581) / error)


def test_errors_of_a_difference_without_seeds_or_with_all_images():
    radii = np.linspace(0, 2, 50)
    all_images = difference_error(radii, None, 1, Published(1.0, 0.003, 5), 50)
    assert all_images == pytest.approx(0.003 * math.sqrt(1 + 1 / 5))
    assert difference_error(radii, None, 1, Published(1.0), 50) is None
    sample = radii.std(ddof=1) / math.sqrt(50) * math.sqrt(1 - 50 / 1000)
    assert difference_error(radii, None, 1, Published(1.0), 1000) == pytest.approx(sample)


def test_pairs_are_compared_on_the_same_images(tmp_path):
    rng = np.random.default_rng(1)
    base = np.round(rng.uniform(0.2, 1.5, size=300), 6)
    write_result(tmp_path, "gaussian", 0.5, 0, base)
    write_result(tmp_path, "consistency", 0.5, 0, np.round(base + 0.1, 6)[:200])
    write_result(tmp_path, "smoothadv", 0.5, 1, base)  # no common seed with the others
    (pair,) = pairs_of(read_results(tmp_path))
    assert (pair.method, pair.baseline, pair.difference.images) == ("consistency", "gaussian", 200)
    assert pair.difference.mean == pytest.approx(0.1) and pair.difference.standard_error < 1e-6
    assert (pair.difference.gained, pair.difference.lost) == (200, 0)


def test_tables_and_pictures_come_from_the_results_alone(program, tmp_path):
    rng = np.random.default_rng(2)
    for method, scale in (("gaussian", 1.0), ("consistency", 1.2)):
        radii = np.round(scale * rng.uniform(0, 1.5, size=100), 6)
        write_result(tmp_path / "mnist", method, 0.5, 0, radii, notes=["100 of 10,000 images"])
    out = program.succeeds("cli.reproduce", "--render", f"--results={tmp_path}").out
    assert "1.5581 +- 0.0016" in out and "(a) not as published: 100 of 10,000 images" in out
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=svhn", "--workdir=x"], "table='svhn' is unknown; use one of mnist, tradeoff, cifar10, imagenet"),
        ([], "workdir is missing: add --workdir=FOLDER"),
        (["--methods=magic", "--workdir=x"], "methods='magic' is unknown; use one of consistency"),
        (["--sigmas=0.3", "--workdir=x"], "sigmas=0.3: table=mnist has 0.25, 0.5, 1.0"),
        (["--seeds=0", "--workdir=x"], "seeds=0: use a whole number of at least 1"),
        (["--images=20000", "--workdir=x"], "images=20000: use a whole number of at least 1 and at most 10000"),
        (
            ["--table=tradeoff", "--methods=macer", "--workdir=x"],
            "methods=macer: table=tradeoff compares values of lbd",
        ),
        (["--dataset=cifar10", "--workdir=x"], "dataset=cifar10 has other images or classes than mnist"),
        (["--table=imagenet", "--methods=smoothadv", "--workdir=x"], "methods='smoothadv' is unknown"),
        (["--config", "sigma=1", "--workdir=x"], "config=sigma=1: write KEY=VALUE, for a key that has no option"),
        (["--shard=9/2", "--workdir=x"], "shard='9/2': use I/K"),
        (["--render", "--results=nowhere"], "holds no finished cell; run reproduce.py without --render first"),
    ],
)
def test_bad_input_is_named(program, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in program.fails("cli.reproduce", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_results_document_shows_the_tables_as_they_are():
    text = (ROOT / "docs" / "results.md").read_text()
    for folder in sorted((ROOT / "results").glob("*/")):
        assert (folder / "table.md").read_text() in text, f"put {folder.name}/table.md into docs/results.md"

"""Modes, bounds, shards and audits of certify.py, on a trained run."""

import gzip
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from rs_consistency import attack, certify, data, decide, noise, predict
from rs_consistency.certificates.question import make_question
from rs_consistency.certificates.write import CertificateFile
from rs_consistency.common.errors import EXIT_CONTRADICTED, EXIT_NOT_REPRODUCED
from rs_consistency.models import create_model
from rs_consistency.statistics import bounds
from tests.helpers import ROOT, count_lines, final_params, rows

QUICK = ["--n=100", "--batch_size=128", "--skip=2"]
SETTINGS = {"sigma": 0.5, "num_classes": 10, "n": 100}


def table(path):
    """Column -> values, as text."""
    header, *lines = rows(path)
    return dict(zip(header, zip(*lines, strict=True), strict=True))


@pytest.fixture(scope="module")
def trained(toy_trained):
    """The run of the linear model: none of these tests is about a network."""
    return toy_trained


@pytest.fixture(scope="module")
def classifier(trained):
    """The run's classifier as a function, and its 30 images."""
    params, model = final_params(trained), create_model("linear", num_classes=10)
    indices = np.arange(0, 60, 2)
    images = data.load("mnist", "test").images[indices] / np.float32(255)
    return (lambda batch: model.apply({"params": params}, batch)), images, indices


@pytest.fixture(scope="module")
def certified(trained, tmp_path_factory):
    from rs_consistency.cli import certify

    output = tmp_path_factory.mktemp("certified") / "c.tsv"
    certify.main([f"--workdir={trained}", *QUICK, f"--output={output}"])
    return output


def test_decisions_are_those_of_the_library(program, trained, classifier, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--mode=decide", "--radius=0.3"]
    out = program.succeeds(*command, f"--output={tmp_path / 'd.tsv'}").out
    apply_fn, images, indices = classifier
    expected = decide(apply_fn, images, radius=0.3, indices=indices, **SETTINGS)
    found = table(tmp_path / "d.tsv")
    assert list(map(int, found["idx"])) == indices.tolist()
    names = {1: "certified", -1: "not_certified", 0: "undecided"}
    assert list(found["decision"]) == [names[one] for one in expected.decision.tolist()]
    assert list(map(int, found["votes"])) == expected.votes.tolist()
    assert list(map(int, found["count"])) == expected.hits.tolist()
    certified = expected.decision == 1
    assert 0 < certified.sum() < 30
    assert list(map(int, found["predict"])) == np.where(certified, expected.selected, -1).tolist()
    assert list(found["radius"]) == ["0.300000" if one else "0.000000" for one in certified]
    assert f"at radius 0.3 certified {certified.sum()}" in out
    assert f"{expected.votes.mean():.0f} votes a decision" in out
    record = json.loads((tmp_path / "d.json").read_text())
    assert (record["mode"], record["radius"], record["n"]) == ("decide", 0.3, 100) and "bound" not in record
    # Any tool of the field reads it: the certified accuracy at that radius.
    program.succeeds("cli.analyze", tmp_path / "d.tsv", "--radii", "0.3", "--format=json")
    (summary,) = json.loads(program.out)
    assert summary["radius"] == 0.3 and summary["accuracy"] == np.mean([one == "1" for one in found["correct"]])


def test_predictions_are_those_of_the_library(program, trained, classifier, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--mode=predict"]
    program.succeeds(*command, f"--output={tmp_path / 'p.tsv'}")
    apply_fn, images, indices = classifier
    expected = predict(apply_fn, images, indices=indices, **SETTINGS)
    found = table(tmp_path / "p.tsv")
    assert list(map(int, found["predict"])) == expected.prediction.tolist()
    assert list(map(float, found["p_value"])) == expected.p_value.tolist()
    assert set(found["radius"]) == {"0.000000"}
    labels = list(map(int, found["label"]))
    assert list(map(int, found["count_label"])) == expected.counts[np.arange(30), labels].tolist()


@pytest.mark.parametrize("bound", ["two_class", "randomized"])
def test_other_bounds_change_the_radii_of_the_same_votes(program, trained, certified, tmp_path, bound):
    output = tmp_path / "b.tsv"
    program.succeeds("cli.certify", f"--workdir={trained}", *QUICK, f"--bound={bound}", f"--output={output}")
    found, published = table(output), table(certified)
    for name in ("count0", "count", "count_runner_up", "selected"):
        assert found[name] == published[name]
    count, runner_up, index = (np.array(list(map(int, found[name]))) for name in ("count", "count_runner_up", "idx"))
    expected = bounds.certify_votes(
        count, runner_up, 100, alpha=0.001, sigma=0.5, bound=bound, uniform=noise.bound_uniform(0, index)
    )
    np.testing.assert_allclose(list(map(float, found["radius"])), expected.radius, atol=1e-6)
    assert found["radius"] != published["radius"]
    # Recomputed from the counts of the published protocol's file, without the model: the same.
    program.succeeds("cli.analyze", certified, f"--bound={bound}", "--format=json")
    (again,) = json.loads(program.out)
    program.succeeds("cli.analyze", output, "--format=json")
    (made,) = json.loads(program.out)
    assert again["acr"] == made["acr"]


def test_a_tolerance_takes_fewer_votes_through_interruption_shards_and_audit(program, trained, classifier, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--n=400", "--n0=100", "--max=12", "--tolerance=0.1"]
    whole, parts = tmp_path / "whole.tsv", [tmp_path / f"{i}.tsv" for i in (1, 2)]
    program.succeeds(*command, f"--output={whole}", "--max=5")
    out = program.succeeds(*command, f"--output={whole}").out
    apply_fn, images, indices = classifier
    expected = certify(apply_fn, images[:12], indices=indices[:12], **SETTINGS | {"n": 400, "n0": 100}, tolerance=0.1)
    found, cast = table(whole), expected.counts.sum(axis=1)
    assert list(map(int, found["votes"])) == cast.tolist() and len(set(cast)) > 3 and cast.max() <= 400
    assert list(map(int, found["predict"])) == expected.prediction.tolist()
    np.testing.assert_allclose(list(map(float, found["radius"])), expected.radius, atol=1e-6)
    assert f"{cast.mean():,.0f} of 400 votes an image" in out
    for i, path in enumerate(parts, start=1):
        program.succeeds(*command, f"--shard={i}/2", f"--output={path}", f"--num_devices={i}")
    program.succeeds("cli.certify", "--merge", *parts, f"--output={tmp_path / 'all.tsv'}")
    assert rows(tmp_path / "all.tsv") == rows(whole)
    audit = ["cli.certify", f"--workdir={trained}", "--verify=12", f"--output={whole}"]
    assert program.succeeds(*audit).out == "12 of 12 lines reproduce; all 12 are proven in whole numbers\n"
    assert "tolerance=0.2: verify takes the settings that the file names" in program.fails(*audit, "--tolerance=0.2")
    assert "tolerance: 0.1 -> None" in program.fails(*command[:-1], f"--output={whole}")
    # Votes that the selection did not ask for, as if they had been chosen by looking.
    number, lines = int(np.flatnonzero(cast < 400)[0]), whole.read_text().splitlines(keepends=True)
    cells = lines[number + 1].rstrip("\n").split("\t")
    lines[number + 1] = "\t".join([*cells[:-1], str(int(cells[-1]) + 1)]) + "\n"
    whole.write_text("".join(lines))
    fault = f"votes {cast[number] + 1}, its selection asks for {cast[number]}"
    assert fault in program.fails("cli.analyze", whole, "--alpha=0.01")
    program(*audit)
    assert program.status == EXIT_NOT_REPRODUCED and fault in program.out


def test_an_attack_is_written_and_compared_with_the_certificates_beside_it(program, trained, classifier, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    effort = {"copies": 4, "steps": 8, "restarts": 1}
    command = ["cli.certify", f"--workdir={workdir}", "--skip=2", "--max=4", "--n=100", "--num_devices=1"]
    attacking = [*command, "--attack", *(f"--{name}={value}" for name, value in effort.items())]
    question = make_question(
        "attack", info=data.dataset_info("mnist"), devices=jax.devices(), sigma=0.5, alpha=0.1, seed=0, **effort
    )
    assert question.cost() == ("10,000 on each of some 4 images, 32 gradients", False, 40_128)
    program.succeeds(*attacking)
    assert "no certificates.tsv lies beside" in program.err
    apply_fn, images, indices = classifier
    expected = attack(apply_fn, images[:4], indices=indices[:4], **SETTINGS, **effort, devices=jax.devices()[:1])
    found = table(workdir / "attacks.tsv")
    assert list(map(int, found["predict"])) == expected.prediction.tolist()
    assert list(map(int, found["adversarial"])) == expected.adversarial.tolist() and expected.adversarial.max() >= 0
    distances = np.array(list(map(float, found["distance"])))
    finite = np.isfinite(distances)
    error = distances[finite] - expected.distance[finite]
    assert ((error >= 0) & (error < 1e-6)).all()
    assert (
        f"{finite.sum()} adversarial images proven, median distance {np.median(distances[finite]):.4f}" in program.out
    )
    assert (
        f"all {finite.sum()} claims in 4 lines are proven"
        in program.succeeds("cli.analyze", workdir / "attacks.tsv", "--exact").out
    )
    program.succeeds(*command)
    program.succeeds(*attacking)
    assert program.out.endswith("4 certificates of certificates.tsv compared, 0 contradicted\n")
    # A distance inside the certified radius, in a file that was not finished.
    path, number = workdir / "attacks.tsv", int(np.flatnonzero(finite & (distances > 0.1))[0])
    cell = found["distance"][number]
    path.write_text(path.read_text().replace(cell, "0.000001"))
    assert "was changed after it was finished" in program.fails(*attacking)
    record = json.loads(path.with_suffix(".json").read_text())
    del record["finished"]
    path.with_suffix(".json").write_text(json.dumps(record))
    program(*attacking)
    alarm = (
        f"ALARM: image {2 * number}: class {found['adversarial'][number]} at distance 0.000001, inside the certified"
    )
    assert program.status == EXIT_CONTRADICTED and alarm in program.out
    assert "verify=2: " in program.fails("cli.certify", f"--workdir={workdir}", "--attack", "--verify=2")


def test_default_files_by_mode_and_shard(program, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    command = ["cli.certify", f"--workdir={workdir}", "--n=50", "--max=4"]
    program.succeeds(*command, "--mode=decide", "--radius=0")
    program.succeeds(*command, "--mode=predict")
    program.succeeds(*command, "--shard=2/3")
    made = {path.name for path in workdir.glob("*.tsv")}
    assert made == {"decisions.tsv", "predictions.tsv", "certificates-2-of-3.tsv"}
    program.succeeds(*command, "--mode=decide", "--verify=2")
    assert program.out == (
        "2 of 2 lines reproduce; of all 4, at most 77.7% do not, with 95% confidence; all 4 are proven in whole"
        " numbers\n"
    )


def test_shards_together_are_the_whole(program, trained, certified, tmp_path):
    shards = [tmp_path / f"{i}.tsv" for i in (1, 2, 3)]
    command = ["cli.certify", f"--workdir={trained}", *QUICK]
    for i, path in enumerate(shards[:2], start=1):
        program.succeeds(*command, f"--shard={i}/3", f"--output={path}", f"--num_devices={i}")
    merging = ["cli.certify", "--merge", *shards[:2], f"--output={tmp_path / 'all.tsv'}"]
    assert "3/3" in program.fails(*merging)
    program.succeeds(*command, "--shard=3/3", f"--output={shards[2]}", "--max=12")
    merging.insert(2, shards[2])
    program.fails(*merging)  # made with another --max: images are missing
    assert not (tmp_path / "all.tsv").exists()
    program.succeeds(*command, "--shard=3/3", f"--output={shards[2]}")
    program.succeeds(*merging)
    assert rows(tmp_path / "all.tsv") == rows(certified)
    assert "30 images of 3 shards" in program.out
    program.succeeds(*command, "--verify=3", f"--output={tmp_path / 'all.tsv'}")
    assert "3 of 3 lines reproduce" in program.out


def test_an_audit_finds_a_forged_line_and_another_model(program, trained, certified, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", "--verify=30"]
    program.succeeds(*command, f"--output={certified}")
    assert program.out == "30 of 30 lines reproduce; all 30 are proven in whole numbers\n"
    forged = tmp_path / "forged.tsv.gz"  # packed: audited as the plain one
    lines = certified.read_text().splitlines(keepends=True)
    cells = lines[5].rstrip("\n").split("\t")
    count, runner_up = int(cells[7]), int(cells[8])
    cells[7], cells[8] = str(count - 3), str(runner_up + 3)
    lines[5] = "\t".join(cells) + "\n"
    forged.write_bytes(gzip.compress("".join(lines).encode()))
    shutil.copy(certified.with_suffix(".json"), tmp_path / "forged.json")
    program(*command, f"--output={forged}")
    assert program.status == EXIT_NOT_REPRODUCED
    assert "image 8: " in program.out and f"count {count - 3}, drawn again {count}" in program.out
    assert "29 of 30 lines reproduce, largest difference 3 votes" in program.out

    record = json.loads((tmp_path / "forged.json").read_text())
    (tmp_path / "forged.json").write_text(json.dumps({**record, "parameter_digest": "0" * 64}))
    assert "parameter_digest" in program.fails(*command, f"--output={forged}")

    whole = "".join(certified.read_text().splitlines(keepends=True)[:-1]).encode()  # and the digest for it
    digest = {**record["finished"], "sha256": hashlib.sha256(whole).hexdigest()}
    (tmp_path / "forged.json").write_text(json.dumps({**record, "finished": digest}))
    forged.write_bytes(gzip.compress(whole))
    command[-1] = "--verify=1"
    program(*command, f"--output={forged}")
    assert program.status == EXIT_NOT_REPRODUCED
    assert "was changed after it was finished: it holds 29 images, and forged.json says 30" in program.out
    forged.write_bytes(gzip.compress(certified.read_bytes()))
    for changed, message in (
        ({"split_size": 61, "max": 30}, "split_size: 61 -> 60"),
        ({"config": {**record["config"], "method": "macer"}}, "config.method: 'macer' -> 'gaussian'"),
        ({"config": {"optimizer": {"lr": 9}}}, "config.optimizer.lr: 9 -> "),
    ):
        (tmp_path / "forged.json").write_text(json.dumps({**record, **changed}))
        assert message in program.fails(*command, f"--output={forged}")
    for changed in ({"config": None}, {"config": {"eval_batch_size": 9, "later": 1}}):  # which says nothing of it
        (tmp_path / "forged.json").write_text(json.dumps({**record, **changed}))
        program.succeeds(*command, f"--output={forged}")


def test_interrupted_decisions_continue_to_the_same_file(program, trained, tmp_path, monkeypatch):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--mode=decide", "--radius=0.45"]
    whole, stopped = tmp_path / "whole.tsv", tmp_path / "stopped.tsv"
    program.succeeds(*command, f"--output={whole}")
    append = CertificateFile.append

    def interrupt(self, lines):
        append(self, lines)
        if count_lines(stopped) >= 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CertificateFile, "append", interrupt)
        assert "interrupted; the same command continues" in program.fails(*command, f"--output={stopped}")
    assert 5 <= count_lines(stopped) < 31
    program.succeeds(*command, f"--output={stopped}")
    assert "images already" in program.err
    assert rows(stopped) == rows(whole)


def test_another_dtype_is_another_function_and_recorded(program, trained, tmp_path):
    command = ["cli.certify", f"--workdir={trained}", *QUICK, f"--output={tmp_path / 'c.tsv'}"]
    program.succeeds(*command, "--max=2", "--dtype=bfloat16")
    assert json.loads((tmp_path / "c.json").read_text())["dtype"] == "bfloat16"
    assert "dtype: 'bfloat16' -> 'float32'" in program.fails(*command)
    program.succeeds(*command, "--verify=1")  # with the recorded one
    assert "1 of 1 lines reproduce" in program.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=9"], "n=9 votes certify nothing at alpha=0.001, even if all agree; use n=10"),
        (["--n=9", "--dry_run"], "n=9 votes certify nothing at alpha=0.001, even if all agree; use n=10"),
        (["--mode=predict", "--n=10"], "n=10 votes predict nothing at alpha=0.001, even if all agree; use n=11"),
        (["--mode=decide", "--radius=1", "--n=100"], "radius=1: n=100 votes cannot certify it; use radius=0.66 or n=4"),
        (["--tolerance=0"], "tolerance=0.0: use a number greater than 0"),
        (["--tolerance=0.1", "--bound=two_class"], "tolerance=0.1: it leaves few votes to images that bound=two_class"),
        (["--mode=predict", "--tolerance=0.1"], "tolerance=0.1: mode=predict has no use for it"),
        (["--alpha_share=0.9"], "alpha_share=0.9: bound=clopper_pearson does not share alpha; leave it out"),
        (["--mode=predict", "--alpha_share=0.9"], "alpha_share=0.9: mode=predict has no use for it"),
        (["--attack", "--mode=predict"], "--attack and --mode exclude each other; leave out one of them"),
        (["--bound=two_class", "--alpha_share=1"], "alpha_share=1.0: use a number in (0, 1)"),
        (["--mode=decide"], "mode=decide needs the radius to decide at: add --radius"),
        (["--mode=decide", "--radius=-1"], "radius=-1.0"),
        (["--mode=decide", "--radius=nan"], "radius=nan"),
        (["--mode=vote"], "mode='vote' is unknown; use one of attack, certify, decide, predict"),
        (["--attack", "--n=13"], "n=13 votes prove no attack at alpha=0.001, even if all agree; use n=14"),
        (["--attack", "--n0=9"], "n0=9: mode=attack selects no class"),
        (["--attack", "--steps=0"], "steps=0: use a whole number of at least 1"),
        (["--steps=9"], "steps=9: mode=certify has no use for it; leave it out, or use --mode=attack"),
        (["--radius=1"], "radius=1.0: mode=certify has no use for it"),
        (["--mode=predict", "--bound=two_class"], "bound=two_class: mode=predict has no use for it"),
        (["--mode=predict", "--n0=10"], "n0=10: mode=predict selects no class"),
        (["--bound=wald"], "bound='wald' is unknown"),
        (["--shard=0/3"], "shard='0/3': use I/K"),
        (["--shard=99/100", "--max=5"], "shard=99/100: there are only 5 images"),
        (["--dtype=float16"], "dtype='float16' is unknown"),
        (["--verify=0", "--output={certified}"], "verify=0: use a whole number of at least 1"),
        (["--verify=3", "--output=/nowhere/c.tsv"], "/nowhere/c.tsv does not exist"),
        (
            ["--verify=3", "--sigma=1", "--output={certified}"],
            "sigma=1.0: verify takes the settings that the file names (sigma: 0.5); leave it out",
        ),
        (["--verify=3", "--seed=9", "--output={certified}"], "seed=9: verify takes the settings that the file names"),
        (["--verify=3", "--max=2", "--output={certified}"], "max=2: verify takes the settings that the file names"),
        (["--verify=3", "--shard=1/2", "--output={certified}"], "shard=1/2: verify takes the settings that the file"),
        (["--verify=3", "--mode=decide", "--output={certified}"], "mode=decide: verify takes the settings that the"),
        (["--mode=decide", "--radius=1e30"], "radius=1e+30: use a number of at least 0 and at most 1e+06"),
        (["--sigma=1e23"], "sigma=1e+23: use a number greater than 0 and at most 1e+06"),
    ],
)
def test_bad_settings_of_the_modes(program, trained, certified, arguments, message):
    arguments = [argument.format(certified=certified) for argument in arguments]
    assert message in program.fails("cli.certify", f"--workdir={trained}", *arguments)
    assert not list(trained.glob("*.tsv"))


RUN, TORCH, MERGE = "--workdir=x", "--torch_checkpoint=x", "--merge=a.tsv"
CONFIG = f"--config={ROOT}/configs/mnist.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n=10"], "one of the arguments --workdir --torch_checkpoint --merge is required"),
        ([RUN, TORCH], "argument --torch_checkpoint: not allowed with argument --workdir; give one of them"),
        ([RUN, MERGE], "argument --merge: not allowed with argument --workdir; give one of them"),
        ([RUN, "--verify=2", "--dry_run"], "--dry_run: not allowed with argument --verify; give one of them"),
        ([RUN, "--verify=0", "--finished"], "--finished and --verify exclude each other; leave out one of them"),
        ([RUN, "--config.sigma=1"], "--workdir and --config exclude each other; leave out one of them"),
        ([RUN, "--torch_input=none"], "--workdir and --torch_input exclude each other"),
        ([RUN, "--verify_seed=0"], "--verify_seed needs another flag; add --verify=K"),
        ([MERGE, "--output=b.tsv", "--verify=1"], "--merge and --verify exclude each other"),
        ([MERGE, "--output=b.tsv", "--dry_run"], "--merge and --dry_run exclude each other"),
        ([MERGE, "--output=b.tsv", "--finished"], "--merge and --finished exclude each other"),
        *(
            ([MERGE, "--output=b.tsv", f"--{flag}"], f"--merge and --{flag.partition('=')[0]} exclude each other")
            for flag in ("n=5", "skip=2", "shard=1/2", "seed=fresh", "attack", "data_dir=x", "num_devices=1")
        ),
        ([MERGE, "--output=b.tsv", "--config.sigma=1"], "--merge and --config exclude each other"),
        ([MERGE], "--merge needs another flag; add --output=FILE.tsv"),
        ([TORCH, "--finished"], "--finished and --torch_checkpoint exclude each other"),
        ([TORCH, "--config.model=lenet"], "--torch_checkpoint needs another flag; add --config=FILE, such as"),
        ([TORCH, CONFIG], "--torch_checkpoint needs another flag; add --sigma=NUMBER, or the cell: --config=FILE:"),
        ([TORCH, CONFIG, "--sigma=1"], "--torch_checkpoint needs another flag; add --output=FILE.tsv"),
        ([TORCH, CONFIG, "--verify=1"], "--torch_checkpoint needs another flag; add --output=FILE.tsv"),
        ([TORCH, CONFIG, "--config.sigma=1"], "--torch_checkpoint needs another flag; add --output=FILE.tsv"),
        ([TORCH, f"{CONFIG}:method=gaussian,sigma=1"], "--torch_checkpoint needs another flag; add --output=FILE.tsv"),
        ([TORCH, CONFIG, "--sigma=1", "--output=a.tsv", "--torch_input=whiten"], "torch_input='whiten' is unknown"),
        ([TORCH, CONFIG, "--sigma=1", "--output=a.tsv", "--alpha=2"], "alpha=2.0: use a number in (0, 1)"),
    ],
)
def test_flags_that_exclude_or_need_each_other(program, arguments, message):
    """No folder or file of these names exists: the settings are checked before anything is read."""
    assert message in program.fails("cli.certify", *arguments)


def test_samplers_do_not_mix_and_older_files_go_on(program, trained, certified, tmp_path):
    older = tmp_path / "older.tsv"
    command = ["cli.certify", f"--workdir={trained}", *QUICK, "--bound=two_class", f"--output={older}"]
    as_before = ["--sampler=float", "--precision=default", "--alpha_share=0.5"]
    program.succeeds(*command, *as_before, "--max=20")
    assert rows(older)[1:] != rows(certified)[1:21]
    # A file of an older version lacks two columns, and its record does not name them.
    older.write_text("".join("\t".join(line.split("\t")[:-2]) + "\n" for line in older.read_text().splitlines()))
    path = older.with_suffix(".json")
    record = json.loads(path.read_text())
    program_of_older = record.pop("program")
    assert program_of_older["rows_per_device"] == 16 and "grid_steps" not in record
    del record["finished"]
    for name in ("sampler", "precision", "tolerance", "alpha_share"):
        del record[name]
        record["identity"].remove(name)
    path.write_text(json.dumps(record))
    error = program.fails(*command)
    assert "sampler: 'float' -> 'grid'; precision: 'default' -> 'highest'" in error
    assert "alpha_share: 0.5 -> 0.99" in error and f"continue it with {' '.join(as_before)}" in error
    program.succeeds(*command, *as_before)
    assert len(rows(older)) == 31
    program.succeeds("cli.certify", f"--workdir={trained}", "--verify=30", f"--output={older}")
    assert "30 of 30 lines reproduce" in program.out
    program.fails("cli.certify", f"--workdir={trained}", "--verify=1", f"--output={older}", "--sampler=grid")
    grid, floats = tmp_path / "1.tsv", tmp_path / "2.tsv"
    program.succeeds(*command[:-1], "--shard=1/2", f"--output={grid}")
    program.succeeds(*command[:-1], "--shard=2/2", "--sampler=float", f"--output={floats}")
    assert "sampler: 'grid' -> 'float'" in program.fails(
        "cli.certify", "--merge", grid, floats, f"--output={tmp_path}/a.tsv"
    )


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_an_audit_takes_the_recorded_program_on_any_number_of_devices(program, trained, certified, devices):
    again = ["cli.certify", f"--workdir={trained}", f"--output={certified}", "--verify=5", f"--num_devices={devices}"]
    program.succeeds(*again)
    assert "5 of 5 lines reproduce" in program.out and "program" not in program.out
    assert "30 are proven in whole numbers" in program.out


def test_a_grid_file_without_its_image_is_refused(program, trained, certified, tmp_path):
    """Fewer pixels would mean a smaller error of the sampler, and larger radii."""
    forged = tmp_path / "c.tsv"
    shutil.copy(certified, forged)
    record = json.loads(certified.with_suffix(".json").read_text())
    assert record["image_shape"] == [28, 28, 1] and record["sampler_error"] == pytest.approx(6.6e-14, rel=0.01)
    forged.with_suffix(".json").write_text(json.dumps({**record, "image_shape": [1, 1, 1]}))
    error = program.fails("cli.certify", f"--workdir={trained}", f"--output={forged}", "--verify=1")
    assert "image_shape: [1, 1, 1] -> [28, 28, 1]" in error


def test_a_fresh_seed_is_drawn_once_and_recorded(program, trained, certified, tmp_path):
    output = tmp_path / "c.tsv"
    command = ["cli.certify", f"--workdir={trained}", *QUICK, f"--output={output}", "--seed=fresh"]
    program.succeeds(*command, "--max=3")
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["seed"] != 0 and record["seed_source"] == "operating system"
    program.succeeds(*command)  # goes on with the seed of the file
    assert len(rows(output)) == 31 and rows(output)[1:] != rows(certified)[1:]
    assert json.loads(output.with_suffix(".json").read_text())["seed"] == record["seed"]
    program.succeeds("cli.certify", f"--workdir={trained}", "--verify=4", f"--output={output}")
    assert "shards share a seed; draw one, such as --seed=" in program.fails(*command, "--shard=1/2")
    given = ["cli.certify", f"--workdir={trained}", *QUICK, f"--output={certified}", "--seed=fresh"]
    assert "was begun with the given seed 0" in program.fails(*given)
    assert "invalid whole number value: 'new'" in program.fails(*command, "--seed=new")


def test_a_setting_of_jax_changes_no_file(program, trained, certified, tmp_path):
    output = tmp_path / "c.tsv"
    jax.config.update("jax_enable_x64", True)
    try:
        program.succeeds("cli.certify", f"--workdir={trained}", *QUICK, "--max=5", f"--output={output}")
    finally:
        jax.config.update("jax_enable_x64", False)
    assert rows(output)[1:] == rows(certified)[1:6]
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (output, certified)]
    assert records[0]["program"] == records[1]["program"]

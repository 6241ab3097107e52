"""Runs that build on other runs: fine-tuning from a checkpoint, and the teacher of CAT-RS."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import mnist
from rs_consistency import data, noise
from rs_consistency.common.errors import UserError
from rs_consistency.smoothing.votes import count_votes
from rs_consistency.training import runs, teacher
from rs_consistency.training.step import make_model
from tests.helpers import TOY, final_params, grid_draws


def leaves_equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_fine_tuning_starts_from_the_other_runs_parameters(program, toy_trained, tmp_path):
    # With a vanishing learning rate the parameters stay what they were.
    still = ["--config.optimizer.lr=1e-30", "--config.optimizer.lr_gamma=1", "--config.num_epochs=1"]
    tuned = tmp_path / "tuned"
    command = [*TOY, *still, f"--config.init_from={toy_trained}", f"--workdir={tuned}"]
    program.succeeds("cli.train", *command)
    assert leaves_equal(final_params(tuned), final_params(toy_trained))
    record = json.loads((tuned / "metrics.jsonl").read_text())
    assert record["step"] == 7  # it counts from its own start
    program.succeeds("cli.train", *TOY, *still, f"--workdir={tmp_path / 'scratch'}")
    assert not leaves_equal(final_params(tmp_path / "scratch"), final_params(toy_trained))


def test_a_started_fine_tuning_no_longer_needs_the_other_run(program, toy_trained, tmp_path):
    other, tuned = tmp_path / "other", tmp_path / "tuned"
    shutil.copytree(toy_trained, other)
    command = [*TOY, f"--config.init_from={other}", f"--workdir={tuned}"]
    program.succeeds("cli.train", *command)
    whole = final_params(tuned)
    shutil.rmtree(other)
    shutil.rmtree(tuned / "checkpoints" / "14")
    program.succeeds("cli.train", *command)
    assert leaves_equal(final_params(tuned), whole)
    program.succeeds("cli.certify", f"--workdir={tuned}", "--n=10", "--max=1")


def test_runs_that_do_not_fit_are_named(program, toy_trained, tmp_path):
    error = program.fails(
        "cli.train", *TOY, "--config.model=resnet20", f"--config.init_from={toy_trained}", f"--workdir={tmp_path / 'a'}"
    )
    assert f"init_from={toy_trained} does not fit: ['batch_stats']" in error
    assert "(model=linear, dataset mnist); start from a run of the same model" in error
    (tmp_path / "empty").mkdir()
    error = program.fails("cli.train", *TOY, f"--config.init_from={tmp_path / 'empty'}", f"--workdir={tmp_path / 'b'}")
    assert f"init_from={tmp_path / 'empty'} has no config.json" in error
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.fixture(scope="module")
def split():
    arrays = data.load("mnist", "train")
    return data.Split(arrays.images[:20], arrays.labels[:20])


def ask(run, split, workdir, num_votes=40, **changes):
    config = mnist.get_config()
    config.update(changes)
    return teacher.smoothed_predictions(
        config, split, run, num_votes=num_votes, devices=jax.devices()[:2], workdir=workdir
    )


def test_the_teachers_votes_are_those_of_its_smoothed_classifier(toy_trained, split, tmp_path):
    shares = ask(toy_trained, split, tmp_path)
    assert shares.shape == (20, 10) and shares.dtype == np.float32
    run = runs.restore(toy_trained, jax.devices()[:1])
    model, key = make_model(run.config), noise.stream_key(0, noise.Stream.TEACHER)
    for index in (0, 13):
        draws = grid_draws(key, index, 1, np.arange(40), shape=(28, 28, 1), sigma=run.config.sigma)
        logits = model.apply(run.variables, np.float32(split.images[index][None] + draws) / np.float32(255))
        expected = np.bincount(logits.argmax(axis=-1), minlength=10) / 40
        np.testing.assert_allclose(shares[index], expected, atol=1e-7)


def test_the_teachers_votes_are_kept_and_continued(toy_trained, split, tmp_path, monkeypatch, capsys):
    whole = ask(toy_trained, split, tmp_path)
    asked = []

    def spy(*args, **settings):
        asked.append(len(args[2]))
        return count_votes(*args, **settings)

    monkeypatch.setattr(teacher, "count_votes", spy)
    path = tmp_path / teacher.FILE
    np.testing.assert_array_equal(ask(toy_trained, split, tmp_path), whole)
    assert asked == []  # read back

    with np.load(path) as arrays:
        counts, digest = arrays["counts"], str(arrays["teacher"])
    np.savez_compressed(path, counts=counts[:7], teacher=digest)  # as an interruption leaves it
    np.testing.assert_array_equal(ask(toy_trained, split, tmp_path), whole)
    assert asked == [13] and "holds 7 images already" in capsys.readouterr().err

    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(ask(toy_trained, split, tmp_path), whole)
    assert asked == [13, 20] and "is unreadable; it is made again" in capsys.readouterr().err

    np.savez_compressed(path, counts=np.roll(counts[:7], 1, axis=1), teacher="another")
    np.testing.assert_array_equal(ask(toy_trained, split, tmp_path), whole)
    assert asked == [13, 20, 20] and "is of another state of the teacher" in capsys.readouterr().err
    # Once it is whole, the teacher may train on, or go.
    np.testing.assert_array_equal(ask(tmp_path / "gone", split, tmp_path), whole)
    path.unlink()
    with pytest.raises(UserError, match=r"the teacher's workdir=.*gone does not exist"):
        ask(tmp_path / "gone", split, tmp_path)


def test_teachers_that_cannot_teach_are_refused_before_anything_is_made(program, toy_trained, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(toy_trained, without, ignore=shutil.ignore_patterns("checkpoints"))
    for key in ("catrs.teacher", "init_from"):
        command = [
            *TOY,
            "--config.method=catrs",
            f"--config.catrs.teacher={toy_trained}",
            f"--workdir={tmp_path / 'run'}",
        ]
        error = program.fails("cli.train", *command, f"--config.{key}={without}")
        assert f"{key}={without} has no checkpoint yet" in error
        assert not (tmp_path / "run").exists()
    error = program.fails("cli.train", *command, "--config.dataset.name=mnist_subset")
    assert f"catrs.teacher={toy_trained} was trained on mnist, this run is on mnist_subset" in error
    assert not (tmp_path / "run").exists()
